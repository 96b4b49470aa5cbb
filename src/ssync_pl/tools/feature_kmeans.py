"""k-means on a frozen backbone's features: what slots on these features must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ssync_pl.errors import ShapeError
from ssync_pl.tools.baselines import check_settings, cluster

__all__ = ["kmeans_features"]


def kmeans_features(
    features: Tensor,
    grid: tuple[int, int],
    num_clusters: int,
    iterations: int = 20,
    position_weight: float = 0.0,
    seed: int = 0,
    frame_mask: Tensor | None = None,
) -> Tensor:
    """Cluster the patches of each video by their features, over the whole clip.

    Args:
        features: `(B, T, N, D)`, float.
        grid: Rows and columns of patches, `(h, w)` with `h * w = N`.
        num_clusters: Number of clusters, usually the number of slots.
        iterations: Lloyd steps at most.
        position_weight: Appends y and x, from 0 to 1 along the longer side, times this weight and the features' root
            mean square norm; 0 = features only.
        seed: Of the k-means++ start.
        frame_mask: bool `(B, T)`, False for padded frames, which do not shape the clusters.

    Returns:
        Long labels `(B, T, h, w)` in `[0, num_clusters)`.

    Raises:
        ShapeError: The shapes do not fit, or there are fewer patches than clusters.
        ConfigError: A setting is out of range.

    Example:
        >>> features = torch.zeros(1, 2, 4, 3)
        >>> features[:, :, 2:] = 1.0
        >>> labels = kmeans_features(features, (2, 2), 2)
        >>> bool((labels[:, :, 0] == 1 - labels[:, :, 1]).all())
        True
    """
    if features.ndim != 4 or not features.is_floating_point() or features.shape[2] != grid[0] * grid[1]:
        raise ShapeError(
            f"Expected argument `features` to be float (B, T, N, D) with N = {grid[0]} * {grid[1]}, but got "
            f"{features.dtype} of shape {tuple(features.shape)}."
        )
    check_settings(num_clusters, iterations, position_weight)
    points = features.float()
    if position_weight > 0:
        longer = max(max(grid) - 1, 1)
        axes = [torch.arange(size, device=points.device) / longer for size in grid]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        scale = position_weight * points.square().sum(-1).mean().sqrt()
        points = torch.cat([points, (scale * places).expand(*points.shape[:2], -1, -1)], dim=-1)
    return cluster(points, num_clusters, iterations, seed, frame_mask).unflatten(2, grid)
