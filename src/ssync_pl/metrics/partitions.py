"""Partitions without any learning, which scores of slots are compared with: k-means and a grid."""

import math
import warnings

import torch
from torch import Tensor

from ssync_pl.errors import require_shape


def kmeans(
    points: Tensor, grid: tuple[int, int], num_clusters: int, valid: Tensor, place_weight: float = 0.0, seed: int = 0
) -> Tensor:
    """Clusters the points `(B, T, N, D)` of a grid `(h, w)`, each video by itself; int64 labels `(B, T, h, w)`.

    Places in the grid span 1 along its longer side and count `place_weight` times the typical length of a point. Frames
    that `valid` `(B, T)` marks False do not shape the clusters.
    """
    from sklearn.cluster import KMeans  # takes a second to import
    from threadpoolctl import threadpool_limits

    fits = points.ndim == 4 and points.shape[2] == grid[0] * grid[1]
    require_shape(fits, f"features (B, T, N, D) of a grid of {grid[0]} x {grid[1]}", points)
    points = points.float()
    if place_weight:
        axes = [torch.arange(size, device=points.device) / max(max(grid) - 1, 1) for size in grid]
        places = place_weight * points.square().sum(-1).mean().sqrt() * torch.cartesian_prod(*axes)
        points = torch.cat([points, places.expand(*points.shape[:2], -1, -1)], dim=-1)
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
    return found.unflatten(2, grid)


def grid_partition(num_cells: int, size: tuple[int, int]) -> Tensor:
    """Cuts a frame `(H, W)` into rectangles that are as close to squares as can be; int64 labels, row by row.

    Rows hold unequal numbers of cells (11: 4, 4 and 3) where equal ones give cells over twice as long as wide.
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
