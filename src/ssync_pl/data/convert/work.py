"""The work of a conversion, one job a shard, in this process or in others."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ssync_pl.data.convert.plan import shard_name, write_skips
from ssync_pl.data.convert.verify import count_frames, verify_shard
from ssync_pl.data.index import ShardEntry
from ssync_pl.data.processes import end_with_parent, one_thread_each
from ssync_pl.data.shards import ShardWriter
from ssync_pl.errors import ShardError

__all__ = ["Job", "Result", "run_jobs"]

# Errors of the machine, not of one source file: skipping the sample would lose all the others too.
_MACHINE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_REFRESH = 0.5

_logger = logging.getLogger(__name__)


class Source(Protocol):
    """What a job needs to know of an item.

    Example:
        >>> Source.__annotations__["key"]
        'str'
    """

    key: str
    source: Any


@dataclass(frozen=True)
class Job:
    """One shard to be made, or to be read back when it is there.

    Args:
        number: Position of the shard.
        items: Its items.
        decode: Makes the members of an item.
        out: Folder of the shards.
        prefix: Start of their names.
        skipped: Key → reason of the items that an earlier run left out.
        redo: Make the shard even if it is there.
        skip: Leave bad items out instead of raising.

    Example:
        >>> Job(3, (), dict, Path("data"), "train").path.name
        'train-000003.tar'
    """

    number: int
    items: tuple[Any, ...]
    decode: Callable[[Any], Mapping[str, Any]]
    out: Path
    prefix: str
    skipped: Mapping[str, str] = field(default_factory=dict)
    redo: bool = False
    skip: bool = False

    @property
    def path(self) -> Path:
        """Final name of the shard."""
        return self.out / shard_name(self.prefix, self.number)


@dataclass(frozen=True)
class Result:
    """What became of a job.

    Args:
        entry: Index entry of the shard; None when every item was left out.
        frames: Frames of all videos.
        skipped: Key → reason.
        kept: The shard was there already.

    Example:
        >>> Result(None, 0, {"7": "no frames"}, kept=False).skipped
        {'7': 'no frames'}
    """

    entry: ShardEntry | None
    frames: int
    skipped: dict[str, str]
    kept: bool


def run_jobs(jobs: Sequence[Job], workers: int, title: str, progress: bool) -> list[Result]:
    """Do all jobs.

    Args:
        jobs: One a shard.
        workers: Processes; 0 works in this one.
        title: Name of the progress bar.
        progress: Show it.

    Returns:
        One result a job, in order.

    Raises:
        ShardError: An item is bad and is not to be skipped.
        OSError: The disk is full or refuses.

    Example:
        >>> run_jobs([], 0, "converting", progress=False)
        []
    """
    from tqdm import tqdm

    total = sum(len(job.items) for job in jobs)
    with tqdm(total=total, desc=title, unit="video", mininterval=_REFRESH, disable=not progress) as bar:
        if workers:
            return _in_processes(jobs, workers, bar)
        return [_do(job, bar.update, lambda: False) for job in jobs]


def _in_processes(jobs: Sequence[Job], workers: int, bar: Any) -> list[Result]:
    # spawn: forking a process that has threads (PyTorch, a logger) can hang
    context = multiprocessing.get_context("spawn")
    # Plain memory, one cell a job: a worker that dies cannot leave a lock behind.
    counts = context.RawArray("l", len(jobs))
    stop = context.RawValue("b", 0)
    with one_thread_each():
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(counts, stop))
        try:
            futures = [pool.submit(_do_in_worker, number, job) for number, job in enumerate(jobs)]
            waiting: set[Future[Result]] = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=_REFRESH, return_when=FIRST_EXCEPTION)
                bar.update(sum(counts) - bar.n)
                for future in done:
                    future.result()
            return [future.result() for future in futures]
        finally:
            stop.value = 1
            pool.shutdown(wait=True, cancel_futures=True)


_shared: dict[str, Any] = {}


def _start(counts: Any, stop: Any) -> None:
    end_with_parent()
    _shared.update(counts=counts, stop=stop)


def _do_in_worker(number: int, job: Job) -> Result:
    counts, stop = _shared["counts"], _shared["stop"]

    def tick() -> None:
        counts[number] += 1

    return _do(job, tick, lambda: bool(stop.value))


def _do(job: Job, tick: Callable[[], object], stopped: Callable[[], bool]) -> Result:
    kept = None if job.redo else _keep(job, tick)
    return kept or _make(job, tick, stopped)


def _keep(job: Job, tick: Callable[[], object]) -> Result | None:
    """Read a finished shard back; None when there is none or it is not what the plan says."""
    keys = [item.key for item in job.items if item.key not in job.skipped]
    if not keys:
        for _ in job.items:
            tick()
        return Result(None, 0, dict(job.skipped), kept=True)
    try:
        entry, frames = verify_shard(job.path, keys)
    except FileNotFoundError:
        return None
    except ShardError as error:
        _logger.warning("Making %s again: %s", job.path, error)
        return None
    for _ in job.items:
        tick()
    return Result(entry, frames, dict(job.skipped), kept=True)


def _make(job: Job, tick: Callable[[], object], stopped: Callable[[], bool]) -> Result:
    # the random part lets processes of several machines share a disk
    scratch = job.out / f".{job.prefix}-{job.number:06d}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    keys: list[str] = []
    skipped: dict[str, str] = {}
    try:
        scratch.mkdir()
        with ShardWriter(scratch, job.prefix, samples_per_shard=len(job.items) + 1) as writer:
            for item in job.items:
                if stopped():
                    raise InterruptedError(errno.EINTR, "the conversion was stopped", str(job.path))
                try:
                    members = _decode(job, item)
                    count_frames(members, f"{job.prefix}, key {item.key}")
                    writer.write(item.key, members)
                    keys.append(item.key)
                except ShardError as error:
                    if not job.skip:
                        raise
                    skipped[item.key] = str(error)
                tick()
        made = scratch / shard_name(job.prefix, 0)
        if not keys:
            write_skips(job.out, job.prefix, job.number, skipped)
            job.path.unlink(missing_ok=True)
            return Result(None, 0, skipped, kept=False)
        made = made.rename(scratch / job.path.name)
        entry, frames = verify_shard(made, keys)
        _flush(made)
        write_skips(job.out, job.prefix, job.number, skipped)
        os.replace(made, job.path)
        return Result(entry, frames, skipped, kept=False)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _decode(job: Job, item: Source) -> Mapping[str, Any]:
    try:
        return job.decode(item)
    except OSError as error:
        if error.errno in _MACHINE:
            raise
        raise ShardError(
            f"Expected the source of video {item.key} to be readable, but got {error}. Repair it, or leave such videos "
            "out with --on-bad-sample skip."
        ) from error


def _flush(path: Path) -> None:
    """Bring the content to the disk before the name: a power cut must not leave an empty file under it."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
