"""Mean best overlap and mean IoU as torchmetrics classes, for videos and for frames."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ssync_pl.metrics.base import MaskMetric
from ssync_pl.metrics.functional.contingency import Contingency
from ssync_pl.metrics.functional.overlap import best_overlap_values, matched_iou_values

__all__ = ["ImageMBO", "ImageMIoU", "VideoMBO", "VideoMIoU"]


class VideoMBO(MaskMetric):
    """Mean best overlap (mBO) of whole videos: for each true object the largest IoU with any slot.

    Protocol, as published for VideoSAUR, SlotContrast and SSync: objects and slots over all frames of a video, the
    first included; slots may be reused; unions include background pixels; soft masks are resized bilinearly to the
    true masks' size, then argmax; mean over the objects present, then over videos that have an object.

    Args:
        ignore_background: channel 0 of the true masks is the background and no object.
        ignore_overlaps: leave out pixels with several true masks, in true masks and slots, instead of refusing them.
        resolution: `(h, w)` at which to evaluate; None takes the size of the true masks.
        **kwargs: for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0]], [[0, 0, 1, 1]]]]], dtype=torch.bool)
        >>> metric = VideoMBO(ignore_background=True)
        >>> metric.update(torch.tensor([[[[0, 0, 0, 1]]]]), true)
        >>> metric.compute().item()
        0.5
    """

    def item_values(self, counts: Contingency) -> tuple[Tensor, Tensor]:
        """Mean best overlap of each table, and which of them count."""
        return best_overlap_values(counts)


class ImageMBO(VideoMBO):
    """Mean best overlap (mBO) of frames.

    Protocol: as `VideoMBO`, but each frame apart; mean over all frames that have an object.

    Args:
        ignore_background: channel 0 of the true masks is the background and no object.
        ignore_overlaps: leave out pixels with several true masks, in true masks and slots, instead of refusing them.
        resolution: `(h, w)` at which to evaluate; None takes the size of the true masks.
        **kwargs: for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0]]], [[[0, 0, 0, 0]]]]], dtype=torch.bool)
        >>> metric = ImageMBO()
        >>> metric.update(torch.zeros(1, 2, 1, 4, dtype=torch.long), true)
        >>> metric.compute().item()
        0.5
    """

    level: Literal["video", "image"] = "image"


class VideoMIoU(MaskMetric):
    """Mean IoU (mIoU) of whole videos with objects and slots matched one to one (Hungarian matching on IoU).

    Protocol: as `VideoMBO`, but a slot serves one object only, and an object without a slot counts 0.

    Args:
        ignore_background: channel 0 of the true masks is the background and no object.
        ignore_overlaps: leave out pixels with several true masks, in true masks and slots, instead of refusing them.
        resolution: `(h, w)` at which to evaluate; None takes the size of the true masks.
        **kwargs: for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0]], [[0, 0, 1, 1]]]]], dtype=torch.bool)
        >>> metric = VideoMIoU()
        >>> metric.update(torch.zeros(1, 1, 1, 4, dtype=torch.long), true)
        >>> metric.compute().item()
        0.25
    """

    def item_values(self, counts: Contingency) -> tuple[Tensor, Tensor]:
        """Mean matched IoU of each table, and which of them count."""
        return matched_iou_values(counts)


class ImageMIoU(VideoMIoU):
    """Mean IoU (mIoU) of frames with objects and slots matched one to one in each frame.

    Protocol: as `VideoMIoU`, but each frame apart; mean over all frames that have an object.

    Args:
        ignore_background: channel 0 of the true masks is the background and no object.
        ignore_overlaps: leave out pixels with several true masks, in true masks and slots, instead of refusing them.
        resolution: `(h, w)` at which to evaluate; None takes the size of the true masks.
        **kwargs: for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0]]], [[[0, 0, 0, 0]]]]], dtype=torch.bool)
        >>> metric = ImageMIoU()
        >>> metric.update(torch.zeros(1, 2, 1, 4, dtype=torch.long), true)
        >>> metric.compute().item()
        0.5
    """

    level: Literal["video", "image"] = "image"
