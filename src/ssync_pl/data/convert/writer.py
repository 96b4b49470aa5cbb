"""The one writer of converted shards: parallel, resumable, and read back before a shard gets its name."""

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ssync_pl.data.decode import parse_json
from ssync_pl.data.files import exclusive, write_bytes
from ssync_pl.data.index import ShardEntry, extend_index, scan_shard
from ssync_pl.data.processes import cpu_count, mapper
from ssync_pl.errors import ShardError, choose, explained, require, require_shard

_logger = logging.getLogger(__name__)

_Made = tuple[ShardEntry | None, dict[str, str], bool]  # None without a good video; what was left out; whether kept
Decode = Callable[[Any], Mapping[str, Any]]  # source → members; pickles; a `ShardError` names a bad source


@dataclass(frozen=True)
class Split:
    """What becomes the shards of one prefix: the source of each sample (JSON values), its decoder, lines to print."""

    prefix: str
    sources: Sequence[Any]
    decode: Decode
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote: shards, how many were there before, videos, and key → reason of what was left out."""

    shards: tuple[ShardEntry, ...]
    kept: int
    videos: int
    skipped: dict[str, str]


def convert(
    sources: Sequence[Any],
    decode: Decode,
    out: str | os.PathLike[str],
    prefix: str,
    *,
    recipe: Mapping[str, Any],
    samples_per_shard: int = 32,
    num_workers: int | None = None,
    on_bad_sample: Literal["raise", "skip"] = "raise",
    progress: bool = True,
) -> ConversionReport:
    """Convert sources into the shards `<prefix>-000000.tar`, … and note them in the folder's index.

    Each shard is made whole by one process under a hidden name, read back, and only then renamed. The same call goes on
    where a killed one was. Equal arguments give equal bytes, whatever the number of workers and the interruptions.
    `recipe` holds the settings that decide the samples, as JSON values; several prefixes may share a folder. `progress`
    shows a bar on terminals. Finished shards stay after errors.
    """
    plain = prefix and not prefix.startswith(".") and not any(character in prefix for character in "/\\{}*?[]")
    require(bool(plain), "the prefix to be a plain file name part", repr(prefix))
    require(bool(sources), f"at least one video for `{prefix}`", "none")
    require(samples_per_shard >= 1, "samples_per_shard (--samples-per-shard) to be at least 1", samples_per_shard)
    require(num_workers is None or num_workers >= 0, "num_workers (--workers) to be 0 or more", num_workers)
    choose("on_bad_sample", on_bad_sample, "raise", "skip")
    out, parts = Path(out), dict[Path, dict[str, Any]]()
    for number, source in enumerate(sources):
        path = out / f"{prefix}-{number // samples_per_shard:06d}.tar"
        parts.setdefault(path, {})[f"{number:06d}"] = source
    settings = {**recipe, "videos": len(sources), "samples_per_shard": samples_per_shard}
    advice = "Wait, make room or choose another folder, and run again: finished shards are kept."
    with explained(f"to write shards to {out}", OSError, advice=advice):
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out / ".convert.lock"):
            _claim(out, prefix, settings, parts)
            make = partial(_make, decode, on_bad_sample == "skip")
            try:
                made = _run(make, parts, num_workers, f"writing {prefix}" if progress else "")
            finally:
                for name in os.listdir(out):  # what killed processes left: the lock says that nobody works on it
                    if re.fullmatch(rf"\.{re.escape(prefix)}-\d{{6,}}\.[0-9a-f]{{8}}\.tmp", name):
                        shutil.rmtree(out / name, ignore_errors=True)
            return _finish(out, prefix, settings, made)


def _claim(out: Path, prefix: str, settings: Mapping[str, Any], parts: Mapping[Path, Mapping[str, Any]]) -> None:
    """Note beside the shards how they are made; refuse a folder that holds other shards or another record."""
    path, head = out / f".{prefix}.plan.json", {"format": "ssync_pl.conversion", "version": 2}
    sources = json.dumps([item for part in parts.values() for item in part.items()], sort_keys=True)
    digest = hashlib.sha256(sources.encode()).hexdigest()
    record = json.loads(json.dumps({**head, "settings": settings, "sources": digest}))
    before: dict[str, Any] = {}
    if path.exists():
        with contextlib.suppress(ShardError):
            before = parse_json(path.read_bytes(), str(path), dict)
        expected = f"{path} to be the record of a conversion by this version of ssync_pl"
        advice = "Choose another folder with --out, or for `videos` another --prefix."
        ours = {**before, **head} == before and isinstance(before.get("settings"), dict)
        require_shard(ours, expected, "something else", advice=advice)
    found = sorted(name for name in os.listdir(out) if re.fullmatch(re.escape(prefix) + r"-\d{6,}\.tar", name))
    then, now = ({**one.get("settings", {}), "sources (a digest)": one.get("sources")} for one in (before, record))
    why = [
        f"{name} {json.dumps(then.get(name))[:60]}, not {json.dumps(now.get(name))[:60]}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
    why = why[:4] if before else ["no record of a conversion lies beside them"]
    why = why or [f"{name} is none of this conversion" for name in found if not _is_ours(out / name, parts)]
    expected = f"the {len(found)} shards `{prefix}-*.tar` in {out} to be of this conversion"
    advice = "Run with the earlier settings to go on, move the shards away, or choose another folder with --out."
    require_shard(not (found and why), expected, "; ".join(why), advice=advice)
    if before != record:
        write_bytes(path, json.dumps(record, sort_keys=True).encode())


def _is_ours(path: Path, parts: Mapping[Path, Mapping[str, Any]]) -> bool:
    """Whether a shard, whole or cut off, begins with a sample of its place; a link counts where what it names does."""
    if path not in parts or not path.is_file():
        return False
    with path.open("rb") as stream:
        heads = [stream.read(512).partition(b".")[0].decode(errors="replace") for _ in range(3)]
    return any(head in parts[path] for head in heads)  # the first ones may tell of long names


def _run(
    make: Callable[..., _Made], parts: Mapping[Path, Mapping[str, Any]], wanted: int | None, title: str
) -> list[_Made]:
    """Make all shards, in this process or in others."""
    from tqdm import tqdm

    workers = min(cpu_count() if wanted is None else wanted, len(parts))
    workers = 0 if wanted is None and workers == 1 else workers
    made = []
    bar = tqdm(total=sum(map(len, parts.values())), desc=title, unit="video", disable=None if title else True)
    with bar, mapper(workers) as apply:
        for part, result in zip(parts.values(), apply(make, parts, parts.values()), strict=True):
            made.append(result)
            bar.update(len(part))
    return made


def _make(decode: Decode, skip: bool, path: Path, items: Mapping[str, Any]) -> _Made:
    """Keep a finished shard, or make it."""
    from ssync_pl.data.shards import ShardWriter, read_shard  # imports PyTorch

    before: list[str] = []
    try:
        entry = scan_shard(path)
        before = [sample.key for sample in entry.samples]
        if before == [*items]:
            return entry, {}, True
    except FileNotFoundError:
        pass
    except ShardError as error:
        _logger.warning("Making %s again: %s", path, error)
    scratch = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp")
    skipped: dict[str, str] = {}
    try:
        scratch.mkdir()
        with ShardWriter(scratch, "made", samples_per_shard=len(items) + 1) as writer:
            for key, source in items.items():
                try:
                    writer.write(key, decode(source))
                except ShardError as error:
                    if not skip:
                        raise
                    skipped[key] = str(error)
        if before and {*before} >= {*items} - {*skipped}:  # an earlier run left out bad videos, and they still are
            return entry, {key: skipped[key] for key in items if key not in before}, True
        if len(skipped) == len(items):
            return None, skipped, False
        made = scratch / "made-000000.tar"
        entry = scan_shard(made)
        for _, members in read_shard(str(made), entry, max_bytes=1 << 40):  # so that no damaged one gets its name
            for name in members.sizes:
                members.decode(name)
        with made.open("rb+") as stream:
            os.fsync(stream.fileno())  # content before the name: a power cut must not leave an empty file under it
        os.replace(made, path)
        return replace(entry, name=path.name), skipped, False
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _finish(out: Path, prefix: str, settings: Mapping[str, Any], made: Sequence[_Made]) -> ConversionReport:
    """Note the shards in the index, and what was left out in the log."""
    skipped = {key: reason for _, reasons, _ in made for key, reason in reasons.items()}
    for key, reason in skipped.items():
        _logger.warning("Left out video %s: %s", key, reason)
    entries = tuple(entry for entry, _, _ in made if entry is not None)
    first = next(iter(skipped.values()), "")
    require_shard(bool(entries), f"a good video for {out}", f"{len(skipped)} bad ones, the first because: {first}")
    videos = sum(len(entry.samples) for entry in entries)
    extend_index(out, entries, {prefix: {**settings, "videos": videos, "skipped": skipped}})
    return ConversionReport(entries, sum(kept for _, _, kept in made), videos, skipped)
