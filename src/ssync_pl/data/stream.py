"""Streams of clips from shards that are read from start to end: a webdataset pipeline over fsspec.

    row of the pass → part of this rank and worker → samples of each shard → clips → shuffle buffer → batches

Which part each worker of each rank reads is arithmetic of `sampling`; nothing asks the environment.
"""

from __future__ import annotations

import contextlib
import logging
import random
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset import DataPipeline
from webdataset.filters import batched, shuffle

from ssync_pl.data.dataset import BAD_SAMPLES, Collate
from ssync_pl.data.decode import MAX_MEMBER_BYTES
from ssync_pl.data.index import ShardEntry
from ssync_pl.data.patterns import masked_url, shard_name
from ssync_pl.data.remote import stream_shard
from ssync_pl.data.samples import Members, SampleRules, eval_sample, train_sample
from ssync_pl.data.sampling import Take, consumer_row, mixed_row, plain_row, rank_clips
from ssync_pl.errors import ShardError

__all__ = ["ShardStream"]

_logger = logging.getLogger(__name__)


class _Clip(NamedTuple):
    """A clip to be cut: number of the shard, members, key, number of the clip of its video, whether it counts."""

    shard: int
    members: Members
    key: str
    number: int
    real: bool


class ShardStream(IterableDataset[dict[str, Any]]):
    """Batches of clips or videos of shards that are read from start to end, each by one worker of one rank.

    With index entries the split is exact: every rank emits equally many batches, and evaluation sees each video once,
    at any number of ranks and workers. Without an index the length is unknown, and only one process may read, whose
    workers share the shards out. Order and shuffling are functions of (seed, pass, rank, worker). A resumed pass goes
    on at the start of the shard that each worker was in.

    Args:
        urls: The shards: paths or URLs.
        shards: Their index entries, in the same order, or `None` when there is no index.
        rules: How samples are cut.
        batch_size: Clips per batch.
        rank: This process.
        world: Number of processes.
        clips_per_video: Clips of each video per pass, in training.
        skip_bad: Put a readable sample in place of one that cannot be decoded, instead of raising.
        shuffle_buffer: Clips that each worker holds back to be mixed, in training.
        mix: Shards and weight of each set, in the order of the shards; empty mixes nothing.
        max_bytes: Most bytes of a member, stored and decoded.

    Raises:
        ShardError: There are several processes but no index.
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
        mix: Sequence[tuple[int, float]] = (),
        max_bytes: int = MAX_MEMBER_BYTES,
    ) -> None:
        if shards is None and world > 1:
            raise ShardError(
                f"Expected `index.json` beside the remote shards ({masked_url(urls[0])}, …) to share them among "
                f"{world} processes, but there is none. Put the one that ShardWriter wrote there, or download the "
                "shards."
            )
        self.urls = list(urls)
        self.shards = None if shards is None else list(shards)
        self.rules = rules
        self.batch_size = batch_size
        self.rank, self.world = rank, world
        self.clips_per_video = clips_per_video if rules.training else 1
        self.skip_bad = skip_bad
        self.shuffle_buffer = shuffle_buffer if rules.training else 0
        self.mix = list(mix) if rules.training else []
        self.max_bytes = max_bytes
        # Shared memory, so that workers that outlive a pass see the next one: pass, first batch.
        self._state = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """Number of the next pass."""
        return int(self._state[0])

    @property
    def clips(self) -> int | None:
        """Clips of a pass on all ranks together, or `None` without an index."""
        return None if self.shards is None else sum(self._clips_per_shard())

    def set_pass(self, epoch: int, start: int = 0) -> None:
        """Set what the next iteration emits, for the workers that run and those to come."""
        if start:
            _logger.warning(
                "Going on in the middle of pass %d of a stream: each worker starts again at the shard that it was in, "
                "so in the rest of this pass some clips come twice and others not at all. The next pass is exact.",
                epoch,
            )
        self._state.copy_(torch.tensor([epoch, start]))

    def __len__(self) -> int:
        if self.shards is None:
            raise TypeError(
                "The length of remote shards is unknown without an index. Put `index.json` beside the shards, or set "
                "`max_steps` and `limit_train_batches`."
            )
        count = rank_clips(sum(self._clips_per_shard()), self.world, self.batch_size, pad=not self.rules.training)
        return -(-count // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        return self.emit(0, 1) if info is None else self.emit(info.id, info.num_workers)

    def emit(self, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        """Emit the batches of one of several workers; pass and start are those of this moment."""
        epoch, start = self._state.tolist()
        row = self._row(epoch)
        if self.shards is None:
            takes = row[worker::workers]
        else:
            pad = not self.rules.training
            takes = consumer_row(row, (self.rank, self.world), (worker, workers), self.batch_size, pad=pad, start=start)
        stages: list[Callable[..., Any]] = [
            partial(self._read, takes),
            partial(self._cut, row, epoch),
            batched(self.batch_size, collation_fn=Collate(self.rules), partial=not self.rules.training),
        ]
        if self.shuffle_buffer > 1:
            mixer = random.Random(f"{self.rules.seed}/{epoch}/{start}/{self.rank}/{worker}")
            stages.insert(2, shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=mixer))
        return iter(DataPipeline(*stages))

    def _clips_per_shard(self) -> list[int]:
        return [len(shard.samples) * self.clips_per_video for shard in self.shards or ()]

    def _row(self, epoch: int) -> list[Take]:
        seed = self.rules.seed if self.rules.training else None
        if self.shards is None:
            return plain_row([sys.maxsize] * len(self.urls), seed, epoch)
        counts = self._clips_per_shard()
        if self.mix:
            first, sets = 0, []
            for size, _ in self.mix:
                sets.append(counts[first : first + size])
                first += size
            return mixed_row(sets, [weight for _, weight in self.mix], self.rules.seed, epoch)
        rest = self.rules.training and sum(counts) % (self.world * self.batch_size) > 0
        return plain_row(counts, seed, epoch, rotate=rest)

    def _read(self, takes: Sequence[Take]) -> Generator[_Clip, None, None]:
        for take in takes:
            end, repeats = take.first + take.clips, self.clips_per_video
            samples = None if self.shards is None else self.shards[take.shard].samples
            url, place = self.urls[take.shard], -1
            with contextlib.closing(stream_shard(url, self.max_bytes)) as stream:
                for place, (key, members) in enumerate(stream):
                    if samples is not None and (place >= len(samples) or samples[place].key != key):
                        raise self._misfit(url, f"sample {place + 1} has key {key}")
                    for clip in range(max(place * repeats, take.first), min((place + 1) * repeats, end)):
                        yield _Clip(take.shard, members, key, take.visit * repeats + clip % repeats, take.real)
                    # A shard that is wanted to its last sample is read to its end: only that says if it was whole.
                    if samples is not None and (place + 1) * repeats >= end and place + 1 < len(samples):
                        break
            if samples is not None and (place + 1) * repeats < end:
                raise self._misfit(url, f"it ends after {place + 1}")

    def _cut(self, row: Sequence[Take], epoch: int, clips: Iterator[_Clip]) -> Iterator[dict[str, Any]]:
        waiting: list[list[tuple[str, str]]] = []  # what is said of bad clips that wait for a readable one
        last: dict[str, Any] | None = None
        for clip in clips:
            real, bad = clip.real, []
            try:
                last = self._build(clip, epoch)
            except ShardError as error:
                if not self.skip_bad:
                    raise
                real, bad = False, [(clip.members.where, str(error))] if clip.real else []
            if last is None:
                waiting.append(bad)
                continue
            for before in waiting:
                yield {**last, "real": False, BAD_SAMPLES: before}
            waiting = []
            yield {**last, "real": real, BAD_SAMPLES: bad}
        if waiting:
            stand_in = self._first_readable(row, epoch, waiting[0])
            for before in waiting:
                yield {**stand_in, "real": False, BAD_SAMPLES: before}

    def _build(self, clip: _Clip, epoch: int) -> dict[str, Any]:
        if self.rules.training:
            name = f"{shard_name(self.urls[clip.shard])}/{clip.key}"
            return {**train_sample(clip.members, name, self.rules, epoch, clip.number), "__key__": clip.key}
        return {**eval_sample(clip.members, self.rules), "__key__": clip.key}

    def _first_readable(self, row: Sequence[Take], epoch: int, bad: list[tuple[str, str]]) -> dict[str, Any]:
        for clip in self._read(row):
            with contextlib.suppress(ShardError):
                return self._build(clip, epoch)
        last = bad[0][1] if bad else ""
        raise ShardError(f"Expected at least one readable sample, but all failed; one of them: {last}")

    def _misfit(self, url: str, what: str) -> ShardError:
        return ShardError(
            f"Expected {masked_url(url)} to hold the samples that its index names, but {what}. The shard and its index "
            "do not belong together, or the shard is cut off: upload both again."
        )
