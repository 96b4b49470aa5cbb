"""The shells that all metrics share: a sum of values and the number of items that count."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from ssync_pl.errors import ConfigError
from ssync_pl.metrics.functional.contingency import Contingency, contingency

__all__ = ["ItemMean", "MaskMetric", "validate_resolution"]


class ItemMean(Metric):
    """A mean over videos or frames, with one state for the sum of values and one for the number of items.

    States are float64 sums, so that batches and ranks of different sizes weigh by their items.

    Args:
        **kwargs: for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> class Lengths(ItemMean):
        ...     def update(self, videos):
        ...         self.add_items(torch.tensor([len(video) for video in videos]), torch.ones(len(videos)).bool())
        >>> metric = Lengths()
        >>> metric.update([[1, 2], [1, 2, 3, 4]])
        >>> metric.compute().item()
        3.0
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def add_items(self, values: Tensor, counted: Tensor) -> None:
        """Add the values of some items.

        Args:
            values: one value an item, any shape.
            counted: bool of the same shape, False for items that do not count.
        """
        # A host cast to half precision casts the states: sums go back to float64.
        self.total = self.total.double() + values.masked_fill(~counted, 0.0).sum().to(self.total.device)
        self.count = self.count.double() + counted.sum().to(self.count.device)

    def compute(self) -> Tensor:
        """Mean over the items so far, float64; NaN if there are none."""
        return self.total.double() / self.count.double()


class MaskMetric(ItemMean):
    """Base of the metrics that score predicted masks against true masks, one value a video or a frame.

    A new metric sets `level` and implements `item_values`.

    Args:
        ignore_background: channel 0 of the true masks is the background and does not count.
        ignore_overlaps: leave out pixels with several true masks instead of refusing them.
        resolution: `(h, w)` at which to evaluate; None takes the size of the true masks.
        **kwargs: for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> class Coverage(MaskMetric):
        ...     def item_values(self, counts):
        ...         return counts.table.sum(dim=(-2, -1)), counts.labelled
        >>> metric = Coverage()
        >>> metric.update(torch.zeros(1, 2, 4, 4, dtype=torch.long), torch.ones(1, 2, 1, 4, 4, dtype=torch.bool))
        >>> metric.compute().item()
        32.0
    """

    higher_is_better = True
    plot_upper_bound: float | None = 1.0

    level: Literal["video", "image"] = "video"

    def __init__(
        self,
        ignore_background: bool = False,
        ignore_overlaps: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ignore_background = ignore_background
        self.ignore_overlaps = ignore_overlaps
        self.resolution = validate_resolution(resolution)

    @abstractmethod
    def item_values(self, counts: Contingency) -> tuple[Tensor, Tensor]:
        """Values and counted items, both `(...)`, of tables `(..., C, S)`."""

    def update(self, pred: Tensor, true: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            pred: integer labels `(B, T, H, W)`, or float or bool masks `(B, T, S, h, w)`.
            true: bool masks `(B, T, C, H, W)`.
            valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.

        Raises:
            ShapeError: if the inputs do not fit; the message says how.
        """
        counts = contingency(
            pred,
            true,
            valid,
            has_background=self.ignore_background,
            ignore_overlaps=self.ignore_overlaps,
            resolution=self.resolution,
        )
        counts = counts.foreground() if self.ignore_background else counts
        counts = counts.videos() if self.level == "video" else counts
        self.add_items(*self.item_values(counts))


def validate_resolution(resolution: tuple[int, int] | None) -> tuple[int, int] | None:
    """Check and normalise the `resolution` argument.

    Args:
        resolution: None or two positive sizes; YAML gives lists.

    Returns:
        None or a tuple of two ints.

    Raises:
        ConfigError: if it is something else.

    Example:
        >>> validate_resolution([32, 64])
        (32, 64)
    """
    if resolution is None:
        return None
    sizes = tuple(resolution)
    if len(sizes) != 2 or any(int(size) != size or size < 1 for size in sizes):
        raise ConfigError(
            f"Expected argument `resolution` to be None or two positive sizes (h, w), but got {resolution}."
        )
    return int(sizes[0]), int(sizes[1])
