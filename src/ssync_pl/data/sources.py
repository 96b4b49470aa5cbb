"""The shards of one split: found, indexed, and, where several sets are mixed, told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ssync_pl.data.dataset import ShardDataset
from ssync_pl.data.index import SampleEntry, ShardEntry, load_shards, scan_shard
from ssync_pl.data.patterns import Patterns, find_shards, is_compressed, is_remote
from ssync_pl.data.remote import fetch_index
from ssync_pl.data.samples import MaskFormat, clip_span, count_objects, mask_channels
from ssync_pl.data.sampling import shares_by_weight
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["Backend", "ShardSource", "open_source", "settle_masks"]

Backend = Literal["auto", "mmap", "webdataset"]
"""Who reads the shards; `auto` reads plain local tars in place and streams all else."""


@dataclass(frozen=True)
class ShardSource:
    """Opened shards of one split.

    Args:
        shards: Paths or URLs.
        entries: Their index entries in the same order, or `None` when remote shards have no index.
        mapped: Whether they are read in place rather than streamed.
        sizes: Shards of each mixed set, in order; one number when nothing is mixed.
        weights: Weight of each mixed set; empty when nothing is mixed.
    """

    shards: list[str]
    entries: list[ShardEntry] | None
    mapped: bool
    sizes: tuple[int, ...]
    weights: tuple[float, ...] = ()

    @property
    def videos(self) -> int | None:
        """Number of videos, or `None` when it is unknown."""
        return None if self.entries is None else sum(len(entry.samples) for entry in self.entries)

    def without_short(self, clip_length: int, frame_stride: int) -> tuple[ShardSource, list[tuple[str, SampleEntry]]]:
        """Return the source without videos that are known to be shorter than a clip, and them with their shards."""
        span = clip_span(clip_length, frame_stride)
        short: list[tuple[str, SampleEntry]] = []
        kept: list[ShardEntry] = []
        for shard, entry in zip(self.shards, self.entries or [], strict=self.entries is not None):
            gone = [sample for sample in entry.samples if sample.frames is not None and sample.frames < span]
            short += [(shard, sample) for sample in gone]
            kept.append(replace(entry, samples=tuple(sample for sample in entry.samples if sample not in gone)))
        return replace(self, entries=None if self.entries is None else kept), short

    def mix(self, clips_per_video: int) -> list[tuple[np.ndarray, float]]:
        """Return the numbers of the clips and the weight of each mixed set; empty when nothing is mixed."""
        if not self.weights:
            return []
        counts = [len(entry.samples) for entry in self.entries or []]
        ends = np.cumsum(self.sizes).tolist()
        videos = [sum(counts[end - size : end]) for end, size in zip(ends, self.sizes, strict=True)]
        total = sum(videos)
        for number, (share, count) in enumerate(
            zip(shares_by_weight(total * clips_per_video, self.weights), videos, strict=True)
        ):
            if share == 0 or count == 0:
                raise ConfigError(
                    f"Expected every mixed set to give at least one clip per pass, but set {number + 1} of "
                    f"{len(videos)} (weight {self.weights[number]}, {count} videos) gives {min(share, count)}. Raise "
                    "its weight, or leave it out."
                )
        visits = total * np.arange(clips_per_video)[:, None]
        firsts = np.cumsum([0, *videos]).tolist()
        return [
            ((np.arange(first, first + count) + visits).ravel(), weight)
            for first, count, weight in zip(firsts, videos, self.weights, strict=False)
        ]


def open_source(
    patterns: Patterns, argument: str, backend: Backend = "auto", *, allow_pipe: bool = False
) -> ShardSource:
    """Find the shards of a split and their index."""
    shards, sizes, weights = find_shards(patterns, argument, allow_pipe=allow_pipe)
    remote = is_remote(shards[0])
    packed = [shard for shard in shards if is_compressed(shard)]
    if backend == "mmap" and (remote or packed):
        raise ConfigError(
            f"Expected argument `{argument}` to be plain local tars for backend='mmap', but got "
            f"{packed[0] if packed else shards[0]}. Take backend='webdataset', or copy and unpack the shards."
        )
    entries: list[ShardEntry] | None
    if remote:
        entries = fetch_index(shards)
    elif packed:
        entries = [scan_shard(shard, packed=is_compressed(shard)) for shard in shards]
    else:
        entries = load_shards(shards)
    if weights and entries is None:
        raise ShardError(
            f"Expected `index.json` beside the remote shards of `{argument}` to mix them by weight, but there is none. "
            "Put the one that `ssync-pl data check` writes there, or download the shards."
        )
    if entries is not None and not any(entry.samples for entry in entries):
        raise ShardError(f"Expected at least one sample in the shards of `{argument}`, but got none in {shards[0]}.")
    return ShardSource(shards, entries, not remote and not packed and backend != "webdataset", sizes, weights)


def settle_masks(dataset: ShardDataset, argument: str, mask_format: Literal["auto", "ids", "channels"]) -> None:
    """Find out how a set's masks are stored and how many objects they hold, where the rules leave that open."""

    def most(look: Callable[[int], int]) -> int:
        found = 0
        for video in range(len(dataset.samples)):
            try:
                found = max(found, look(video))
            except ShardError:
                if not dataset.skip_bad:
                    raise
        return found

    stored: MaskFormat
    if mask_format == "auto":
        stored = "channels" if most(lambda video: mask_channels(dataset.members(video))) > 1 else "ids"
    else:
        stored = mask_format
    limit = dataset.rules.max_objects
    if limit is None:
        limit = max(most(lambda video: count_objects(dataset.members(video), stored)), 1)
    if stored == "ids" and limit > 255:
        raise ShardError(
            f"Expected object ids of 255 at most in the masks of `{argument}`, but the largest is {limit}: ids leave "
            "the workers as uint8. Renumber them from 1 in each video."
        )
    dataset.rules = replace(dataset.rules, mask_format=stored, max_objects=limit)
