"""Features of one shard after the other: frames in equal batches through the backbone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

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
    from ssync_pl.data.features.backbones import FrozenBackbone

__all__ = ["FeatureRun", "frames_of", "in_batches", "sample_features"]

_logger = logging.getLogger(__name__)

_Sample = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class FeatureRun:
    """What stays the same over all shards; `skip` leaves out videos that cannot be read."""

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
    """Compute the features of a shard's videos, in their order; short videos share batches.

    `skipped` is filled with place → message of the videos that were left out. Yields key, and the encoded features of
    the frames and, with `flips`, of the mirrored frames, on CPU.
    """
    group: list[_Sample] = []
    samples = _ahead(_read_samples(path, entry, run, reader, skipped))
    for sample in samples:
        group.append(sample)
        if sum(len(held["video"]) for _, held in group) >= run.batch_size:
            yield from _encode_group(path, group, run)
            group = []
    if group:
        yield from _encode_group(path, group, run)


def frames_of(
    path: str, entry: ShardEntry, run: FeatureRun, reader: ShardReader, choose: Callable[[int], Sequence[int]]
) -> Iterator[Tensor]:
    """Read the frames that `choose` names by their number, as the backbone sees them: (n, 3, H, W) per video."""
    for _, sample in _read_samples(path, entry, run, reader, {}):
        yield _transform(sample, list(choose(len(sample["video"]))), False, run)


def in_batches(parts: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Cut a row of tensors anew into tensors of `size`, of which the last one may be shorter."""
    held: list[Tensor] = []
    for part in parts:
        for frame in part:
            held.append(frame)
            if len(held) == size:
                yield torch.stack(held)
                held = []
    if held:
        yield torch.stack(held)


def _encode_group(path: str, group: list[_Sample], run: FeatureRun) -> Iterator[tuple[str, list[dict[str, Tensor]]]]:
    counts = [len(sample["video"]) for _, sample in group]
    variants = []
    for flip in range(1 + run.recipe.flips):
        frames = (
            _transform(sample, range(first, min(first + run.batch_size, count)), bool(flip), run)
            for (_, sample), count in zip(group, counts, strict=True)
            for first in range(0, count, run.batch_size)
        )
        parts: list[dict[str, Tensor]] = []
        bad: list[Tensor] = []
        for batch in in_batches(frames, run.batch_size):
            features = run.backbone(batch).features
            features = features if run.projection is None else run.projection(features)
            bad.append(~features.isfinite().flatten(1).all(1).cpu())
            encoded = encode_features(features, cast(FeatureType, run.recipe.dtype))
            parts.append({name: part.cpu() for name, part in encoded.items()})
        for (key, _), wrong in zip(group, torch.cat(bad).split(counts), strict=True):
            if bool(wrong.any()):
                raise ShardError(
                    f"Expected backbone {run.backbone.name} to give finite features, but those of {path}, key {key} "
                    "hold NaN or infinity. Check its weights and the video."
                )
        joined = {name: torch.cat([part[name] for part in parts]).split(counts) for name in parts[0]}
        variants.append([{name: split[n] for name, split in joined.items()} for n in range(len(group))])
    for (key, _), *encodings in zip(group, *variants, strict=True):
        yield key, list(encodings)


def _transform(sample: dict[str, Any], numbers: Sequence[int], flip: bool, run: FeatureRun) -> Tensor:
    piece = {"video": sample["video"][None, list(numbers)], "crop": sample["crop"][None], "flip": torch.tensor([flip])}
    return run.transform({name: value.to(run.device) for name, value in piece.items()})["video"][0]


def _read_samples(
    path: str, entry: ShardEntry, run: FeatureRun, reader: ShardReader, skipped: dict[str, str]
) -> Iterator[_Sample]:
    for sample in entry.samples:
        where = f"{path}, key {sample.key}"
        try:
            yield sample.key, eval_sample(reader.sample(path, entry, sample), run.rules)
        except ShardError as error:
            if not run.skip:
                raise
            skipped[where] = str(error)
            _logger.warning("Skipping a bad sample: %s", error)


def _ahead(items: Iterator[_Sample]) -> Iterator[_Sample]:
    """Decode the next video while the backbone is busy with this one."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
