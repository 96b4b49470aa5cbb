"""The reading half of a stream: from a plan of positions to built clips, opening only the shards that hold any."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ssync_pl.data.index import INDEX_NAME, ShardEntry
from ssync_pl.data.patterns import shard_name
from ssync_pl.data.remote import RetryPolicy, masked_url
from ssync_pl.data.samples import SampleRules, eval_sample, train_sample
from ssync_pl.data.stream_plan import Take
from ssync_pl.data.stream_shard import is_wanted, stream_shard
from ssync_pl.errors import ShardError

__all__ = ["BadSample", "ClipBuilder", "Lane", "PassReader"]


class BadSample(NamedTuple):
    """A sample that cannot be used.

    Attributes:
        where: Shard and key.
        message: What is wrong.

    Example:
        >>> BadSample("a.tar, key 7", "too short").where
        'a.tar, key 7'
    """

    where: str
    message: str


Result = dict[str, Any] | BadSample


@dataclass(frozen=True)
class ClipBuilder:
    """Cuts samples from the members that a shard holds.

    Args:
        rules: How to cut.
        skip_bad: Return a `BadSample` instead of raising.

    Example:
        >>> ClipBuilder(SampleRules(), skip_bad=True).build("a.tar", "7", {"notes.txt": b""}, 0, 0).where
        'a.tar, key 7'
    """

    rules: SampleRules
    skip_bad: bool = False

    def build(self, url: str, key: str, members: dict[str, bytes], epoch: int, clip: int) -> Result:
        """Cut one sample.

        Args:
            url: Its shard.
            key: Its key.
            members: Its members.
            epoch: Number of the pass.
            clip: Number of the clip of this video in this pass.

        Returns:
            The sample, or why there is none.

        Raises:
            ShardError: The sample is bad, without `skip_bad`.
        """
        where = f"{masked_url(url)}, key {key}"
        try:
            if self.rules.training:
                name = f"{shard_name(url)}/{key}"
                built = train_sample(members, members.__getitem__, name, where, self.rules, epoch, clip)
            else:
                built = eval_sample(members, members.__getitem__, where, self.rules)
        except ShardError as error:
            if not self.skip_bad:
                raise
            return BadSample(where, str(error))
        return {**built, "__key__": key}


class PassReader:
    """The row of clips of one pass, of which any positions can be read in order.

    Args:
        urls: The shards.
        shards: Their index entries, in the same order.
        builder: Cuts the samples.
        clips_per_video: Clips of each video.
        plan: The pass.
        epoch: Its number.
        policy: Timeout and retries of remote shards.

    Example:
        >>> row = PassReader([], [], ClipBuilder(SampleRules()), 1, [], 0)
        >>> row.count, list(row.read(np.arange(0)))
        (0, [])
    """

    def __init__(
        self,
        urls: Sequence[str],
        shards: Sequence[ShardEntry],
        builder: ClipBuilder,
        clips_per_video: int,
        plan: Sequence[Take],
        epoch: int,
        policy: RetryPolicy | None = None,
    ) -> None:
        self.urls, self.shards, self.builder = urls, shards, builder
        self.clips_per_video, self.plan, self.epoch, self.policy = clips_per_video, plan, epoch, policy
        self._starts = np.cumsum([0, *(take.clips for take in plan)])
        self.count = int(self._starts[-1])

    def read(self, wanted: np.ndarray) -> Generator[tuple[int, Result], None, None]:
        """Build the clips at some positions.

        Args:
            wanted: Sorted positions in [0, `count`).

        Yields:
            Position and clip, in order.

        Raises:
            ShardError: A shard cannot be read or does not fit its entry; a sample is bad, without `skip_bad`.
        """
        lows = np.searchsorted(wanted, self._starts)
        for number in np.flatnonzero(np.diff(lows)).tolist():
            take = self.plan[number]
            begin = int(self._starts[number]) - take.first
            offsets = (wanted[lows[number] : lows[number + 1]] - begin).tolist()
            for offset, result in self._read_shard(take.shard, take.visit, offsets):
                yield begin + offset, result

    def _read_shard(self, number: int, visit: int, offsets: list[int]) -> Iterator[tuple[int, Result]]:
        url, shard, repeats = self.urls[number], self.shards[number], self.clips_per_video
        clips = {place: list(each) for place, each in itertools.groupby(offsets, lambda offset: offset // repeats)}
        last = max(clips)
        with contextlib.closing(self._in_index(url, shard)) as samples:
            for place, (key, members) in enumerate(samples):
                for offset in clips.get(place, ()):
                    clip = visit * repeats + offset % repeats
                    yield offset, self.builder.build(url, key, members, self.epoch, clip)
                # A shard that is wanted to its last sample is read to its end: only that says whether it was whole.
                if last <= place < len(shard.samples) - 1:
                    return

    def _in_index(self, url: str, shard: ShardEntry) -> Generator[tuple[str, dict[str, bytes]], None, None]:
        place = 0
        samples = shard.samples
        with contextlib.closing(stream_shard(url, size=shard.size or None, policy=self.policy)) as streamed:
            for key, members in itertools.chain(streamed, [("", {})]):
                # Samples without any video or mask never come out of the stream.
                while place < len(samples) and not any(is_wanted(f"k.{name}") for name in samples[place].members):
                    yield samples[place].key, dict.fromkeys(samples[place].members, b"")
                    place += 1
                if place < len(samples) and members and key == samples[place].key:
                    yield key, members
                    place += 1
        if place < len(samples):
            raise ShardError(
                f"Expected {masked_url(url)} to hold the {len(samples)} samples that `{INDEX_NAME}` names, but sample "
                f"{place + 1} (key {samples[place].key}) is missing. The shard and its index do not belong together: "
                "upload both again."
            )


class Lane:
    """What one worker still has to emit of a lane: read in the order of the row, taken in the order of emission.

    Args:
        row: The pass.
        begin: First position of the lane.
        wanted: Positions that will be taken, sorted, each once.

    Example:
        >>> lane = Lane(PassReader([], [], ClipBuilder(SampleRules()), 1, [], 0), 0, np.arange(0))
        >>> lane.finish()
    """

    def __init__(self, row: PassReader, begin: int, wanted: np.ndarray) -> None:
        self._row, self._begin = row, begin
        self._read = row.read(wanted)
        self._held: dict[int, Result] = {}
        self._last: tuple[int, Result] | None = None
        self._stand_in: dict[str, Any] | None = None

    def take(self, position: int) -> Result:
        """Hand out one clip, reading on as far as needed.

        Args:
            position: Its position. The last one may be taken again.

        Returns:
            The clip, or why there is none.
        """
        if self._last is None or self._last[0] != position:
            while position not in self._held:
                at, result = next(self._read)
                self._held[at] = result
            self._last = (position, self._held.pop(position))
        return self._last[1]

    def stand_in(self) -> dict[str, Any]:
        """Find the first readable clip from the start of the lane on: it hangs on nothing but the data.

        Returns:
            The clip.

        Raises:
            ShardError: There is none in the whole pass.
        """
        if self._stand_in is None:
            before, after = np.arange(self._begin), np.arange(self._begin, self._row.count)
            message = ""
            for _, result in itertools.chain(self._row.read(after), self._row.read(before)):
                if not isinstance(result, BadSample):
                    self._stand_in = result
                    return result
                message = result.message
            raise ShardError(
                f"Expected at least one readable sample, but all {self._row.count} failed; the last: {message}"
            )
        return self._stand_in

    def finish(self) -> None:
        """Read what is left of the last shard, which shows whether it is whole."""
        for _ in self._read:
            pass

    def close(self) -> None:
        """Stop reading."""
        self._read.close()
