"""Intersection over union of true objects with slots: mean best overlap (mBO) and mean IoU after matching (mIoU)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ssync_pl.metrics.functional.assignment import linear_assignment
from ssync_pl.metrics.functional.contingency import Contingency, contingency
from ssync_pl.metrics.functional.reduction import reduce_values, validate_level

__all__ = ["best_overlap_values", "iou_from_counts", "matched_iou_values", "mean_best_overlap", "mean_iou"]


def iou_from_counts(counts: Contingency) -> Tensor:
    """Intersection over union of every true mask with every slot.

    Args:
        counts: tables `(..., C, S)`; unions hold all pixels of a slot, background included.

    Returns:
        Float64 `(..., C, S)` in [0, 1]; 0 where mask and slot are both empty.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0]]]]], dtype=torch.bool)
        >>> iou_from_counts(contingency(torch.tensor([[[[0, 0, 0, 1]]]]), true)).tolist()
        [[[[0.6666666666666666, 0.0]]]]
    """
    true_sizes = counts.table.sum(dim=-1, keepdim=True)
    union = true_sizes + counts.slot_sizes.unsqueeze(-2) - counts.table
    return counts.table / union.clamp(min=1)


def best_overlap_values(counts: Contingency) -> tuple[Tensor, Tensor]:
    """Mean over the present objects of the largest IoU with any slot; a slot may serve several objects.

    Args:
        counts: tables `(..., C, S)`; drop the background first.

    Returns:
        Values (float64) and counted (bool: any object is present), both `(...)`.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0]], [[0, 0, 1, 0]]]]], dtype=torch.bool)
        >>> values, counted = best_overlap_values(contingency(torch.tensor([[[[0, 0, 0, 0]]]]), true))
        >>> values.tolist(), counted.tolist()
        ([[0.375]], [[True]])
    """
    present = counts.table.sum(dim=-1) > 0
    return _object_mean(_row_best(iou_from_counts(counts)), present)


def matched_iou_values(counts: Contingency) -> tuple[Tensor, Tensor]:
    """Mean over the present objects of the IoU with a slot of its own (Hungarian matching).

    Args:
        counts: tables `(..., C, S)`; drop the background first.

    Returns:
        Values (float64) and counted (bool: any object is present), both `(...)`. Objects without a slot count 0.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0]], [[0, 0, 1, 0]]]]], dtype=torch.bool)
        >>> values, _ = matched_iou_values(contingency(torch.tensor([[[[0, 0, 0, 0]]]]), true))
        >>> values.tolist()
        [[0.25]]
    """
    present = counts.table.sum(dim=-1) > 0
    return _object_mean(_matched(iou_from_counts(counts)), present)


def _row_best(iou: Tensor) -> Tensor:
    return iou.amax(dim=-1) if iou.shape[-2] else iou.sum(dim=-1)


def _object_mean(values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    number = present.sum(dim=-1)
    return values.sum(dim=-1) / number.clamp(min=1), number > 0


def _matched(iou: Tensor) -> Tensor:
    """IoU of each object with its matched slot, `(..., C)`."""
    result = _row_best(iou)
    if not iou.numel():
        return result
    # Where no two objects want the same slot, each takes its best: nothing can be better, no search is needed.
    wanted = torch.zeros_like(iou).scatter_(-1, iou.argmax(dim=-1, keepdim=True), (result > 0).double().unsqueeze(-1))
    contested = wanted.sum(dim=-2).amax(dim=-1) > 1
    if bool(contested.any()):
        matched = []
        for matrix in iou[contested].cpu().numpy():
            rows, columns = linear_assignment(-matrix)
            values = torch.zeros(matrix.shape[0], dtype=torch.float64)
            values[rows] = torch.from_numpy(matrix[rows, columns])
            matched.append(values)
        result[contested] = torch.stack(matched).to(result.device)
    return result


def mean_best_overlap(
    pred: Tensor,
    true: Tensor,
    valid: Tensor | None = None,
    *,
    level: Literal["video", "image"] = "video",
    ignore_background: bool = False,
    ignore_overlaps: bool = False,
    resolution: tuple[int, int] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Mean best overlap (mBO): for each true object the largest IoU with any slot, then means over objects and items.

    Protocol, as published for VideoSAUR, SlotContrast and SSync: hard labels (soft masks resized bilinearly to the
    size of `true`, then argmax); slots may be reused; unions include background pixels; the first frame included;
    items without an object are skipped.

    Args:
        pred: integer labels `(B, T, H, W)`, or float or bool masks `(B, T, S, h, w)`.
        true: bool masks `(B, T, C, H, W)`, channel 0 = background where the set has one.
        valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.
        level: "video" (objects over all frames of a video) or "image" (frames apart).
        ignore_background: channel 0 is the background and no object.
        ignore_overlaps: leave out pixels with several true masks, in true masks and slots, instead of refusing them.
        resolution: `(h, w)` at which to evaluate; None takes the size of `true`.
        reduction: "mean", or "none" for one value an item, NaN where it is skipped.

    Returns:
        Float64 scalar in [0, 1] (NaN if no item counts), or `(B,)` / `(B, T)` with `reduction="none"`.

    Raises:
        ShapeError: if the inputs do not fit; the message says how.
        ConfigError: if `level` or `reduction` is unknown.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0]], [[0, 0, 1, 1]]]]], dtype=torch.bool)
        >>> mean_best_overlap(torch.tensor([[[[0, 0, 0, 1]]]]), true, ignore_background=True).item()
        0.5
    """
    validate_level(level, reduction)
    counts = _object_counts(pred, true, valid, level, ignore_background, ignore_overlaps, resolution)
    return reduce_values(*best_overlap_values(counts), reduction)


def mean_iou(
    pred: Tensor,
    true: Tensor,
    valid: Tensor | None = None,
    *,
    level: Literal["video", "image"] = "video",
    ignore_background: bool = False,
    ignore_overlaps: bool = False,
    resolution: tuple[int, int] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Mean IoU (mIoU) of true objects with slots matched one to one (Hungarian matching on IoU).

    Protocol as in `mean_best_overlap`, but a slot serves one object
    only, and an object without a slot counts 0.

    Args:
        pred: integer labels `(B, T, H, W)`, or float or bool masks `(B, T, S, h, w)`.
        true: bool masks `(B, T, C, H, W)`, channel 0 = background where the set has one.
        valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.
        level: "video" (objects over all frames of a video) or "image" (frames apart).
        ignore_background: channel 0 is the background and no object.
        ignore_overlaps: leave out pixels with several true masks, in true masks and slots, instead of refusing them.
        resolution: `(h, w)` at which to evaluate; None takes the size of `true`.
        reduction: "mean", or "none" for one value an item, NaN where it is skipped.

    Returns:
        Float64 scalar in [0, 1] (NaN if no item counts), or `(B,)` / `(B, T)` with `reduction="none"`.

    Raises:
        ShapeError: if the inputs do not fit; the message says how.
        ConfigError: if `level` or `reduction` is unknown.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0]], [[0, 0, 1, 1]]]]], dtype=torch.bool)
        >>> mean_iou(torch.tensor([[[[0, 0, 0, 0]]]]), true).item()
        0.25
    """
    validate_level(level, reduction)
    counts = _object_counts(pred, true, valid, level, ignore_background, ignore_overlaps, resolution)
    return reduce_values(*matched_iou_values(counts), reduction)


def _object_counts(
    pred: Tensor,
    true: Tensor,
    valid: Tensor | None,
    level: str,
    ignore_background: bool,
    ignore_overlaps: bool,
    resolution: tuple[int, int] | None,
) -> Contingency:
    counts = contingency(
        pred, true, valid, has_background=ignore_background, ignore_overlaps=ignore_overlaps, resolution=resolution
    )
    counts = counts.foreground() if ignore_background else counts
    return counts.videos() if level == "video" else counts
