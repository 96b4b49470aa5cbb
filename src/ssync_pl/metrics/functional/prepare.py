"""From labels or masks of any size to what the metrics count: hard slot labels and one-hot true masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssync_pl.errors import ShapeError

__all__ = ["frame_validity", "labels_to_masks", "resize_nearest", "to_labels", "validate_masks"]

_INTEGER_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def validate_masks(pred: Tensor, true: Tensor, resolution: tuple[int, int] | None = None) -> None:
    """Refuse shapes and dtypes that the metrics cannot read.

    Args:
        pred: integer labels `(B, T, H, W)`, or float or bool masks `(B, T, S, h, w)`.
        true: bool masks `(B, T, C, H, W)`.
        resolution: `(h, w)` at which to evaluate, or None for the size of `true`.

    Raises:
        ShapeError: if a shape, a dtype or the resolution does not fit.

    Example:
        >>> import torch
        >>> validate_masks(torch.zeros(1, 2, 4, 4, dtype=torch.long), torch.ones(1, 2, 3, 4, 4, dtype=torch.bool))
    """
    if true.ndim != 5:
        raise ShapeError(
            f"Expected argument `true` to have shape (B, T, C, H, W), but got {tuple(true.shape)}. "
            "Do `labels_to_masks(labels, num_classes)` with labels, or add a frame dimension to images."
        )
    if true.dtype != torch.bool:
        raise ShapeError(
            f"Expected argument `true` to be one-hot masks of dtype bool, but got {true.dtype}. Do `true.bool()`."
        )
    if 0 in true.shape[2:]:
        raise ShapeError(
            f"Expected argument `true` to have at least one channel and pixel, but got {tuple(true.shape)}."
        )
    if pred.ndim not in (4, 5):
        raise ShapeError(
            "Expected argument `pred` to be labels (B, T, H, W) or masks (B, T, S, H, W), "
            f"but got shape {tuple(pred.shape)}. Add a frame dimension to images."
        )
    if pred.ndim == 4 and pred.dtype not in _INTEGER_TYPES:
        raise ShapeError(
            f"Expected argument `pred` of shape (B, T, H, W) to be integer labels, but got {pred.dtype}. "
            "Pass masks with a slot dimension, (B, T, S, H, W), or do `.long()`."
        )
    if pred.ndim == 5 and not (pred.is_floating_point() or pred.dtype == torch.bool):
        raise ShapeError(
            f"Expected argument `pred` of shape (B, T, S, H, W) to be float or bool masks, but got {pred.dtype}. "
            "Do `.float()` or pass labels (B, T, H, W)."
        )
    if pred.shape[:2] != true.shape[:2]:
        raise ShapeError(
            "Expected arguments `pred` and `true` to have the same videos and frames, "
            f"but got (B, T) = {tuple(pred.shape[:2])} and {tuple(true.shape[:2])}."
        )
    if 0 in pred.shape[2:]:
        raise ShapeError(f"Expected argument `pred` to have at least one slot and pixel, but got {tuple(pred.shape)}.")
    if pred.device != true.device:
        raise ShapeError(
            f"Expected arguments `pred` and `true` on one device, but got {pred.device} and {true.device}. "
            "Do `.to(...)`."
        )
    if resolution is not None and (len(resolution) != 2 or min(resolution) < 1):
        raise ShapeError(
            f"Expected argument `resolution` to be None or two positive sizes (h, w), but got {resolution}."
        )


def frame_validity(valid: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Spread a validity mask over frames.

    Args:
        valid: bool `(B,)` (whole videos) or `(B, T)` (frames), True = counted; None = all.
        shape: `(B, T)`.

    Returns:
        Bool `(B, T)`, or None where everything counts.

    Raises:
        ShapeError: if the dtype is not bool or the shape is neither `(B,)` nor `(B, T)`.

    Example:
        >>> import torch
        >>> frame_validity(torch.tensor([True, False]), (2, 3)).tolist()
        [[True, True, True], [False, False, False]]
    """
    if valid is None:
        return None
    if valid.dtype != torch.bool or tuple(valid.shape) not in (shape[:1], shape):
        raise ShapeError(
            f"Expected argument `valid` to be bool of shape {shape[:1]} (videos) or {shape} (frames), "
            f"but got {valid.dtype} of shape {tuple(valid.shape)}."
        )
    return valid[:, None].expand(shape) if valid.ndim == 1 else valid


def labels_to_masks(labels: Tensor, num_classes: int) -> Tensor:
    """One-hot masks of labels; a negative label belongs to no mask.

    Args:
        labels: integers `(..., H, W)` below `num_classes`.
        num_classes: number of channels C.

    Returns:
        Bool `(..., C, H, W)`.

    Raises:
        ShapeError: if the labels are no integers, or one is `num_classes` or more.

    Example:
        >>> import torch
        >>> labels_to_masks(torch.tensor([[[0, 1]]]), 2).int().tolist()
        [[[[1, 0]], [[0, 1]]]]
    """
    if labels.dtype not in _INTEGER_TYPES or labels.ndim < 2:
        raise ShapeError(
            "Expected argument `labels` to be integers of shape (..., H, W), "
            f"but got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if labels.numel() and int(labels.max()) >= num_classes:
        raise ShapeError(
            f"Expected every label to be below num_classes={num_classes}, but got {int(labels.max())}. "
            "Raise `num_classes`."
        )
    return labels.unsqueeze(-3) == torch.arange(num_classes, device=labels.device)[:, None, None]


def resize_nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize the last two dimensions to the nearest pixel centre, for any dtype.

    The same pixels as `torch.nn.functional.interpolate(mode="nearest-exact")`, which refuses bool and int64.

    Args:
        maps: `(..., H, W)`.
        size: `(h, w)`.

    Returns:
        `(..., h, w)` of the same dtype.

    Example:
        >>> import torch
        >>> resize_nearest(torch.tensor([[0, 1, 2, 3]]), (1, 2)).tolist()
        [[1, 3]]
    """
    height, width = maps.shape[-2:]
    if (height, width) == tuple(size):
        return maps
    rows = ((2 * torch.arange(size[0], device=maps.device) + 1) * height) // (2 * size[0])
    columns = ((2 * torch.arange(size[1], device=maps.device) + 1) * width) // (2 * size[1])
    return maps[..., rows[:, None], columns]


def to_labels(pred: Tensor, size: tuple[int, int]) -> Tensor:
    """Hard slot labels at `size`, as published: resize the soft masks bilinearly, then argmax.

    Args:
        pred: integer labels `(F, h, w)` (resized to the nearest pixel), or masks `(F, S, h, w)`, float
            (probabilities; logits give other borders when resized) or bool (one-hot over S).
        size: `(H, W)`.

    Returns:
        Long `(F, H, W)`.

    Raises:
        ShapeError: if labels are negative, float masks hold NaN, or bool masks are not one-hot.

    Example:
        >>> import torch
        >>> masks = torch.tensor([[[[0.9, 0.2]], [[0.1, 0.8]]]])
        >>> to_labels(masks, (1, 4)).tolist()
        [[[0, 0, 1, 1]]]
    """
    if pred.ndim == 3:
        labels = resize_nearest(pred, size).long()
        if labels.numel() and int(labels.min()) < 0:
            raise ShapeError(
                f"Expected argument `pred` to hold labels of at least 0, but got {int(labels.min())}. "
                "Give unassigned pixels a label of their own."
            )
        return labels
    if pred.dtype == torch.bool and bool((pred.sum(dim=1) != 1).any()):
        raise ShapeError(
            "Expected bool argument `pred` to be one-hot over slots, but got pixels with no slot or several. "
            "Pass soft masks or labels."
        )
    masks = pred.float()
    if tuple(pred.shape[-2:]) != tuple(size):
        masks = F.interpolate(masks, size=tuple(size), mode="bilinear")
    peak, labels = masks.max(dim=1)
    if bool(peak.isnan().any()):
        raise ShapeError("Expected argument `pred` to be free of NaN, but got NaN masks. The model has diverged.")
    return labels
