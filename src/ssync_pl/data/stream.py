"""Streaming data set over local or remote shards, read through webdataset, decoded by our allow-list.

The batches of a rank are fixed by (seed, pass, rank, world, lanes) alone: `stream_plan` says which clips they hold, and
each worker reads, of the lanes that its batches come from, what it has to emit.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ssync_pl.data.dataset import BAD_SAMPLES
from ssync_pl.data.index import INDEX_NAME, ShardEntry
from ssync_pl.data.remote import RetryPolicy, masked_url
from ssync_pl.data.samples import SampleRules
from ssync_pl.data.sampling import contiguous_share
from ssync_pl.data.stream_lanes import BadSample, ClipBuilder, Lane, PassReader
from ssync_pl.data.stream_plan import (
    Take,
    batch_order,
    lane_bounds,
    mixed_order,
    plain_shard_plan,
    worker_batches,
)
from ssync_pl.data.stream_shard import fetch_index, stream_shard
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["ShardStream", "fetch_index", "stream_shard"]

_logger = logging.getLogger(__name__)


class ShardStream(IterableDataset[dict[str, Any]]):
    """Clips or videos of shards that are read from start to end, each by the rank and worker that it belongs to.

    With index entries the split is exact, every rank emits equally many samples, and batch k is the same for every
    number of workers, in a whole pass and in one that goes on at batch `start`; what was emitted before is neither
    decoded nor kept then, and shards without anything left are not opened. Without an index the length is
    unknown: only one process may read, its first worker makes all batches, and going on reads from the start again.

    Args:
        urls: The shards: paths or URLs.
        shards: Their index entries, in the same order, or `None` when there is no `index.json`. Samples that an entry
            does not name are passed over.
        rules: How samples are cut.
        batch_size: Samples a batch, of the loader as well: workers emit whole batches.
        rank: This process.
        world: Number of processes.
        clips_per_video: Clips of each video a pass, in training.
        skip_bad: Put a readable sample in place of one that cannot be decoded, instead of raising: the one before it in
            the batch, or the next one, or, where the batch has none, the first readable one of the lane.
        shuffle_buffer: Clips held back to be mixed, a lane, in training. The order of the shards is shuffled as well.
        lanes: Parts that are read at the same time, in turns: as many as there are workers, or a multiple. Batches
            depend on it, so a resumed run has to keep it.
        takes: Plan of a pass by its number, for training; see `mixed_shard_plan`. Clip c of a video at visit v is drawn
            as number v · clips_per_video + c. `None` takes every shard once. It must pickle where workers are spawned.
        policy: Timeout and retries of remote shards.

    Raises:
        ConfigError: A setting is out of range, or `takes` comes without an index or in evaluation.
        ShardError: There are several processes but no index.

    Example:
        >>> len(ShardStream([], [], SampleRules(clip_length=2), batch_size=2))
        0
    """

    def __init__(
        self,
        urls: Sequence[str],
        shards: Sequence[ShardEntry] | None,
        rules: SampleRules,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        clips_per_video: int = 1,
        skip_bad: bool = False,
        shuffle_buffer: int = 64,
        lanes: int = 1,
        takes: Callable[[int], Sequence[Take]] | None = None,
        policy: RetryPolicy | None = None,
    ) -> None:
        if shards is None and world > 1:
            raise ShardError(
                f"Expected `{INDEX_NAME}` beside the remote shards ({masked_url(urls[0])}, …) to share them among "
                f"{world} processes, but there is none. Put the one that ShardWriter wrote there, or download the "
                "shards."
            )
        if takes is not None and (shards is None or not rules.training):
            raise ConfigError(
                f"Expected argument `takes` only for training with `{INDEX_NAME}`, but got it "
                f"{'without an index' if shards is None else 'for evaluation'}. Leave it out, or write the index."
            )
        if shards is not None and len(shards) != len(urls) and urls:
            raise ConfigError(f"Expected one index entry for each of {len(urls)} shards, but got {len(shards)}.")
        for name, value in (("batch_size", batch_size), ("lanes", lanes)):
            if value < 1:
                raise ConfigError(f"Expected argument `{name}` to be at least 1, but got {value}.")
        self.urls = list(urls)
        self.shards = None if shards is None else list(shards)
        self.rules = rules
        self.batch_size = batch_size
        self.rank, self.world = rank, world
        self.clips_per_video = clips_per_video if rules.training else 1
        self.skip_bad = skip_bad
        self.shuffle_buffer = shuffle_buffer if rules.training else 0
        self.takes = takes
        self.policy = policy
        # Shared memory, so that workers that outlive a pass see the next one: pass, first batch, lanes.
        self._state = torch.tensor([0, 0, lanes], dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """Number of the next pass."""
        return int(self._state[0])

    @property
    def start(self) -> int:
        """First batch of the next pass."""
        return int(self._state[1])

    @property
    def lanes(self) -> int:
        """Parts of the rank's share that take turns."""
        return int(self._state[2])

    @property
    def clips_per_shard(self) -> list[int]:
        """Clips of each shard a pass: what `mixed_shard_plan` asks for; empty without an index."""
        return [len(shard.samples) * self.clips_per_video for shard in self.shards or ()]

    @property
    def clips(self) -> int | None:
        """Clips of a pass on all ranks together, or `None` without an index."""
        return None if self.shards is None else sum(self.clips_per_shard)

    def set_pass(self, epoch: int, start: int = 0, lanes: int | None = None) -> None:
        """Set what the next iteration emits, for the workers that run and those to come.

        Args:
            epoch: Number of the pass, from 0.
            start: Batches of this rank to leave out, which a resumed run has had already.
            lanes: Number of lanes, when a resumed run had another; `None` keeps it.

        Raises:
            ConfigError: A number is out of range.
        """
        new = {"epoch": epoch, "start": start, "lanes": self.lanes if lanes is None else lanes}
        for (name, value), least in zip(new.items(), (0, 0, 1), strict=True):
            if value < least:
                raise ConfigError(f"Expected argument `{name}` to be at least {least}, but got {value}.")
        self._state.copy_(torch.tensor(list(new.values())))

    def __len__(self) -> int:
        if self.shards is None:
            raise TypeError(
                f"The length of remote shards is unknown without `{INDEX_NAME}`. Put it beside the shards, or set "
                "`max_steps` and `limit_train_batches`."
            )
        first, end = self._share(sum(take.clips for take in self._plan(self.epoch)))
        return end - first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        return self.emit(0, 1) if info is None else self.emit(info.id, info.num_workers)

    def emit(self, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        """Emit what one of several workers has to; pass and start are those of this moment.

        Args:
            worker: Number of the worker.
            workers: Number of workers.

        Returns:
            Samples, in whole batches: those of batch `start + worker`, then every `workers`-th.

        Example:
            >>> list(ShardStream([], [], SampleRules(), batch_size=2).emit(1, 2))
            []
        """
        epoch, start, lanes = self._state.tolist()
        if self.shards is not None:
            plan = self._plan(epoch)
            row = PassReader(self.urls, self.shards, self._builder, self.clips_per_video, plan, epoch, self.policy)
            return self._emit(row, lanes, worker, workers, start)
        if worker:
            return iter(())
        if workers > 1:
            _logger.warning(
                "Only one of %d workers reads %s, …: without `%s` nobody knows how to share the shards exactly.",
                workers,
                masked_url(self.urls[0]),
                INDEX_NAME,
            )
        samples = self._without_index(epoch)
        if self.shuffle_buffer > 1:
            samples = _mix(samples, self.shuffle_buffer, f"{self.rules.seed}/{epoch}")
        return itertools.islice(samples, start * self.batch_size, None)

    @property
    def _shard_seed(self) -> int | None:
        return self.rules.seed if self.rules.training else None

    @property
    def _builder(self) -> ClipBuilder:
        return ClipBuilder(self.rules, self.skip_bad)

    def _plan(self, epoch: int) -> Sequence[Take]:
        counts = self.clips_per_shard
        if self.takes is None:
            rest = self.rules.training and sum(counts) % (self.world * self.batch_size) > 0
            return plain_shard_plan(counts, self._shard_seed, epoch, rotate=rest)
        plan = [Take(*take) for take in self.takes(epoch)]
        for shard, visit, clips, first in plan:
            if not (0 <= shard < len(counts) and visit >= 0 <= first < first + clips <= counts[shard]):
                raise ConfigError(
                    f"Expected argument `takes` to plan shards in [0, {len(counts)}) and at most their clips, but got "
                    f"{(shard, visit, clips, first)}. Plan with `mixed_shard_plan` and `clips_per_shard`."
                )
        return plan

    def _share(self, count: int) -> tuple[int, int]:
        first, end = contiguous_share(count, self.rank, self.world, pad=not self.rules.training)
        return (first, end - (end - first) % self.batch_size) if self.rules.training else (first, end)

    def _emit(self, row: PassReader, lanes: int, worker: int, workers: int, start: int) -> Iterator[dict[str, Any]]:
        first, end = self._share(row.count)
        size = self.batch_size
        order = batch_order(-(-(end - first) // size), lanes)
        mine = order[worker_batches(len(order), worker, workers, start)]
        bounds = lane_bounds(first, end, size, lanes)
        emission: dict[int, np.ndarray] = {}
        opened: dict[int, Lane] = {}
        for lane in sorted(set(mine[:, 0].tolist())):
            begin, stop = bounds[lane]
            text = f"{self.rules.seed}/{row.epoch}/{self.rank}/{lane}"
            emission[lane] = begin + mixed_order(stop - begin, self.shuffle_buffer, text)
            wanted = [emission[lane][number * size : (number + 1) * size] for number in mine[mine[:, 0] == lane, 1]]
            # Padding repeats the last video; a rank with nothing but padding reads that one.
            opened[lane] = Lane(row, begin, np.unique(np.minimum(np.concatenate(wanted), row.count - 1)))
        with contextlib.ExitStack() as stack:
            for each in opened.values():
                stack.callback(each.close)
            for lane, number in mine.tolist():
                positions = emission[lane][number * size : (number + 1) * size].tolist()
                results = [opened[lane].take(min(position, row.count - 1)) for position in positions]
                previous = next((result for result in results if not isinstance(result, BadSample)), None)
                for position, result in zip(positions, results, strict=True):
                    real = position < row.count
                    if isinstance(result, BadSample):
                        previous = opened[lane].stand_in() if previous is None else previous
                        yield {**previous, "real": False, BAD_SAMPLES: [tuple(result)] if real else []}
                    else:
                        previous = result
                        yield {**result, "real": real, BAD_SAMPLES: []}
            for each in opened.values():
                each.finish()

    def _without_index(self, epoch: int) -> Iterator[dict[str, Any]]:
        owed = 0
        bad: list[tuple[str, str]] = []
        last: dict[str, Any] | None = None
        for number, *_ in plain_shard_plan([0] * len(self.urls), self._shard_seed, epoch):
            url = self.urls[number]
            for key, members in stream_shard(url, policy=self.policy):
                for clip in range(self.clips_per_video):
                    result = self._builder.build(url, key, members, epoch, clip)
                    if isinstance(result, BadSample):
                        bad.append((result.where, result.message))
                        owed += last is None
                        if last is not None:
                            yield {**last, "real": False, BAD_SAMPLES: bad}
                            bad = []
                        continue
                    last = result
                    yield {**last, "real": True, BAD_SAMPLES: bad}
                    bad = []
                    for _ in range(owed):
                        yield {**last, "real": False, BAD_SAMPLES: []}
                    owed = 0
        if owed:
            raise ShardError(f"Expected at least one readable sample, but all {owed} failed; the last: {bad[-1][1]}")


def _mix(samples: Iterator[dict[str, Any]], size: int, seed_text: str) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed_text).random
    held: list[dict[str, Any]] = []
    for sample in samples:
        held.append(sample)
        if len(held) > size:
            yield held.pop(int(draw() * len(held)))
    while held:
        yield held.pop(int(draw() * len(held)))
