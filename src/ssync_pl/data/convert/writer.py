"""The one writer of converted shards: parallel, resumable, and read back before a shard gets its name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import multiprocessing
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssync_pl.data.files import exclusive, write_bytes
from ssync_pl.data.index import ShardEntry, read_index, scan_shard, write_index
from ssync_pl.data.processes import cpu_count, end_with_parent, may_start_processes, one_thread_each
from ssync_pl.data.shards import ShardReader, ShardWriter
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["ConversionReport", "Decode", "Item", "convert", "record_path"]

_VIDEOS_PER_WORKER = 16  # fewer are not worth the start of a process
_LOCK = ".convert.lock"
# Errors of the machine, not of one source file: skipping the sample would lose all the others too.
_MACHINE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_FORMAT, _VERSION = "ssync_pl.conversion", 1

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One future sample: its key, and as JSON values what `decode` needs to find its source."""

    key: str
    source: Any


Decode = Callable[[Item], Mapping[str, Any]]
"""Makes the members of one sample; it pickles, and raises `ShardError` that names the source of a bad item."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote: paths of its shards, counts, and key → reason of what was left out."""

    shards: tuple[Path, ...]
    videos: int
    kept: int
    skipped: dict[str, str] = field(default_factory=dict)
    frames: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Record:
    """All that decides the shards of one prefix, and whether they are complete; it lies beside them."""

    prefix: str
    videos: int
    items: str  # hash of all keys and sources
    samples_per_shard: int
    recipe: dict[str, Any]
    complete: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    frames: int = 0

    @property
    def shards(self) -> list[str]:
        count = -(-self.videos // self.samples_per_shard)
        return [f"{self.prefix}-{number:06d}.tar" for number in range(count)]

    def differences(self, other: _Record) -> list[str]:
        names: list[tuple[str, Any, Any]] = [("samples_per_shard", self.samples_per_shard, other.samples_per_shard)]
        names += [(key, self.recipe.get(key), other.recipe.get(key)) for key in sorted({*self.recipe, *other.recipe})]
        found = [f"{key} {json.dumps(there)[:60]}, not {json.dumps(here)[:60]}" for key, here, there in names
                 if here != there]  # fmt: skip
        if self.videos != other.videos:
            found.append(f"{other.videos} videos, not {self.videos}")
        elif self.items != other.items:
            found.append("other source files, or the same ones in another order")
        return found


@dataclass(frozen=True)
class _Job:
    """One shard."""

    path: Path
    items: tuple[Item, ...]
    decode: Decode
    skip: bool


@dataclass(frozen=True)
class _Made:
    entry: ShardEntry | None  # None when every item was left out
    frames: int = 0
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
    where a killed one was, and returns at once when all is there. Equal arguments give equal bytes, whatever the number
    of workers and the interruptions.

    Args:
        items: The future samples, in order.
        decode: Makes the members of one.
        out: Folder of the shards; made when absent. Several prefixes may share it.
        prefix: Start of the shards' names.
        recipe: Settings that decide the samples, as JSON values.
        samples_per_shard: Items per shard.
        num_workers: Processes; 0 works in this one. None: one per CPU, but none for a handful of videos.
        on_bad_sample: `raise` stops at the first bad item, `skip` leaves it out, logs, names and counts it.
        progress: Show a bar on standard error.

    Returns:
        What was written.

    Raises:
        ConfigError: An argument is out of range.
        ShardError: An item is bad, the folder holds shards of another conversion, another process works on the same
            shards, or the disk is full or refuses. Finished shards stay.
    """
    _check_arguments(items, prefix, samples_per_shard, num_workers, on_bad_sample)
    out, skip = Path(out), on_bad_sample == "skip"
    digest = hashlib.sha256(_canonical("items", [(item.key, item.source) for item in items])).hexdigest()
    record = _Record(prefix, len(items), digest, samples_per_shard, json.loads(_canonical("recipe", recipe)))
    try:
        # Looked at before the lock is taken too: a complete set may lie on a disk that is read-only by now.
        done = _completed(out, record, skip)
        if done is not None:
            return done
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out / _LOCK):
            done = _completed(out, record, skip)
            if done is not None:
                return done
            before = _read_record(out, prefix)
            if before is None or record.differences(before):
                _write_record(out, record)
            _remove_leftovers(out, prefix)
            jobs = [
                _Job(out / name, tuple(items[i * samples_per_shard : (i + 1) * samples_per_shard]), decode, skip)
                for i, name in enumerate(record.shards)
            ]
            workers = _worker_count(num_workers, len(items), len(jobs))
            made = _run(jobs, workers, f"converting {prefix}", progress)
            return _finish(out, record, made)
    except BlockingIOError as error:
        raise ShardError(
            f"Expected to be the only process that converts into {out}, but another one does. Wait for it, or choose "
            "another folder."
        ) from error
    except BrokenProcessPool as error:
        raise ShardError(
            f"Expected the worker processes to live until {out} is complete, but one ended early: memory ran out, or "
            "the main script lacks `if __name__ == '__main__':`. Run again with fewer workers: finished shards are "
            "kept."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "The disk is full: free some space and run the same command again; finished shards are kept."
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            advice = "The folder cannot be written: choose another one, or change its permissions."
        else:
            advice = "Run the same command again, finished shards are kept, or choose another folder."
        raise ShardError(f"Expected to write shards to {out}, but got {error}. {advice}") from error


def _verify(path: Path, keys: Sequence[str]) -> tuple[ShardEntry, int]:
    """Decode every member of a shard with these keys; return its index entry and the frames of all its videos."""
    entry = scan_shard(path)
    odd = sorted(set(keys) ^ {sample.key for sample in entry.samples})
    if odd or len(entry.samples) != len(keys):
        raise ShardError(f"Expected {path} to hold {len(keys)} videos, but got {len(entry.samples)}: {odd[:3]} differ.")
    frames = 0
    with contextlib.closing(ShardReader()) as reader:
        for sample in entry.samples:
            members = reader.sample(str(path), entry, sample, max_bytes=1 << 40)
            frames += _count_frames({name: members.decode(name) for name in sample.members}, members.where)
    return entry, frames


def _count_frames(members: Mapping[str, Any], where: str) -> int:
    """Count the frames of one sample, after a look at whether its video and masks fit each other."""
    arrays = {name.split(".")[0]: value for name, value in members.items() if isinstance(value, np.ndarray)}
    video, masks = arrays.get("video"), arrays.get("segmentations")
    if video is not None and (video.ndim != 4 or video.shape[3] != 3 or not video.size or video.dtype != np.uint8):
        raise ShardError(
            f"Expected the video of {where} to be uint8 (frames, height, width, 3) and not empty, but got "
            f"{video.dtype} {video.shape}. Repair the source."
        )
    if masks is not None and (masks.ndim != 4 or masks.dtype.kind not in "uib"):
        raise ShardError(
            f"Expected the masks of {where} to be integers (frames, height, width, objects), but got {masks.dtype} "
            f"{masks.shape}. Repair the source."
        )
    if video is not None and masks is not None and video.shape[:3] != masks.shape[:3]:
        raise ShardError(
            f"Expected the video and the masks of {where} to have the same frames, height and width, but got "
            f"{video.shape[:3]} and {masks.shape[:3]}. Repair the source."
        )
    return 0 if video is None else len(video)


def _check_arguments(
    items: Sequence[Item], prefix: str, samples_per_shard: int, num_workers: int | None, on_bad_sample: str
) -> None:
    plain = prefix and not prefix.startswith(".") and not any(character in prefix for character in "/\\{}*?[]")
    whole = isinstance(samples_per_shard, int) and not isinstance(samples_per_shard, bool) and samples_per_shard >= 1
    workers = num_workers is None or (not isinstance(num_workers, bool) and num_workers >= 0)
    checks = (
        (plain, "the prefix to be a plain file name part", prefix),
        (whole, "samples_per_shard to be at least 1", samples_per_shard),
        (workers, "num_workers to be 0 or more, or None", num_workers),
        (on_bad_sample in ("raise", "skip"), "on_bad_sample to be 'raise' or 'skip'", on_bad_sample),
        (bool(items), f"at least one video for `{prefix}`", "none"),
    )
    for good, expected, got in checks:
        if not good:
            raise ConfigError(f"Expected {expected}, but got {got!r}.")
    keys = [item.key for item in items]
    odd = [key for key in keys if not re.fullmatch(r"[A-Za-z0-9_-]+", key) or key.startswith("__")]
    if odd or len(set(keys)) < len(keys):
        raise ConfigError(f"Expected different keys of letters, digits, `_` and `-`, but got {(odd or keys)[:3]}.")


def _canonical(name: str, value: Any) -> bytes:
    try:
        return json.dumps(value, sort_keys=True).encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Expected argument `{name}` to hold JSON values only, but got {error}.") from error


def _worker_count(wanted: int | None, videos: int, shards: int) -> int:
    if wanted == 0 or not may_start_processes():
        return 0
    if wanted is not None:
        return min(wanted, shards)
    count = min(cpu_count(), shards, videos // _VIDEOS_PER_WORKER)
    return count if count > 1 else 0


def record_path(out: Path, prefix: str) -> Path:
    """Where the record of a conversion lies."""
    return out / f".{prefix}.plan.json"


def _read_record(out: Path, prefix: str) -> _Record | None:
    path = record_path(out, prefix)
    try:
        raw = json.loads(path.read_bytes())
        if (raw.pop("format"), raw.pop("version")) != (_FORMAT, _VERSION):
            raise ValueError("another format or version")
        return _Record(**raw)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"Expected {path} to be the record of a conversion, version {_VERSION}, but got {error!r}. Delete it "
            f"together with the shards `{prefix}-*.tar`, or choose another folder."
        ) from error


def _write_record(out: Path, record: _Record) -> None:
    content = {"format": _FORMAT, "version": _VERSION, **asdict(record)}
    write_bytes(record_path(out, record.prefix), json.dumps(content, sort_keys=True).encode())


def _completed(out: Path, record: _Record, skip: bool) -> ConversionReport | None:
    """Report a conversion that is complete, from the sizes alone; None when there is something to do."""
    before = _read_record(out, record.prefix)
    _refuse_foreign_shards(out, record, before)
    if before is None or not before.complete or record.differences(before) or (before.skipped and not skip):
        return None
    index = read_index(out)
    if index is None:
        return None
    entries = [index.shards[name] for name in record.shards if name in index.shards]
    paths = [out / entry.name for entry in entries]
    if any(not path.is_file() or path.stat().st_size != e.size for path, e in zip(paths, entries, strict=True)):
        return None
    if sum(len(entry.samples) for entry in entries) != record.videos - len(before.skipped):
        return None
    return _report(out, entries, len(paths), before.skipped, before.frames)


def _refuse_foreign_shards(out: Path, record: _Record, before: _Record | None) -> None:
    pattern = re.compile(re.escape(record.prefix) + r"-\d{6,}\.tar")
    found = sorted(path.name for path in out.glob("*.tar") if pattern.fullmatch(path.name))
    strangers = sorted(set(found) - set(record.shards))
    why = ["no record of a conversion lies beside them"] if before is None else record.differences(before)[:4]
    why = why or [f"{name} is none of this conversion" for name in strangers[:1]]
    if found and why:
        raise ShardError(
            f"Expected the {len(found)} shards `{record.prefix}-*.tar` in {out} to be of this conversion, but they are "
            f"not: {'; '.join(why)}. Run with the earlier settings to go on, move the shards away, or choose another "
            "folder with --out."
        )


def _remove_leftovers(out: Path, prefix: str) -> None:
    """Remove what killed runs left; the lock says that nobody works on it."""
    scratch = re.compile(rf"\.{re.escape(prefix)}-\d{{6,}}\.\d+-[0-9a-f]{{8}}\.tmp")
    halves = re.compile(rf"\.\.{re.escape(prefix)}\.plan\.json-\w+")
    for path in out.iterdir():
        if scratch.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif halves.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _run(jobs: Sequence[_Job], workers: int, title: str, progress: bool) -> list[_Made]:
    from tqdm import tqdm

    with tqdm(total=sum(len(job.items) for job in jobs), desc=title, unit="video", disable=not progress) as bar:
        if not workers:
            return [_do(job, bar.update) for job in jobs]
        # spawn: forking a process that has threads (PyTorch, a logger) can hang
        context = multiprocessing.get_context("spawn")
        stop = context.RawValue("b", 0)  # plain memory: a worker that dies cannot leave a lock behind
        with one_thread_each():
            pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(stop,))
            try:
                futures = {pool.submit(_do, job): job for job in jobs}
                for future in as_completed(futures):
                    future.result()
                    bar.update(len(futures[future].items))
                return [future.result() for future in futures]
            finally:
                stop.value = 1
                pool.shutdown(wait=True, cancel_futures=True)


_stop: Any = None


def _start(stop: Any) -> None:
    global _stop
    end_with_parent()
    _stop = stop


def _do(job: _Job, tick: Callable[[], object] = lambda: None) -> _Made:
    """Read a finished shard back, or make it."""
    try:
        entry, frames = _verify(job.path, [item.key for item in job.items])
        for _ in job.items:
            tick()
        return _Made(entry, frames, kept=True)
    except FileNotFoundError:
        pass
    except ShardError as error:  # damaged, or an earlier run left out bad samples
        _logger.warning("Making %s again: %s", job.path, error)
    # the random part lets processes of several machines share a disk
    scratch = job.path.with_name(f".{job.path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    keys: list[str] = []
    skipped: dict[str, str] = {}
    try:
        scratch.mkdir()
        with ShardWriter(scratch, "made", samples_per_shard=len(job.items) + 1) as writer:
            for item in job.items:
                if _stop is not None and _stop.value:
                    raise InterruptedError(errno.EINTR, "the conversion was stopped", str(job.path))
                try:
                    members = _decode(job, item)
                    _count_frames(members, f"{job.path.name}, key {item.key}")
                    writer.write(item.key, members)
                    keys.append(item.key)
                except ShardError as error:
                    if not job.skip:
                        raise
                    skipped[item.key] = str(error)
                tick()
        if not keys:
            job.path.unlink(missing_ok=True)
            return _Made(None, 0, skipped)
        made = (scratch / "made-000000.tar").rename(scratch / job.path.name)
        entry, frames = _verify(made, keys)
        with made.open("rb+") as stream:
            os.fsync(stream.fileno())  # content before the name: a power cut must not leave an empty file under it
        os.replace(made, job.path)
        return _Made(entry, frames, skipped)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _decode(job: _Job, item: Item) -> Mapping[str, Any]:
    try:
        return job.decode(item)
    except OSError as error:
        if error.errno in _MACHINE:
            raise
        raise ShardError(
            f"Expected the source of video {item.key} to be readable, but got {error}. Repair it, or leave such videos "
            "out with --on-bad-sample skip."
        ) from error


def _finish(out: Path, record: _Record, made: Sequence[_Made]) -> ConversionReport:
    skipped = {key: reason for result in made for key, reason in result.skipped.items()}
    entries = [result.entry for result in made if result.entry is not None]
    for key, reason in skipped.items():
        _logger.warning("Left out video %s: %s", key, reason)
    if not entries:
        raise ShardError(
            f"Expected at least one good video for {out}, but all {record.videos} were skipped; the first because: "
            f"{next(iter(skipped.values()))}"
        )
    before = read_index(out)
    known = before.shards if before else {}
    kept = {name: entry for name, entry in known.items() if (out / name).exists() and name not in record.shards}
    kept.update((entry.name, entry) for entry in entries)
    videos = sum(len(entry.samples) for entry in entries)
    own = {**record.recipe, "videos": videos, "samples_per_shard": record.samples_per_shard, "skipped": skipped}
    write_index(out, kept.values(), {**(before.recipe if before else {}), record.prefix: own})
    frames = sum(result.frames for result in made)
    _write_record(out, replace(record, complete=True, skipped=skipped, frames=frames))
    return _report(out, entries, sum(result.kept for result in made), skipped, frames)


def _report(
    out: Path, entries: Sequence[ShardEntry], kept: int, skipped: Mapping[str, str], frames: int
) -> ConversionReport:
    paths = tuple(out / entry.name for entry in entries)
    videos, size = (sum(values) for values in zip(*((len(e.samples), e.size) for e in entries), strict=True))
    return ConversionReport(paths, videos, kept, dict(skipped), frames, size)
