"""F-measure of the borders between slots against the borders between true masks."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssync_pl.errors import ConfigError
from ssync_pl.metrics.functional.prepare import frame_validity, resize_nearest, to_labels, validate_masks
from ssync_pl.metrics.functional.reduction import reduce_values, validate_level

__all__ = ["boundary_f", "boundary_f_values", "boundary_pixels", "frame_mean", "tolerance_pixels", "validate_tolerance"]

# Frames are taken in groups so that the masks at full size stay small.
_GROUP_ELEMENTS = 2**22


def validate_tolerance(tolerance: float) -> float:
    """Check the `tolerance` argument.

    Args:
        tolerance: share of the image's diagonal, in [0, 1].

    Returns:
        The tolerance.

    Raises:
        ConfigError: if it is out of range.

    Example:
        >>> validate_tolerance(0.0075)
        0.0075
    """
    if not 0.0 <= tolerance <= 1.0:
        raise ConfigError(
            f"Expected argument `tolerance` to be a share of the image's diagonal in [0, 1], but got {tolerance}. "
            "DAVIS takes 0.0075."
        )
    return float(tolerance)


def tolerance_pixels(size: tuple[int, int], tolerance: float = 0.0075) -> int:
    """Distance at which a border still counts as found.

    Args:
        size: `(H, W)` of the image.
        tolerance: share of its diagonal.

    Returns:
        Pixels, rounded up, at least 1.

    Example:
        >>> tolerance_pixels((64, 64)), tolerance_pixels((480, 854))
        (1, 8)
    """
    return max(1, math.ceil(tolerance * math.hypot(*size)))


def boundary_pixels(labels: Tensor) -> Tensor:
    """Pixels whose neighbour to the right, below or diagonally below has another label.

    Args:
        labels: integers `(..., H, W)`.

    Returns:
        Bool `(..., H, W)`.

    Example:
        >>> import torch
        >>> boundary_pixels(torch.tensor([[0, 0, 1, 1]])).int().tolist()
        [[0, 1, 0, 0]]
    """
    border = torch.zeros_like(labels, dtype=torch.bool)
    border[..., :, :-1] |= labels[..., :, :-1] != labels[..., :, 1:]
    border[..., :-1, :] |= labels[..., :-1, :] != labels[..., 1:, :]
    border[..., :-1, :-1] |= labels[..., :-1, :-1] != labels[..., 1:, 1:]
    return border


def boundary_f_values(
    pred: Tensor,
    true: Tensor,
    valid: Tensor | None = None,
    *,
    tolerance: float = 0.0075,
    resolution: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Boundary F of each frame, and which frames count.

    Args:
        pred: integer labels `(B, T, H, W)`, or float or bool masks `(B, T, S, h, w)`.
        true: bool masks `(B, T, C, H, W)`.
        valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.
        tolerance: distance that counts as found, as a share of the image's diagonal; at least one pixel.
        resolution: `(h, w)` at which to evaluate; None takes the size of `true`.

    Returns:
        Values (float64) and counted (bool: the frame is valid and has a true border), both `(B, T)`.

    Raises:
        ShapeError: if the inputs do not fit.
        ConfigError: if the tolerance is out of range.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0]], [[0, 0, 1, 1]]], [[[1, 1, 1, 1]], [[0, 0, 0, 0]]]]]).bool()
        >>> values, counted = boundary_f_values(torch.tensor([[[[0, 0, 1, 1]], [[0, 0, 1, 1]]]]), true)
        >>> values.tolist(), counted.tolist()
        ([[1.0, 0.0]], [[True, False]])
    """
    validate_masks(pred, true, resolution)
    validate_tolerance(tolerance)
    batch, frames, channels = true.shape[:3]
    size = (int(true.shape[-2]), int(true.shape[-1])) if resolution is None else resolution
    radius = tolerance_pixels(size, tolerance)
    places = torch.arange(batch * frames, device=true.device)
    keep = frame_validity(valid, (batch, frames))
    if keep is not None:
        places = places[keep.to(true.device).flatten()]
    flat_pred, flat_true = pred.flatten(0, 1), true.flatten(0, 1)
    values = torch.zeros(batch * frames, dtype=torch.float64, device=true.device)
    counted = torch.zeros(batch * frames, dtype=torch.bool, device=true.device)
    slots = pred.shape[2] if pred.ndim == 5 else 1
    per_group = max(1, _GROUP_ELEMENTS // ((slots + channels) * size[0] * size[1]))
    with torch.no_grad(), torch.autocast(device_type=true.device.type, enabled=False):
        for start in range(0, len(places), per_group):
            group = places[start : start + per_group]
            found = boundary_pixels(to_labels(flat_pred[group], size))
            wanted = boundary_pixels(_true_labels(resize_nearest(flat_true[group], size)))
            values[group] = _f_measure(found, wanted, radius)
            counted[group] = wanted.flatten(1).any(dim=1)
    return values.view(batch, frames), counted.view(batch, frames)


def _true_labels(masks: Tensor) -> Tensor:
    """Labels `(F, H, W)` of masks `(F, C, H, W)`: 0 without a mask; the first mask wins where several overlap."""
    ranks = torch.arange(masks.shape[1], 0, -1, device=masks.device, dtype=torch.int16)
    return (masks * ranks[:, None, None]).amax(dim=1)


def _f_measure(found: Tensor, wanted: Tensor, radius: int) -> Tensor:
    """F of bool borders `(F, H, W)`, float64 `(F,)`; 0 where either has no pixel."""
    near = _dilate(torch.stack([found, wanted], dim=1), radius)
    hits = torch.stack([found & near[:, 1], wanted & near[:, 0]], dim=1).flatten(2).sum(dim=2).double()
    totals = torch.stack([found, wanted], dim=1).flatten(2).sum(dim=2).double()
    precision, recall = (hits / totals.clamp(min=1)).unbind(dim=1)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def _dilate(borders: Tensor, radius: int) -> Tensor:
    # a square is a row of columns: two passes of 2r + 1 comparisons instead of (2r + 1)²
    grown = F.max_pool2d(borders.float(), (2 * radius + 1, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(grown, (1, 2 * radius + 1), stride=1, padding=(0, radius)) > 0


def boundary_f(
    pred: Tensor,
    true: Tensor,
    valid: Tensor | None = None,
    *,
    level: Literal["video", "image"] = "video",
    tolerance: float = 0.0075,
    resolution: tuple[int, int] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """F-measure of the borders between slots: how near they lie to the borders between true masks, and these to them.

    Protocol: hard labels (soft masks resized bilinearly to the size of `true`, then argmax). All borders of a frame
    count, whichever slots or masks they separate, so that cutting the background into parts costs precision. A border
    pixel is found if one of the other map lies in a square of `2 r + 1` pixels around it, r being the tolerance.
    F = 2 P R / (P + R), 0 where slots have no border. Frames without a true border are skipped. Mean over the frames
    of a video, then over videos (`level="video"`), or over all frames (`"image"`).

    Args:
        pred: integer labels `(B, T, H, W)`, or float or bool masks `(B, T, S, h, w)`.
        true: bool masks `(B, T, C, H, W)`; where they overlap, the first wins; pixels without any are a region too.
        valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.
        level: "video" or "image".
        tolerance: distance that counts as found, as a share of the image's diagonal; at least one pixel.
        resolution: `(h, w)` at which to evaluate; None takes the size of `true`.
        reduction: "mean", or "none" for one value an item, NaN where it is skipped.

    Returns:
        Float64 scalar in [0, 1] (NaN if no item counts), or `(B,)` / `(B, T)` with `reduction="none"`.

    Raises:
        ShapeError: if the inputs do not fit; the message says how.
        ConfigError: if `level`, `reduction` or `tolerance` is unknown or out of range.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 1, 1, 0, 0, 0, 0]], [[0, 0, 0, 0, 1, 1, 1, 1]]]]], dtype=torch.bool)
        >>> boundary_f(torch.tensor([[[[0, 0, 0, 0, 0, 1, 1, 1]]]]), true).item()  # one pixel off
        1.0
        >>> boundary_f(torch.tensor([[[[0, 2, 2, 2, 1, 1, 1, 1]]]]), true).item()  # a border too many
        0.6666666666666666

    Source: F of F. Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation",
    CVPR 2016 (DAVIS), whose tolerance this is; there borders are matched object by object.
    """
    validate_level(level, reduction)
    values, counted = boundary_f_values(pred, true, valid, tolerance=tolerance, resolution=resolution)
    if level == "video":
        values, counted = frame_mean(values, counted)
    return reduce_values(values, counted, reduction)


def frame_mean(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the frames of each video that count.

    Args:
        values: `(B, T)`.
        counted: bool `(B, T)`.

    Returns:
        Values and counted (bool: any frame counts), both `(B,)`.

    Example:
        >>> import torch
        >>> values, counted = frame_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
        >>> values.tolist(), counted.tolist()
        ([2.0], [True])
    """
    number = counted.sum(dim=1)
    return values.masked_fill(~counted, 0.0).sum(dim=1) / number.clamp(min=1), number > 0
