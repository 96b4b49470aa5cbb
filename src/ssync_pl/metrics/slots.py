"""What becomes of slots as torchmetrics classes: slots an object, unused slots, identity over time."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ssync_pl.metrics.base import ItemMean, MaskMetric
from ssync_pl.metrics.functional.consistency import identity_values
from ssync_pl.metrics.functional.contingency import Contingency
from ssync_pl.metrics.functional.fragmentation import slots_per_object_values, unused_slot_values, validate_share

__all__ = ["SlotIdentity", "SlotsPerObject", "UnusedSlots"]


class SlotsPerObject(MaskMetric):
    """Slots that an object is cut into: 1 is perfect, more is over-segmentation.

    Protocol: see `ssync_pl.metrics.functional.slots_per_object`. Mean over the objects of a video that have a slot of
    their own, then over videos.

    Args:
        min_share: slots that win a smaller share of the object's pixels are left out, in [0, 1).
        ignore_background: channel 0 of the true masks is the background and no object.
        ignore_overlaps: leave out pixels with several true masks, in true masks and slots, instead of refusing them.
        resolution: `(h, w)` at which to evaluate; None takes the size of the true masks.
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0, 0, 0]], [[0, 0, 1, 1, 1, 1]]]]], dtype=torch.bool)
        >>> metric = SlotsPerObject(ignore_background=True)
        >>> metric.update(torch.tensor([[[[0, 0, 1, 1, 2, 2]]]]), true)
        >>> metric.compute().item()
        2.0
    """

    higher_is_better = False
    plot_lower_bound = 1.0
    plot_upper_bound = None

    def __init__(
        self,
        min_share: float = 0.01,
        ignore_background: bool = False,
        ignore_overlaps: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(ignore_background, ignore_overlaps, resolution, **kwargs)
        self.min_share = validate_share(min_share)

    def item_values(self, counts: Contingency) -> tuple[Tensor, Tensor]:
        """Mean number of slots an object of each table, and which of them count."""
        return slots_per_object_values(counts, self.min_share)


class SlotIdentity(MaskMetric):
    """How often an object keeps its slot from a frame to the next.

    Protocol: see `ssync_pl.metrics.functional.slot_identity`. Share over the objects and pairs of consecutive frames
    of a video, then the mean over videos.

    Args:
        ignore_background: channel 0 of the true masks is the background and no object.
        ignore_overlaps: leave out pixels with several true masks, in true masks and slots, instead of refusing them.
        resolution: `(h, w)` at which to evaluate; None takes the size of the true masks.
        **kwargs: for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> true = torch.ones(1, 3, 1, 1, 4, dtype=torch.bool)
        >>> metric = SlotIdentity()
        >>> metric.update(torch.tensor([[[[0, 0, 0, 1]], [[0, 0, 0, 1]], [[1, 1, 1, 0]]]]), true)
        >>> metric.compute().item()
        0.5
    """

    # Tables stay apart by frame; `item_values` turns those of a video into one value.
    level: Literal["video", "image"] = "image"

    def item_values(self, counts: Contingency) -> tuple[Tensor, Tensor]:
        """Share of steps at which the slot stays, one a video, and which videos count."""
        return identity_values(counts)


class UnusedSlots(ItemMean):
    """Number of slots that win no place of a video.

    Counted at the host's own size, before masks are enlarged, as `used_slots` of the hosts. Mean over videos.

    Args:
        **kwargs: for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = UnusedSlots()
        >>> metric.update(torch.zeros(1, 2, 3, 4, 4))
        >>> metric.compute().item()
        2.0
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def update(self, masks: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            masks: scores `(B, T, S, h, w)`; the largest over S wins.
            valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.

        Raises:
            ShapeError: if the inputs do not fit; the message says how.
        """
        self.add_items(*unused_slot_values(masks, valid))
