"""Parallel, resumable conversion of any source into shards."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ssync_pl.data.convert.locking import exclusive
from ssync_pl.data.convert.plan import (
    Plan,
    forget_skips,
    read_plan,
    read_skips,
    refuse_foreign_shards,
    write_plan,
)
from ssync_pl.data.convert.work import Job, Result, run_jobs
from ssync_pl.data.index import read_index, write_index
from ssync_pl.data.processes import cpu_count, may_start_processes
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["ConversionReport", "Decode", "Item", "convert"]

_VIDEOS_PER_WORKER = 16  # fewer are not worth the start of a process
_INDEX_TIMEOUT = 60.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One future sample; small, and it pickles.

    Args:
        key: Key of the sample: a decimal number, zero padded, such as `000017`.
        source: What `decode` needs to find the sample, as JSON values and paths. It is part of the plan: another
            source means another conversion. Paths relative to a root that only `decode` knows let the root move.

    Example:
        >>> Item("000017", ["clips/17.mp4", 0]).key
        '000017'
    """

    key: str
    source: Any


Decode = Callable[[Item], Mapping[str, Any]]
"""Makes the members of one sample, as `ShardWriter.write` takes them; it has to pickle (a function of a module, or a
frozen dataclass with `__call__`), and raises `ShardError` that names the source of a bad item."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote.

    Args:
        shards: Paths of all shards, in order.
        videos: Samples in them.
        kept: Shards that were there already.
        skipped: Key → reason of the items that were left out.
        frames: Frames of all videos.
        bytes: Size of all shards.

    Example:
        >>> ConversionReport((), videos=0, kept=0).skipped
        {}
    """

    shards: tuple[Path, ...]
    videos: int
    kept: int
    skipped: dict[str, str] = field(default_factory=dict)
    frames: int = 0
    bytes: int = 0


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
    """Convert items into the shards `<prefix>-000000.tar`, … and note them in the folder's `index.json`.

    Items are cut into shards by position. Each shard is made whole by one process, under a hidden name, read back
    (every member decodes, keys are as planned, videos and masks fit each other), and only then renamed. A run that was
    stopped or killed goes on where it was when the same call is made again; after the end, the same call returns at
    once. Equal items and settings give equal bytes, whatever the number of workers and the interruptions.

    With `on_bad_sample="skip"`, a shard in which every item is bad is not written, so its number is left out. A later
    call with `"raise"` tries the items that were left out again.

    The recipe lies in the index under the prefix: `read_index(out).recipe[prefix]`, with the number of `videos` and
    what was `skipped`.

    Args:
        items: The future samples, in order.
        decode: Makes the members of one.
        out: Folder of the shards; made when absent. Several prefixes may share it.
        prefix: Start of the shards' names.
        recipe: Settings that decide the samples, as JSON values; all that `decode` was made with belongs here.
        samples_per_shard: Items a shard.
        num_workers: Processes; 0 works in this one. None: one a CPU, but none for a handful of videos.
        on_bad_sample: `raise` stops at the first bad item, `skip` leaves it out, and logs, names and counts it.
        progress: Show a bar on standard error.

    Returns:
        What was written.

    Raises:
        ConfigError: An argument is out of range.
        ShardError: An item is bad, the folder holds shards of another conversion, another process works on the same
            shards, or the disk is full or refuses. Finished shards stay.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> def decode(item):
        ...     return {"video.npy": np.full((2, 8, 8, 3), item.source, np.uint8)}
        >>> items = [Item(f"{i:06d}", i) for i in range(3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = convert(items, decode, folder, "train", recipe={}, num_workers=0, progress=False)
        ...     report.shards[0].name, report.videos, report.frames
        ('train-000000.tar', 3, 6)
    """
    _check_arguments(items, prefix, samples_per_shard, num_workers, on_bad_sample)
    out = Path(out)
    plan = Plan.make(prefix, [(item.key, item.source) for item in items], samples_per_shard, recipe)
    parallel = num_workers != 0 and may_start_processes()
    retry = on_bad_sample == "raise"
    try:
        # Looked at before the lock is taken too: a complete set may lie on a disk that is read-only by now.
        done = _completed(out, plan, retry)
        if done is not None:
            return done
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out / f".{prefix}.lock"):
            done = _completed(out, plan, retry)
            if done is not None:
                return done
            before = read_plan(out, prefix)
            if before is None or plan.differences(before):
                forget_skips(out, prefix)
                write_plan(out, plan)
                before = plan
            _remove_leftovers(out, prefix)
            jobs = _jobs(items, decode, out, plan, read_skips(out, before), retry)
            workers = _worker_count(num_workers, len(items), len(jobs)) if parallel else 0
            results = run_jobs(jobs, workers, f"converting {prefix}", progress)
            return _finish(out, plan, results)
    except BlockingIOError as error:
        raise ShardError(
            f"Expected to be the only process that writes `{prefix}-*.tar` and the index in {out}, but another one "
            "does. Wait for it, or choose another folder with --out."
        ) from error
    except BrokenProcessPool as error:
        raise ShardError(
            f"Expected the worker processes to live until {out} is complete, but one ended early: memory ran out, or "
            "the main script lacks `if __name__ == '__main__':`. Run again with fewer workers: finished shards are "
            "kept."
        ) from error
    except OSError as error:
        raise ShardError(f"Expected to write shards to {out}, but got {error}. {_advice(error)}") from error


def _check_arguments(
    items: Sequence[Item], prefix: str, samples_per_shard: int, num_workers: int | None, on_bad_sample: str
) -> None:
    if not prefix or prefix.startswith(".") or any(character in prefix for character in "/\\{}*?[]"):
        raise ConfigError(f"Expected argument `prefix` to be a plain file name part, but got {prefix!r}.")
    if isinstance(samples_per_shard, bool) or not isinstance(samples_per_shard, int) or samples_per_shard < 1:
        raise ConfigError(f"Expected argument `samples_per_shard` to be at least 1, but got {samples_per_shard!r}.")
    if num_workers is not None and (isinstance(num_workers, bool) or num_workers < 0):
        raise ConfigError(f"Expected argument `num_workers` to be 0 or more, or None, but got {num_workers!r}.")
    if on_bad_sample not in ("raise", "skip"):
        raise ConfigError(f"Expected argument `on_bad_sample` to be 'raise' or 'skip', but got {on_bad_sample!r}.")
    if not items:
        raise ConfigError(f"Expected argument `items` to hold at least one video for `{prefix}`, but got none.")
    seen: set[str] = set()
    for item in items:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", item.key) or item.key.startswith("__"):
            raise ConfigError(f"Expected keys of letters, digits, `_` and `-`, but got {item.key!r}.")
        if item.key in seen:
            raise ConfigError(f"Expected each key once, but got {item.key!r} twice.")
        seen.add(item.key)


def _completed(out: Path, plan: Plan, retry: bool) -> ConversionReport | None:
    """Report a conversion that is complete, from the sizes alone; None when there is something to do."""
    before = read_plan(out, plan.prefix)
    refuse_foreign_shards(out, plan, before)
    if before is None or not before.complete or plan.differences(before) or (retry and before.skipped):
        return None
    index = read_index(out)
    if index is None or plan.prefix not in index.recipe:
        return None
    paths, size, videos = [], 0, 0
    for name in plan.shards:
        entry, path = index.shards.get(name), out / name
        if entry is None:
            continue
        if not path.is_file() or path.stat().st_size != entry.size:
            return None
        paths.append(path)
        size += entry.size
        videos += len(entry.samples)
    if videos != plan.videos - len(before.skipped):
        return None
    return ConversionReport(tuple(paths), videos, len(paths), dict(before.skipped), before.frames, size)


def _remove_leftovers(out: Path, prefix: str) -> None:
    """Remove what killed runs left; the lock says that nobody works on it."""
    name = re.escape(prefix)
    scratch = re.compile(rf"\.{name}-\d{{6,}}\.\d+-[0-9a-f]+\.tmp")
    halves = re.compile(rf"\.\.{name}(\.plan\.json|-\d{{6,}}\.tar\.skipped\.json)-\w+")
    for path in out.iterdir():
        if scratch.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif halves.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _jobs(
    items: Sequence[Item], decode: Decode, out: Path, plan: Plan, skipped: Mapping[str, str], retry: bool
) -> list[Job]:
    jobs = []
    for number in range(len(plan.shards)):
        part = tuple(items[number * plan.samples_per_shard : (number + 1) * plan.samples_per_shard])
        known = {item.key: skipped[item.key] for item in part if item.key in skipped}
        # A shard that lacks samples is made again when bad samples are not to be skipped any more.
        jobs.append(Job(number, part, decode, out, plan.prefix, known, redo=retry and bool(known), skip=not retry))
    return jobs


def _worker_count(wanted: int | None, videos: int, shards: int) -> int:
    if wanted is not None:
        return min(wanted, shards)
    count = min(cpu_count(), shards, videos // _VIDEOS_PER_WORKER)
    return count if count > 1 else 0


def _finish(out: Path, plan: Plan, results: Sequence[Result]) -> ConversionReport:
    skipped = {key: reason for result in results for key, reason in result.skipped.items()}
    entries = [result.entry for result in results if result.entry is not None]
    for key, reason in skipped.items():
        _logger.warning("Left out video %s: %s", key, reason)
    if not entries:
        raise ShardError(
            f"Expected at least one good video for {out}, but all {plan.videos} were skipped; the first because: "
            f"{next(iter(skipped.values()))}"
        )
    frames = sum(result.frames for result in results)
    videos = sum(len(entry.samples) for entry in entries)
    # Conversions of other prefixes may end at the same time.
    with exclusive(out / ".index.lock", timeout=_INDEX_TIMEOUT):
        before = read_index(out)
        known = before.shards if before else {}
        kept = {name: entry for name, entry in known.items() if (out / name).exists() and name not in plan.shards}
        kept.update((entry.name, entry) for entry in entries)
        own = {**plan.recipe, "videos": videos, "samples_per_shard": plan.samples_per_shard, "skipped": skipped}
        write_index(out, kept.values(), {**(before.recipe if before else {}), plan.prefix: own})
    write_plan(out, plan.finished(skipped, frames))
    forget_skips(out, plan.prefix)
    return ConversionReport(
        tuple(out / entry.name for entry in entries),
        videos,
        sum(result.kept for result in results),
        skipped,
        frames,
        sum(entry.size for entry in entries),
    )


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk is full: free some space and run the same command again; finished shards are kept."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "The folder cannot be written: choose another one with --out, or change its permissions."
    return "Run the same command again, finished shards are kept, or choose another folder with --out."
