"""Boundary F as a torchmetrics class."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssync_pl.metrics.base import ItemMean, validate_resolution
from ssync_pl.metrics.functional.boundary import boundary_f_values, frame_mean, validate_tolerance

__all__ = ["BoundaryF"]


class BoundaryF(ItemMean):
    """F-measure of the borders between slots against those between true masks, of videos.

    Protocol: see `ssync_pl.metrics.functional.boundary_f`. All borders of a frame count, also those that cut the
    background; mean over the frames of a video that have a true border, then over videos.

    Args:
        tolerance: distance that counts as found, as a share of the image's diagonal; at least one pixel. DAVIS takes
            0.0075.
        resolution: `(h, w)` at which to evaluate; None takes the size of the true masks.
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 1, 1, 0, 0, 0, 0]], [[0, 0, 0, 0, 1, 1, 1, 1]]]]], dtype=torch.bool)
        >>> metric = BoundaryF()
        >>> metric.update(torch.tensor([[[[0, 2, 2, 2, 1, 1, 1, 1]]]]), true)
        >>> round(metric.compute().item(), 4)
        0.6667
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, tolerance: float = 0.0075, resolution: tuple[int, int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tolerance = validate_tolerance(tolerance)
        self.resolution = validate_resolution(resolution)

    def update(self, pred: Tensor, true: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            pred: integer labels `(B, T, H, W)`, or float or bool masks `(B, T, S, h, w)`.
            true: bool masks `(B, T, C, H, W)`.
            valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.

        Raises:
            ShapeError: if the inputs do not fit; the message says how.
        """
        frames = boundary_f_values(pred, true, valid, tolerance=self.tolerance, resolution=self.resolution)
        self.add_items(*frame_mean(*frames))
