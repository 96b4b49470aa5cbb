"""k-means over whole clips: of colours, and of features in benchmarks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssync_pl.errors import ConfigError, ShapeError

__all__ = ["kmeans"]

# Distances of points to centres are held for a group of videos: 2**25 floats are 128 MiB.
_GROUP_ELEMENTS = 2**25


def kmeans(
    points: Tensor, num_clusters: int, iterations: int = 20, seed: int = 0, frame_mask: Tensor | None = None
) -> Tensor:
    """Clusters the points of each video: Lloyd's k-means over the whole clip, k-means++ start.

    The start of a video depends on the seed alone, not on the other videos of the batch. scikit-learn would loop over
    videos and give other scores than the recorded ones.

    Args:
        points: float `(B, T, P, D)`.
        num_clusters: number of clusters, usually the number of slots.
        iterations: Lloyd steps at most; ends early when no centre moves.
        seed: of the start.
        frame_mask: bool `(B, T)`, False for padded frames, which do not shape the clusters.

    Returns:
        int64 labels `(B, T, P)` in `[0, num_clusters)`.

    Raises:
        ShapeError: there are fewer points than clusters, or the mask does not fit.
        ConfigError: a setting is out of range.
    """
    if num_clusters < 1 or iterations < 0:
        raise ConfigError(f"Expected num_clusters >= 1 and iterations >= 0, but got {num_clusters} and {iterations}.")
    batch, frames, count = points.shape[:3]
    if frames * count < num_clusters:
        raise ShapeError(f"Expected at least {num_clusters} points per video, but got {frames * count}.")
    mask = torch.ones(batch, frames, dtype=torch.bool) if frame_mask is None else frame_mask
    if mask.shape != (batch, frames) or mask.dtype != torch.bool:
        got = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise ShapeError(f"Expected `frame_mask` to be bool of shape {(batch, frames)}, but got {got}.")
    weights = mask.to(points.device)[:, :, None].expand(batch, frames, count).flatten(1).float()
    group = max(1, _GROUP_ELEMENTS // (frames * count * num_clusters))
    parts = zip(points.flatten(1, 2).split(group), weights.split(group), strict=True)
    return torch.cat([_lloyd(*part, num_clusters, iterations, seed) for part in parts]).view(batch, frames, count)


def _lloyd(points: Tensor, weights: Tensor, clusters: int, iterations: int, seed: int) -> Tensor:
    """Labels `(B, P)` of points `(B, P, D)` with weights `(B, P)`."""
    centres = _start(points, weights, clusters, seed)
    weighted = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1) * weights[..., None]
    for _ in range(iterations):
        owners = F.one_hot(_nearest(points, centres), clusters).to(points.dtype)
        sums = torch.bmm(owners.transpose(1, 2), weighted)
        # An empty cluster stays where it is.
        moved = torch.where(sums[..., -1:] > 0, sums[..., :-1] / sums[..., -1:].clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return _nearest(points, centres)


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Centre `(B, P)` of each point, by squared distances up to the term that is the same for all centres."""
    lengths = centres.square().sum(-1)[:, None]
    return torch.baddbmm(lengths, points, centres.transpose(1, 2), alpha=-2.0).argmin(dim=-1)


def _start(points: Tensor, weights: Tensor, clusters: int, seed: int) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, SODA 2007): centres are drawn in proportion to their squared distance."""
    draws = torch.rand(clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    mass = weights.double()
    nearest = torch.full_like(mass, math.inf)
    centres: list[Tensor] = []
    for draw in draws:
        cumulative = mass.cumsum(dim=-1)
        # Strictly right of the drawn mass, so that points without mass are never drawn.
        index = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True).clamp(max=mass.shape[1] - 1)
        centres.append(points.gather(1, index[..., None].expand(-1, -1, points.shape[-1])))
        nearest = torch.minimum(nearest, (points - centres[-1]).square().sum(dim=-1).double())
        mass = nearest * weights
    return torch.cat(centres, dim=1)
