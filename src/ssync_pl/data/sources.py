"""The shards of one split: found, opened by a backend, and, where several sets are mixed, told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from ssync_pl.data.dataset import ShardDataset, split_short
from ssync_pl.data.index import SampleEntry, ShardEntry, load_shards, scan_packed
from ssync_pl.data.patterns import expand_shards, is_compressed, is_remote
from ssync_pl.data.samples import MaskFormat, SampleRules
from ssync_pl.data.sampling import shares_by_weight
from ssync_pl.data.stream_shard import fetch_index
from ssync_pl.errors import ConfigError, ShardError

if TYPE_CHECKING:
    from ssync_pl.data.features.store import FeatureStore

__all__ = ["Backend", "Patterns", "ShardSource", "find_shards", "open_source", "settle_masks"]

Backend = Literal["auto", "mmap", "webdataset"]
"""Who reads the shards; `auto` maps plain local tars into memory and streams all else."""

Patterns = str | list[str] | dict[str, float]
"""One pattern, several, or several with weights, which mixes them."""


@dataclass(frozen=True)
class ShardSource:
    """Opened shards of one split.

    Args:
        shards: Paths or URLs.
        entries: Their index entries in the same order, or `None` when remote shards have no index.
        mapped: Whether they are read through memory maps rather than streamed.
        sizes: Shards of each mixed set, in order; one number when nothing is mixed.
        weights: Weight of each mixed set; empty when nothing is mixed.

    Example:
        >>> entry = ShardEntry("a.tar", 0, (SampleEntry("7", {}),))
        >>> ShardSource(["a.tar"], [entry], True, (1,)).videos
        1
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

    def videos_by_set(self) -> list[int]:
        """Count the videos of each mixed set.

        Returns:
            Number of videos, one a set.
        """
        return [sum(clips) for clips in self.clips_by_shard(1)]

    def clips_by_shard(self, clips_per_video: int) -> list[list[int]]:
        """Count the clips of each shard of each mixed set.

        Args:
            clips_per_video: Clips of each video a pass.

        Returns:
            For each set the clips of its shards.
        """
        counts = [len(entry.samples) * clips_per_video for entry in self.entries or []]
        ends = np.cumsum(self.sizes)
        return [counts[end - size : end] for end, size in zip(ends, self.sizes, strict=True)]

    def without_short(self, clip_length: int, frame_stride: int) -> tuple[ShardSource, list[tuple[str, SampleEntry]]]:
        """Take out the videos that are known to be shorter than a clip.

        Args:
            clip_length: Frames of a clip.
            frame_stride: Distance between them.

        Returns:
            The source without them, and them with their shards.
        """
        short: list[tuple[str, SampleEntry]] = []
        kept: list[ShardEntry] = []
        for shard, entry in zip(self.shards, self.entries or [], strict=self.entries is not None):
            rest, gone = split_short(entry, clip_length, frame_stride)
            kept.append(rest)
            short += [(shard, sample) for sample in gone]
        return replace(self, entries=None if self.entries is None else kept), short

    def map(
        self, rules: SampleRules, clips_per_video: int, skip_bad: bool, features: FeatureStore | None = None
    ) -> ShardDataset:
        """Build the map-style set over these shards.

        Args:
            rules: How samples are cut.
            clips_per_video: Clips of each video a pass, in training.
            skip_bad: Put the next good sample in place of one that cannot be read, instead of raising.
            features: Cached features of the same shards.

        Returns:
            The set.
        """
        return ShardDataset(self.shards, self.entries or [], rules, clips_per_video, skip_bad, features)

    def mix(self, clips_per_video: int) -> list[tuple[np.ndarray, float]]:
        """Tell the clips of the mixed sets apart, for `TrainSampler`.

        Args:
            clips_per_video: Clips of each video a pass.

        Returns:
            For each set the numbers of its clips and its weight; empty when nothing is mixed.

        Raises:
            ConfigError: A weight is so small that its set would never be read, or a set is empty.
        """
        if not self.weights:
            return []
        videos = self.videos_by_set()
        total = sum(videos)
        first = np.cumsum([0, *videos])
        members = [
            (np.arange(start, start + count) + total * np.arange(clips_per_video)[:, None]).ravel()
            for start, count in zip(first, videos, strict=False)
        ]
        shares = shares_by_weight(total * clips_per_video, self.weights)
        for number, (share, count) in enumerate(zip(shares, videos, strict=True)):
            if share == 0 or count == 0:
                raise ConfigError(
                    f"Expected every mixed set to give at least one clip a pass, but set {number + 1} of "
                    f"{len(videos)} (weight {self.weights[number]}, {count} videos) gives {min(share, count)}. Raise "
                    "its weight, or leave it out."
                )
        return list(zip(members, self.weights, strict=True))


def find_shards(patterns: Patterns, argument: str) -> tuple[list[str], tuple[int, ...], tuple[float, ...]]:
    """Expand what the user wrote.

    Args:
        patterns: A pattern, several, or several with weights.
        argument: Name of the user's argument, for messages.

    Returns:
        All shards; how many of them belong to each mixed set; the weights, empty when nothing is mixed.

    Raises:
        ConfigError: A pattern is malformed, a shard comes twice, or a weight is not positive.

    Example:
        >>> find_shards({"https://host/a-{0..1}.tar": 3.0, "https://host/b.tar": 1.0}, "train")[1:]
        ((2, 1), (3.0, 1.0))
    """
    if not isinstance(patterns, Mapping):
        shards = expand_shards(patterns, argument)
        return shards, (len(shards),), ()
    if not patterns:
        raise ConfigError(f"Expected argument `{argument}` to name at least one set, but got none.")
    weights = tuple(float(weight) for weight in patterns.values())
    shares_by_weight(1, weights)
    sets = [expand_shards(pattern, argument) for pattern in patterns]
    # Expanded once more as a whole: a shard of two sets, or local beside remote shards, is refused there.
    return expand_shards(list(patterns), argument), tuple(len(shards) for shards in sets), weights


def open_source(patterns: Patterns, argument: str, backend: Backend = "auto") -> ShardSource:
    """Find the shards of a split and their index.

    Args:
        patterns: A pattern, several, or several with weights.
        argument: Name of the user's argument, for messages.
        backend: Who reads the shards.

    Returns:
        The opened shards.

    Raises:
        ConfigError: A pattern is malformed, or `backend` is `mmap` for shards that cannot be mapped.
        ShardError: A shard is damaged or empty.

    Example:
        >>> open_source("pipe:cat a.tar", "train")
        Traceback (most recent call last):
        ssync_pl.errors.ConfigError: Expected argument `train` to be paths or URLs, but got the shell command ...
    """
    shards, sizes, weights = find_shards(patterns, argument)
    remote = is_remote(shards[0])
    packed = [shard for shard in shards if is_compressed(shard)]
    if backend == "mmap" and (remote or packed):
        raise ConfigError(
            f"Expected argument `{argument}` to be plain local tars for backend='mmap', but got "
            f"{packed[0] if packed else shards[0]}. Take backend='webdataset', or copy and unpack the shards."
        )
    if remote:
        entries = fetch_index(shards)
    elif packed:
        entries = [scan_packed(shard) for shard in shards]
    else:
        entries = load_shards(shards)
    mapped = not remote and not packed and backend != "webdataset"
    if weights and entries is None:
        raise ShardError(
            f"Expected `index.json` beside the remote shards of `{argument}` to mix them by weight, but there is none. "
            "Put the one that `ssync-pl data check` writes there, or download the shards."
        )
    if entries is not None and not any(entry.samples for entry in entries):
        raise ShardError(f"Expected at least one sample in the shards of `{argument}`, but got none in {shards[0]}.")
    return ShardSource(shards, entries, mapped, sizes, weights)


def settle_masks(dataset: ShardDataset, argument: str, mask_format: Literal["auto", "ids", "channels"]) -> None:
    """Find out how a set's masks are stored and how many objects they hold, where the rules leave that open.

    Args:
        dataset: The set; its rules are replaced.
        argument: Name of the user's argument, for messages.
        mask_format: How the masks are stored; `auto` looks: several channels anywhere mean one an object.

    Raises:
        ShardError: Masks are unreadable and bad samples are not skipped, or ids do not fit into uint8.
    """
    found: MaskFormat
    if mask_format == "auto":
        found = "channels" if _most(dataset, dataset.mask_channels) > 1 else "ids"
    else:
        found = mask_format
    limit = dataset.rules.max_objects
    if limit is None:
        limit = max(_most(dataset, partial(dataset.count_objects, mask_format=found)), 1)
    if found == "ids" and limit > 255:
        raise ShardError(
            f"Expected object ids of 255 at most in the masks of `{argument}`, but the largest is {limit}: ids leave "
            "the workers as uint8. Renumber them from 1 in each video."
        )
    dataset.rules = replace(dataset.rules, mask_format=found, max_objects=limit)


def _most(dataset: ShardDataset, look: Callable[[int], int]) -> int:
    most = 0
    for video in range(len(dataset.samples)):
        try:
            most = max(most, look(video))
        except ShardError:
            if not dataset.skip_bad:
                raise
    return most
