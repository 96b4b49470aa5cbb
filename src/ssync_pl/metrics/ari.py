"""Adjusted Rand index as torchmetrics classes, for videos and for frames."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ssync_pl.metrics.base import MaskMetric
from ssync_pl.metrics.functional.ari import ari_values
from ssync_pl.metrics.functional.contingency import Contingency

__all__ = ["ImageARI", "VideoARI"]


class VideoARI(MaskMetric):
    """Adjusted Rand index of whole videos; video FG-ARI with `ignore_background=True`.

    Protocol, as published for VideoSAUR, SlotContrast and SSync: all frames of a video, the first included, are one
    partition, so a slot must keep its object over time; pixels with a true mask only; soft masks are resized
    bilinearly to the true masks' size, then argmax; mean over videos that have any true mask. No matching.

    Args:
        ignore_background: drop true channel 0: FG-ARI.
        ignore_overlaps: leave out pixels with several true masks instead of refusing them.
        skip_empty: skip videos with nothing but background in FG-ARI; published scores count them as 1.
        resolution: `(h, w)` at which to evaluate; None takes the size of the true masks.
        **kwargs: for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0]], [[0, 0, 1, 1]]]]], dtype=torch.bool)
        >>> metric = VideoARI()
        >>> metric.update(torch.tensor([[[[5, 5, 2, 2]]]]), true)
        >>> metric.compute().item()
        1.0
    """

    def __init__(
        self,
        ignore_background: bool = False,
        ignore_overlaps: bool = False,
        skip_empty: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(ignore_background, ignore_overlaps, resolution, **kwargs)
        self.skip_empty = skip_empty

    def item_values(self, counts: Contingency) -> tuple[Tensor, Tensor]:
        """Adjusted Rand index of each table, and which of them count."""
        return ari_values(counts, skip_empty=self.skip_empty)


class ImageARI(VideoARI):
    """Adjusted Rand index of frames; image FG-ARI with `ignore_background=True`.

    Protocol: as `VideoARI`, but each frame is a partition of its own, so identity over time does not matter; mean
    over all frames that have any true mask. Images are videos of one frame.

    Args:
        ignore_background: drop true channel 0: FG-ARI.
        ignore_overlaps: leave out pixels with several true masks instead of refusing them.
        skip_empty: skip frames with nothing but background in FG-ARI; published scores count them as 1.
        resolution: `(h, w)` at which to evaluate; None takes the size of the true masks.
        **kwargs: for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 0]], [[0, 1]]], [[[1, 0]], [[0, 1]]]]], dtype=torch.bool)
        >>> pred = torch.tensor([[[[0, 1]], [[1, 0]]]])
        >>> image, video = ImageARI(), VideoARI()
        >>> image.update(pred, true)
        >>> video.update(pred, true)
        >>> image.compute().item(), video.compute().item() < 0
        (1.0, True)
    """

    level: Literal["video", "image"] = "image"
