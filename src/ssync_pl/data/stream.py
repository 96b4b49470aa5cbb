"""Batches of shards read from start to end, through webdataset: samples → cut → shuffle buffer → batches."""

import contextlib
import logging
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from webdataset import DataPipeline
from webdataset.filters import batched, shuffle

from ssync_pl.data.dataset import BAD_SAMPLES, ShardBatches, ShardSource, collate
from ssync_pl.data.patterns import masked_url, shard_name
from ssync_pl.data.remote import stream_shard
from ssync_pl.data.samples import Members, SampleRules
from ssync_pl.data.sampling import permutation, worker_part
from ssync_pl.errors import ShardError, require_shard

_logger = logging.getLogger(__name__)


_Clip = tuple[str, Callable[[], dict[str, Any]], bool]  # where it is from, how it is cut, whether it counts


class ShardStream(ShardBatches):
    """Batches of shards that are read from start to end; a resumed pass has the clips that were left, mixed anew."""

    by_shard = True

    def __init__(self, source: ShardSource, rules: SampleRules, shuffle_buffer: int = 64, **options: Any) -> None:
        super().__init__(source, rules, **options)
        self.shuffle_buffer = shuffle_buffer if rules.training else 0

    def set_pass(self, epoch: int, start: int = 0) -> None:
        """Sets what the next iteration emits, for the workers that run and those to come."""
        expected = f"`index.json` beside the remote shards ({masked_url(self.source.shards[0])}, …)"
        got = f"none, which {self.world} processes need to share them"
        advice = "Put the one that ShardWriter wrote there, or download the shards."
        require_shard(self.world == 1 or self.clips is not None, expected, got, advice=advice)
        if start:
            _logger.warning(
                "Going on in the middle of pass %d of a stream, whose shuffle buffers are lost: in the rest of this "
                "pass some clips come twice and others not at all. The next pass is exact.",
                epoch,
            )
        super().set_pass(epoch, start)

    def emit(self, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        """Emits the batches of one of several workers; pass and start are those of this moment."""
        epoch, start = self._state.tolist()
        stages: list[Any] = [partial(self._read_all, epoch, worker, workers), self._cut]
        if self.clips is not None:
            part = self.part(epoch)
            stages[0] = partial(self._read, worker_part(part, worker, workers, self.batch_size, start))
        if self.shuffle_buffer > 1:
            mixer = random.Random(f"{self.rules.seed}/{epoch}/{start}/{self.rank}/{worker}")
            stages.append(shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=mixer))
        whole = partial(collate, rules=self.rules)
        stages.append(batched(self.batch_size, collation_fn=whole, partial=not self.rules.training))
        return iter(DataPipeline(*stages))

    def _read(self, clips: np.ndarray) -> Iterator[_Clip]:
        """Opens the shards of these clips one after the other, and reads each as far as it is needed."""
        videos = clips % max(len(self.samples), 1)
        shards = self._shards[videos]
        breaks = np.flatnonzero((np.diff(shards) != 0) | (np.diff(videos) < 0)) + 1
        for run in np.split(clips, breaks) if len(clips) else ():
            wanted, shard = run.tolist(), int(self._shards[run[0] % len(self.samples)])
            first, end = np.searchsorted(self._shards, (shard, shard + 1)).tolist()
            url, video = self.source.shards[shard], first
            expected = f"{masked_url(url)} to hold the samples that its index names"
            advice = "The shard and its index do not belong together, or the shard is cut off: upload both again."
            with contextlib.closing(stream_shard(url, self.max_bytes)) as stream:
                for video, (key, members) in enumerate(stream, first):
                    named = video < end and self.samples[video][1].key == key
                    require_shard(named, expected, f"a sample with key {key} at place {video}", advice=advice)
                    while wanted and wanted[0] % len(self.samples) == video:
                        visit, repeat, _, real = self.place(wanted.pop(0))
                        yield self._clip(url, key, members, visit, repeat, real)
                    # A shard that is wanted to its last sample is read to its end: only that says if it was whole.
                    if not wanted and video + 1 < end:
                        break
            require_shard(not wanted, expected, f"an end after {video + 1 - first}", advice=advice)

    def _read_all(self, epoch: int, worker: int = 0, workers: int = 1) -> Iterator[_Clip]:
        """Reads every `workers`-th shard to its end."""
        count = len(self.source.shards)
        order = permutation(count, self.rules.seed, epoch) if self.rules.training else np.arange(count)
        for url in (self.source.shards[number] for number in order[worker::workers]):
            with contextlib.closing(stream_shard(url, self.max_bytes)) as stream:
                for key, members in stream:
                    yield from (self._clip(url, key, members, epoch, repeat) for repeat in range(self.clips_per_video))

    def _clip(self, url: str, key: str, members: Members, visit: int, repeat: int, real: bool = True) -> _Clip:
        return members.where, partial(self.cut, members, shard_name(url), key, visit, repeat), real

    def _cut(self, clips: Iterator[_Clip]) -> Iterator[dict[str, Any]]:
        """Cuts clips; the last good one, or the first of all shards, stands in for one that cannot be read."""
        good: dict[str, Any] | None = None
        for where, cut, real in clips:
            try:
                good = cut()
                yield {**good, "real": real, BAD_SAMPLES: []}
            except ShardError as error:
                if not self.skip_bad:
                    raise
                good = self._first_readable(str(error)) if good is None else good
                yield {**good, "real": False, BAD_SAMPLES: [(where, str(error))] if real else []}

    def _first_readable(self, message: str) -> dict[str, Any]:
        for _, cut, _ in self._read_all(int(self._state[0])):
            with contextlib.suppress(ShardError):
                return cut()
        raise ShardError(f"Expected at least one readable sample, but all failed; one of them: {message}")
