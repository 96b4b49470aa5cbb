"""What a model must beat: partitions without any learning, scored as a model is.

A fixed grid of rectangles already reaches a fair FG-ARI, since an object mostly lies in one cell. A score means
something only beside these rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.evaluation import frame_validity
from ssync_pl.metrics import SegmentationMetrics
from ssync_pl.tools.kmeans import kmeans
from ssync_pl.tools.owned import read_owned_json, write_owned_json

__all__ = ["BASELINES_VERSION", "Rows", "cached_baselines", "grid_partition", "score_baselines"]

BASELINES_VERSION = 1
"""Raised whenever the same videos would get other scores, so that kept ones are computed anew."""

_KMEANS_SIZE = 128  # larger frames are averaged down to this longer side, to bound time and memory

Rows = dict[str, dict[str, float]]
"""Scores by name, by row of a table."""


def score_baselines(
    batches: Iterable[Mapping[str, Any]], num_slots: int, has_background: bool, ignore_overlaps: bool = False
) -> Rows:
    """Scores the grid and k-means on RGB with the same metrics and the same number of parts as a model.

    Args:
        batches: dicts with `video` `(B, T, 3, H, W)` (normalised or not), `segmentations` bool `(B, T, C, H, W)` and,
            where there is padding, `batch_padding_mask` `(B,)` and `frame_mask` `(B, T)`, True = real.
        num_slots: number of cells and clusters.
        has_background: channel 0 of `segmentations` is the background.
        ignore_overlaps: leave out pixels with several true masks instead of refusing them.

    Returns:
        `{"grid": scores, "k-means RGB": scores}`, names as in `SegmentationMetrics`, without prefix.

    Raises:
        ShapeError: a batch has no true masks or its shapes do not fit.
    """
    options = {"has_background": has_background, "ignore_overlaps": ignore_overlaps}
    metrics = {row: SegmentationMetrics(**options) for row in ("grid", "k-means RGB")}  # type: ignore[arg-type]
    for batch in batches:
        if batch.get("segmentations") is None or batch.get("video") is None:
            raise ShapeError(
                f"Expected batches with `video` and `segmentations`, but got {sorted(batch)}. Use the validation split."
            )
        true, valid, pixels = batch["segmentations"], frame_validity(batch), _shrink(batch["video"])
        clusters = kmeans(pixels.flatten(3).transpose(2, 3), num_slots, frame_mask=valid)
        parts = {
            "grid": grid_partition(num_slots, (true.shape[-2], true.shape[-1])).expand(*true.shape[:2], -1, -1),
            "k-means RGB": clusters.unflatten(2, pixels.shape[-2:]),
        }
        for row, labels in parts.items():
            metrics[row].to(true.device).update(labels.to(true.device), true, valid)
    return {row: {name: float(value) for name, value in metric.compute().items()} for row, metric in metrics.items()}


def _shrink(video: Tensor) -> Tensor:
    pixels = video.float() / 255 if video.dtype == torch.uint8 else video.float()
    longer = max(video.shape[-2:])
    if longer <= _KMEANS_SIZE:
        return pixels
    size = [max(1, round(side * _KMEANS_SIZE / longer)) for side in video.shape[-2:]]
    return F.interpolate(pixels.flatten(0, 1), size=size, mode="area").unflatten(0, video.shape[:2])


def grid_partition(num_cells: int, size: tuple[int, int]) -> Tensor:
    """Cuts a frame `(H, W)` into rectangles that are as close to squares as can be; int64 labels, row by row.

    Rows times columns where that gives cells at most twice as long as wide (8 cells: 2 rows of 4). Otherwise (11
    cells, a prime) rows hold unequal numbers of cells, and are higher the more cells they hold, so that all cells
    have about the same area (11 cells: rows of 4, 4 and 3).

    Raises:
        ShapeError: `num_cells` is below 1 or does not fit into the frame.
    """
    if num_cells < 1:
        raise ShapeError(f"Expected at least one cell, but got num_cells={num_cells}.")
    counts = range(1, num_cells + 1)
    exact = [[num_cells // rows] * rows for rows in counts if num_cells % rows == 0]
    ragged = [[num_cells // rows + (row < num_cells % rows) for row in range(rows)] for rows in counts]
    layout = min(exact, key=lambda rows: _elongation(rows, size))
    if _elongation(layout, size) > math.log(2) + 1e-9:
        layout = min(ragged, key=lambda rows: _elongation(rows, size))
    labels = torch.empty(size, dtype=torch.long)
    first = 0
    for columns in layout:
        top, bottom = (round(size[0] * cells / num_cells) for cells in (first, first + columns))
        labels[top:bottom] = first + torch.arange(size[1]) * columns // size[1]
        first += columns
    if labels.unique().numel() != num_cells:
        raise ShapeError(f"Expected a frame with room for {num_cells} cells, but got size={size}. Use fewer cells.")
    return labels


def _elongation(rows: list[int], size: tuple[int, int]) -> float:
    """Mean over the cells of |log(height / width)|, 0 for squares."""
    cells = sum(rows)
    return sum(n * abs(math.log(size[0] * n / cells / (size[1] / n))) for n in rows) / cells


def cached_baselines(path: Path, key: Mapping[str, Any], compute: Callable[[], Rows]) -> Rows:
    """Returns what `compute` returns, from a JSON file beside the data where it was kept there earlier.

    One file holds the scores of several keys. A file that is not ours, or cannot be read or written, is left as it is:
    that costs the computation and a warning.

    Args:
        path: of the JSON file, for example `<data>/baselines.json`.
        key: all that the scores depend on (data set, split, number of slots, …), JSON values only.
        compute: called without arguments where the scores are not kept.
    """
    name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]
    try:
        kept = read_owned_json(path)
    except (ConfigError, OSError) as error:
        rank_zero_warn(f"Baselines are not kept: {error}")
        return compute()
    if name not in kept:
        scores = compute()
        try:  # reads again: another process may have added its scores meanwhile
            kept = {**read_owned_json(path), name: scores}
            write_owned_json(path, kept)
        except (ConfigError, OSError) as error:
            rank_zero_warn(f"Baselines are not kept: {error}")
            return scores
    return kept[name]
