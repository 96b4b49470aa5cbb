"""Features of one shard after the other: frames in equal batches through the backbone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssync_pl.data.features.codec import FeatureType, encode_features
from ssync_pl.data.features.projection import Projection
from ssync_pl.data.features.recipe import FeatureRecipe
from ssync_pl.data.index import ShardEntry
from ssync_pl.data.samples import SampleRules, eval_sample
from ssync_pl.data.shards import ShardReader
from ssync_pl.data.transforms import BatchTransform
from ssync_pl.errors import ShardError

if TYPE_CHECKING:
    from ssync_pl.hosts.nn.backbones import FrozenBackbone

__all__ = ["FeatureRun", "frames_of", "sample_features"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureRun:
    """What stays the same over all shards.

    Args:
        backbone: The backbone, on `device`.
        transform: Resizes, crops, flips and normalises frames.
        recipe: What is stored.
        rules: How videos are read.
        batch_size: Frames a call of the backbone.
        device: Where frames are transformed and the backbone runs.
        skip: Leave out videos that cannot be read, instead of raising.
        projection: Applied to the features before they are stored, on `device`.

    Example:
        >>> [name for name in FeatureRun.__dataclass_fields__ if name.startswith("b")]
        ['backbone', 'batch_size']
    """

    backbone: FrozenBackbone
    transform: BatchTransform
    recipe: FeatureRecipe
    rules: SampleRules
    batch_size: int
    device: torch.device
    skip: bool
    projection: Projection | None = None


def sample_features(
    path: str, entry: ShardEntry, run: FeatureRun, reader: ShardReader, skipped: dict[str, str]
) -> Iterator[tuple[str, list[dict[str, Tensor]]]]:
    """Compute the features of a shard's videos, in their order; videos share batches.

    Args:
        path: The shard.
        entry: Its index entry.
        run: What stays the same over all shards.
        reader: Reads the shard; used in a thread of its own.
        skipped: Filled with place → message of the videos that were left out.

    Yields:
        Key, and the encoded features of the frames and, with `flips`, of the mirrored frames, on CPU.

    Raises:
        ShardError: A video cannot be read, or its features are not finite.

    Example:
        >>> list(sample_features("a.tar", ShardEntry("a.tar", 0, ()), FeatureRun(*[None] * 7), ShardReader(), {}))
        []
    """
    batches = _Batches(run)
    waiting: list[tuple[str, int]] = []
    for key, sample in _ahead(_read_samples(path, entry, run, reader, skipped)):
        video = sample["video"]
        waiting.append((key, len(video)))
        for first in range(0, len(video), run.batch_size):
            piece = {"video": video[None, first : first + run.batch_size].to(run.device)}
            piece["crop"] = sample["crop"][None].to(run.device)
            for flip in range(1 + run.recipe.flips):
                batch = {**piece, "flip": torch.tensor([bool(flip)], device=run.device)}
                batches.add((key, flip), f"{path}, key {key}", run.transform(batch)["video"][0])
        yield from batches.finished(waiting)
    batches.flush()
    yield from batches.finished(waiting)


def frames_of(
    path: str, entry: ShardEntry, run: FeatureRun, reader: ShardReader, choose: Callable[[int], Sequence[int]]
) -> Iterator[Tensor]:
    """Read some frames of a shard's videos as the backbone sees them.

    Args:
        path: The shard.
        entry: Its index entry, with the samples to read.
        run: What stays the same over all shards.
        reader: Reads the shard.
        choose: From the number of frames of a video to the numbers of those wanted.

    Yields:
        (n, 3, H, W) normalised, a video each.

    Raises:
        ShardError: A video cannot be read.

    Example:
        >>> list(frames_of("a.tar", ShardEntry("a.tar", 0, ()), FeatureRun(*[None] * 7), ShardReader(), range))
        []
    """
    skipped: dict[str, str] = {}
    for _, sample in _read_samples(path, entry, run, reader, skipped):
        video = sample["video"]
        piece = {"video": video[None, list(choose(len(video)))], "crop": sample["crop"][None]}
        batch = {**piece, "flip": torch.tensor([False])}
        yield run.transform({name: value.to(run.device) for name, value in batch.items()})["video"][0]


def _read_samples(
    path: str, entry: ShardEntry, run: FeatureRun, reader: ShardReader, skipped: dict[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for sample in entry.samples:
        where = f"{path}, key {sample.key}"
        try:
            yield sample.key, eval_sample(reader.sample(path, entry, sample), run.rules)
        except ShardError as error:
            if not run.skip:
                raise
            skipped[where] = str(error)
            _logger.warning("Skipping a bad sample: %s", error)


def _ahead(items: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    # The next video is decoded while the backbone is busy with this one.
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


class _Batches:
    """Collects frames of many videos into equal batches and hands the features back to their videos."""

    def __init__(self, run: FeatureRun) -> None:
        self.run = run
        self.queue: list[tuple[tuple[str, int], str, Tensor]] = []
        self.waiting = 0
        self.done: dict[tuple[str, int], list[dict[str, Tensor]]] = {}

    def add(self, owner: tuple[str, int], where: str, frames: Tensor) -> None:
        self.queue.append((owner, where, frames))
        self.waiting += len(frames)
        while self.waiting >= self.run.batch_size:
            self._compute(self.run.batch_size)

    def flush(self) -> None:
        if self.waiting:
            self._compute(self.waiting)

    def finished(self, waiting: list[tuple[str, int]]) -> Iterator[tuple[str, list[dict[str, Tensor]]]]:
        while waiting:
            key, count = waiting[0]
            owners = [(key, flip) for flip in range(1 + self.run.recipe.flips)]
            if any(sum(len(part["features"]) for part in self.done.get(owner, [])) < count for owner in owners):
                return
            waiting.pop(0)
            yield key, [_join(self.done.pop(owner)) for owner in owners]

    def _compute(self, count: int) -> None:
        taken: list[tuple[tuple[str, int], str, Tensor]] = []
        left = count
        while left:
            owner, where, frames = self.queue.pop(0)
            if len(frames) > left:
                self.queue.insert(0, (owner, where, frames[left:]))
                frames = frames[:left]
            taken.append((owner, where, frames))
            left -= len(frames)
        self.waiting -= count
        features = self.run.backbone(torch.cat([frames for _, _, frames in taken])).features
        if self.run.projection is not None:
            features = self.run.projection(features)
        finite = bool(features.isfinite().all())
        encoded = {name: part.cpu() for name, part in encode_features(features, _kind(self.run.recipe)).items()}
        first = 0
        for owner, where, frames in taken:
            end = first + len(frames)
            if not finite and not bool(features[first:end].isfinite().all()):
                raise ShardError(
                    f"Expected backbone {self.run.backbone.name} to give finite features, but those of {where} hold "
                    "NaN or infinity. Check its weights and the video."
                )
            self.done.setdefault(owner, []).append({name: part[first:end] for name, part in encoded.items()})
            first = end


def _kind(recipe: FeatureRecipe) -> FeatureType:
    return "int8" if recipe.dtype == "int8" else "bf16"


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
