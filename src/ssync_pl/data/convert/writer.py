"""The one writer of converted shards: parallel, resumable, and read back before a shard gets its name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ssync_pl.data.decode import parse_json
from ssync_pl.data.files import exclusive, write_bytes
from ssync_pl.data.index import ShardEntry, read_index, scan_shard, write_index
from ssync_pl.data.processes import cpu_count, mapper
from ssync_pl.data.shards import ShardReader, ShardWriter
from ssync_pl.errors import ShardError, choose, require, require_shard

__all__ = ["ConversionReport", "Decode", "Item", "Split", "convert"]

_LOCK = ".convert.lock"
# Errors of the machine, not of one source file: skipping the sample would lose all the others too.
_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_ADVICE = {
    errno.EAGAIN: "Another process converts into this folder: wait for it, or choose another one.",
    errno.ENOSPC: "Free some space and run the same command again: finished shards are kept.",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Choose another folder, or change its permissions."),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "A file has the name of the folder: choose another one."),
}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One future sample: its key, and as JSON values what `decode` needs to find its source."""

    key: str
    source: Any


Decode = Callable[[Item], Mapping[str, Any]]
"""Makes the members of one sample; it pickles, and raises `ShardError` that names the source of a bad item."""


@dataclass(frozen=True)
class Split:
    """What becomes the shards of one prefix: the source of each sample, and what to tell the user about them."""

    prefix: str
    sources: Sequence[Any]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote: paths of its shards, counts, and key → reason of what was left out."""

    shards: tuple[Path, ...]
    videos: int
    kept: int
    skipped: dict[str, str]
    frames: int
    bytes: int


@dataclass(frozen=True)
class _Made:
    entry: ShardEntry | None  # None when every video was left out
    skipped: dict[str, str] = field(default_factory=dict)
    kept: bool = False


def convert(
    items: Sequence[Item],
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
    """Convert items into the shards `<prefix>-000000.tar`, … and note them in the folder's index.

    Each shard is made whole by one process under a hidden name, read back, and only then renamed. The same call goes on
    where a killed one was. Equal arguments give equal bytes, whatever the number of workers and the interruptions.
    `recipe` holds the settings that decide the samples, as JSON values; several prefixes may share a folder.

    Raises:
        ConfigError: An argument is out of range.
        ShardError: An item is bad and `on_bad_sample` is not `skip`, the folder holds shards of another conversion,
            another process works on it, or the disk is full or refuses. Finished shards stay.
    """
    plain = prefix and not prefix.startswith(".") and not any(character in prefix for character in "/\\{}*?[]")
    require(bool(plain), "the prefix to be a plain file name part", repr(prefix))
    require(bool(items), f"at least one video for `{prefix}`", "none")
    require(samples_per_shard >= 1, "samples_per_shard (--samples-per-shard) to be at least 1", samples_per_shard)
    require(num_workers is None or num_workers >= 0, "num_workers (--workers) to be 0 or more", num_workers)
    choose("on_bad_sample", on_bad_sample, "raise", "skip")
    out = Path(out)
    parts = [items[start : start + samples_per_shard] for start in range(0, len(items), samples_per_shard)]
    paths = [out / f"{prefix}-{number:06d}.tar" for number in range(len(parts))]
    settings = {**recipe, "videos": len(items), "samples_per_shard": samples_per_shard}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out / _LOCK):
            _claim(out, prefix, settings, items, [path.name for path in paths])
            make = partial(_make, decode, on_bad_sample == "skip")
            try:
                made = _run(make, paths, parts, num_workers, f"writing {prefix}" if progress else None)
            finally:
                _remove_leftovers(out, prefix)
            return _finish(out, prefix, settings, made)
    except BrokenProcessPool as error:
        raise ShardError(
            f"Expected the workers to live until {out} is complete, but one ended early: memory ran out, or the main "
            "script lacks `if __name__ == '__main__':`. Run again with fewer workers: finished shards are kept."
        ) from error
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "Run the same command again: finished shards are kept.")
        raise ShardError(f"Expected to write shards to {out}, but got {error}. {advice}") from error


def _claim(out: Path, prefix: str, settings: Mapping[str, Any], items: Sequence[Item], names: Sequence[str]) -> None:
    """Note beside the shards how they are made; refuse a folder that holds other shards or another record."""
    path = out / f".{prefix}.plan.json"
    sources = json.dumps([(item.key, item.source) for item in items], sort_keys=True)
    record = {"format": "ssync_pl.conversion", "version": 2, "settings": settings}
    record = json.loads(json.dumps({**record, "sources": hashlib.sha256(sources.encode()).hexdigest()}))
    before: dict[str, Any] = {}
    if path.exists():
        with contextlib.suppress(ShardError):
            before = parse_json(path.read_bytes(), str(path), dict)
        ours = (before.get("format"), before.get("version")) == (record["format"], record["version"])
        expected = f"{path} to be the record of a conversion by this version of ssync_pl"
        advice = "Choose another folder with --out, or for `videos` another --prefix."
        require_shard(ours, expected, "something else", advice=advice)
    pattern = re.compile(re.escape(prefix) + r"-\d{6,}\.tar")
    found = sorted(name for name in os.listdir(out) if pattern.fullmatch(name))
    then, now = before.get("settings", {}), record["settings"]
    why = [
        f"{name} {json.dumps(then.get(name))[:60]}, not {json.dumps(now.get(name))[:60]}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
    if not before:
        why = ["no record of a conversion lies beside them"]
    elif not why and before.get("sources") != record["sources"]:
        why = ["other source files, or the same ones in another order"]
    why = why or [f"{name} is none of this conversion" for name in found if name not in names]
    expected = f"the {len(found)} shards `{prefix}-*.tar` in {out} to be of this conversion"
    advice = "Run with the earlier settings to go on, move the shards away, or choose another folder with --out."
    require_shard(not (found and why), expected, "; ".join(why[:4]), advice=advice)
    if before != record:
        write_bytes(path, json.dumps(record, sort_keys=True).encode())


def _remove_leftovers(out: Path, prefix: str) -> None:
    """Remove what processes left that were killed; the lock says that nobody works on it."""
    scratch = re.compile(rf"\.{re.escape(prefix)}-\d{{6,}}\.[0-9a-f]{{8}}\.tmp")
    for name in os.listdir(out):
        if scratch.fullmatch(name):
            shutil.rmtree(out / name, ignore_errors=True)


def _run(
    make: Callable[..., _Made], paths: Sequence[Path], parts: Sequence[Any], wanted: int | None, title: str | None
) -> list[_Made]:
    """Make all shards, in this process or in others."""
    from tqdm import tqdm

    workers = min(cpu_count() if wanted is None else wanted, len(paths))
    workers = 0 if wanted is None and workers == 1 else workers
    made = []
    bar = tqdm(total=sum(map(len, parts)), desc=title, unit="video", disable=title is None)
    with bar, mapper(workers) as apply:
        for part, result in zip(parts, apply(make, paths, parts), strict=True):
            made.append(result)
            bar.update(len(part))
    return made


def _make(decode: Decode, skip: bool, path: Path, items: Sequence[Item]) -> _Made:
    """Keep a finished shard, or make it."""
    keys = [item.key for item in items]
    before: list[str] = []
    try:
        entry = scan_shard(path)
        before = [sample.key for sample in entry.samples]
        if before == keys:
            return _Made(entry, kept=True)
    except FileNotFoundError:
        pass
    except ShardError as error:
        _logger.warning("Making %s again: %s", path, error)
    scratch = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp")
    skipped: dict[str, str] = {}
    try:
        scratch.mkdir()
        with ShardWriter(scratch, "made", samples_per_shard=len(items) + 1) as writer:
            for item in items:
                try:
                    writer.write(item.key, _decode(decode, item))
                except ShardError as error:
                    if not skip:
                        raise
                    skipped[item.key] = str(error)
        if before and set(before) >= set(keys) - set(skipped):  # an earlier run left out bad videos, and they still are
            return _Made(entry, {key: skipped[key] for key in keys if key not in before}, kept=True)
        if len(skipped) == len(keys):
            return _Made(None, skipped)
        made = scratch / "made-000000.tar"
        entry = _read_back(made)
        with made.open("rb+") as stream:
            os.fsync(stream.fileno())  # content before the name: a power cut must not leave an empty file under it
        os.replace(made, path)
        return _Made(replace(entry, name=path.name), skipped)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _decode(decode: Decode, item: Item) -> Mapping[str, Any]:
    try:
        return decode(item)
    except OSError as error:
        if error.errno in _MACHINE:
            raise
        raise ShardError(
            f"Expected the source of video {item.key} to be readable, but got {error}. Repair it, or leave such videos "
            "out with --on-bad-sample skip."
        ) from error


def _read_back(path: Path) -> ShardEntry:
    """Decode every member of a shard, so that no damaged one gets its name."""
    entry = scan_shard(path)
    with contextlib.closing(ShardReader()) as reader:
        for sample in entry.samples:
            members = reader.sample(str(path), entry, sample, max_bytes=1 << 40)
            for name in sample.members:
                members.decode(name)
    return entry


def _finish(out: Path, prefix: str, settings: Mapping[str, Any], made: Sequence[_Made]) -> ConversionReport:
    skipped = {key: reason for result in made for key, reason in result.skipped.items()}
    entries = [result.entry for result in made if result.entry is not None]
    for key, reason in skipped.items():
        _logger.warning("Left out video %s: %s", key, reason)
    first = next(iter(skipped.values()), "")
    require_shard(bool(entries), f"a good video for {out}", f"{len(skipped)} bad ones, the first because: {first}")
    before = read_index(out)
    known = {name: entry for name, entry in (before.shards if before else {}).items() if (out / name).exists()}
    known |= {entry.name: entry for entry in entries}
    samples = [sample for entry in entries for sample in entry.samples]
    recipes = {**(before.recipe if before else {}), prefix: {**settings, "videos": len(samples), "skipped": skipped}}
    write_index(out, known.values(), recipes)
    return ConversionReport(
        shards=tuple(out / entry.name for entry in entries),
        videos=len(samples),
        kept=sum(result.kept for result in made),
        skipped=skipped,
        frames=sum(sample.frames or 0 for sample in samples),
        bytes=sum(entry.size for entry in entries),
    )
