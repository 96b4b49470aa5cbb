"""What a model must beat: partitions without any learning, scored as a model is.

A fixed grid of rectangles already reaches a fair FG-ARI, since an object mostly lies in one cell. A score means
something only beside these rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssync_pl.errors import ShapeError, require_shape
from ssync_pl.hosts.evaluation import frame_validity
from ssync_pl.metrics import SegmentationMetrics

__all__ = ["grid_partition", "kmeans", "kmeans_features", "score_baselines"]

_LONGER_SIDE = 128  # larger frames are averaged down for k-means, to bound time and memory


def score_baselines(
    batches: Iterable[Any], num_slots: int, has_background: bool = True, ignore_overlaps: bool = False
) -> dict[str, SegmentationMetrics]:
    """Fills the metrics of the grid and k-means, by row of the table, with as many parts as a model has slots.

    Batches hold `video` `(B, T, 3, H, W)`, `segmentations` bool `(B, T, C, H, W)` and, where there are any, cached
    `features` `(B, T, N, D)`, `batch_padding_mask` `(B,)` and `frame_mask` `(B, T)`, True = real.
    """
    metrics: dict[str, SegmentationMetrics] = {}
    for batch in batches:
        entries = batch if isinstance(batch, Mapping) else {}
        true, video, features = (entries.get(name) for name in ("segmentations", "video", "features"))
        if true is None or video is None:
            raise ShapeError(f"Expected batches with `video` and `segmentations`, but got {sorted(entries)}.")
        size, valid = (true.shape[-2], true.shape[-1]), frame_validity(batch)
        scale = min(1.0, _LONGER_SIDE / max(video.shape[-2:]))
        small = [max(1, round(scale * side)) for side in video.shape[-2:]]
        pixels = F.interpolate(video.flatten(0, 1).float(), size=small, mode="area").flatten(2).transpose(1, 2)
        colors = kmeans(pixels.unflatten(0, video.shape[:2]), num_slots, valid)
        parts = {
            "grid": grid_partition(num_slots, size).expand(*true.shape[:2], -1, -1),
            "k-means RGB": colors.unflatten(2, small),
        }
        if features is not None:
            rows = max(1, round(math.sqrt(features.shape[2] * size[0] / size[1])))
            labels = kmeans_features(features, (rows, features.shape[2] // rows), num_slots, valid).float()
            parts["k-means features"] = F.interpolate(labels, size=size, mode="nearest").long()
        for row, labels in parts.items():
            if row not in metrics:
                metrics[row] = SegmentationMetrics("", has_background, ignore_overlaps).to(true.device)
            metrics[row].update(labels.to(true.device), true, valid)
    return metrics


def kmeans(points: Tensor, num_clusters: int, valid: Tensor, seed: int = 0) -> Tensor:
    """Clusters the points `(B, T, P, D)` of each video over the whole clip; int64 labels `(B, T, P)` on the CPU.

    Frames that `valid` `(B, T)` marks False do not shape the clusters. The labels of a video depend on its points and
    the seed alone: not on the other videos of the batch, nor on the number of cores.
    """
    from sklearn.cluster import KMeans  # takes a second to import
    from threadpoolctl import threadpool_limits

    found = torch.zeros(points.shape[:3], dtype=torch.int64)
    with threadpool_limits(1), warnings.catch_warnings():  # threads would add up in another order each time
        warnings.simplefilter("ignore")  # fewer colours than clusters leave clusters empty
        for index, (video, real) in enumerate(zip(points.double().cpu(), valid.cpu(), strict=True)):
            if real.any():  # not padding from end to end
                seen = video[real].flatten(0, 1)
                require_shape(len(seen) >= num_clusters, f"at least {num_clusters} points per video", (len(seen),))
                model = KMeans(num_clusters, n_init=1, random_state=seed).fit(seen.numpy())
                labels = torch.from_numpy(model.predict(video.flatten(0, 1).numpy()))
                found[index] = labels.view(found.shape[1:])
    return found


def kmeans_features(
    features: Tensor, grid: tuple[int, int], num_clusters: int, valid: Tensor, place_weight: float = 1.0, seed: int = 0
) -> Tensor:
    """Clusters features `(B, T, N, D)` of a grid `(h, w)` beside the places of its patches; labels `(B, T, h, w)`.

    Places span 1 along the longer side and count `place_weight` times the typical length of a feature vector.
    """
    fits = features.ndim == 4 and features.shape[2] == grid[0] * grid[1]
    require_shape(fits, f"features (B, T, N, D) of a grid of {grid[0]} x {grid[1]}", features)
    points = features.float()
    axes = [torch.arange(size, device=points.device) / max(max(grid) - 1, 1) for size in grid]
    places = place_weight * points.square().sum(-1).mean().sqrt() * torch.cartesian_prod(*axes)
    points = torch.cat([points, places.expand(*points.shape[:2], -1, -1)], dim=-1)
    return kmeans(points, num_clusters, valid, seed).unflatten(2, grid)


def grid_partition(num_cells: int, size: tuple[int, int]) -> Tensor:
    """Cuts a frame `(H, W)` into rectangles that are as close to squares as can be; int64 labels, row by row.

    Rows times columns where that gives cells at most twice as long as wide (8 cells: 2 rows of 4). Otherwise rows hold
    unequal numbers of cells, and are higher the more they hold, for cells of about one area (11 cells: 4, 4 and 3).
    """
    height, width = size

    def elongation(rows: list[int]) -> float:
        """Mean over the cells of |log(height / width)|, 0 for squares."""
        return sum(n * abs(math.log(height * n * n / (num_cells * width))) for n in rows) / num_cells

    counts = range(1, num_cells + 1)
    layouts = [[num_cells // rows + (row < num_cells % rows) for row in range(rows)] for rows in counts]
    layout = min((rows for rows in layouts if rows[0] == rows[-1]), key=elongation)
    if elongation(layout) > math.log(2) + 1e-9:
        layout = min(layouts, key=elongation)
    labels, first = torch.zeros(size, dtype=torch.long), 0
    for columns in layout:
        top, bottom = (round(height * cells / num_cells) for cells in (first, first + columns))
        labels[top:bottom] = first + torch.arange(width) * columns // width
        first += columns
    require_shape(labels.unique().numel() == num_cells, f"a frame with room for {num_cells} cells", size)
    return labels
