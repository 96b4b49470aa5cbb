"""Surplus slots: how many share an object, how many hold nothing."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.metrics.functional.contingency import Contingency, contingency
from ssync_pl.metrics.functional.prepare import frame_validity
from ssync_pl.metrics.functional.reduction import reduce_values

__all__ = ["slots_per_object", "slots_per_object_values", "unused_slot_values", "unused_slots", "validate_share"]


def validate_share(min_share: float) -> float:
    """Check the `min_share` argument.

    Args:
        min_share: share of an object's pixels, in [0, 1).

    Returns:
        The share.

    Raises:
        ConfigError: if it is out of range.

    Example:
        >>> validate_share(0.01)
        0.01
    """
    if not 0.0 <= min_share < 1.0:
        raise ConfigError(
            f"Expected argument `min_share` to be a share of an object's pixels in [0, 1), but got {min_share}."
        )
    return float(min_share)


def slots_per_object_values(counts: Contingency, min_share: float = 0.01) -> tuple[Tensor, Tensor]:
    """Mean number of slots of an object, and which items have an object with a slot.

    Args:
        counts: tables `(..., C, S)`; drop the background first. What of a slot lies in no row is its background.
        min_share: slots that win a smaller share of the object are left out.

    Returns:
        Values (float64) and counted (bool), both `(...)`.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 1, 1, 0, 0]], [[0, 0, 0, 0, 1, 1]]]]], dtype=torch.bool)
        >>> values, counted = slots_per_object_values(contingency(torch.tensor([[[[0, 0, 1, 1, 2, 2]]]]), true))
        >>> values.tolist(), counted.tolist()
        ([[1.5]], [[True]])
    """
    table = counts.table
    if 0 in table.shape[-2:]:
        empty = table.new_zeros(table.shape[:-2])
        return empty, empty.bool()
    background = counts.slot_sizes - table.sum(dim=-2)
    # A slot belongs to the segment that most of it lies in; ties with the background go to the background.
    best, owner = table.max(dim=-2)
    owned = torch.zeros_like(table, dtype=torch.bool).scatter_(-2, owner.unsqueeze(-2), True)
    owned &= (best > background).unsqueeze(-2)
    owned &= (table > 0) & (table >= min_share * table.sum(dim=-1, keepdim=True))
    slots = owned.sum(dim=-1)
    number = (slots > 0).sum(dim=-1)
    return slots.sum(dim=-1).double() / number.clamp(min=1), number > 0


def slots_per_object(
    pred: Tensor,
    true: Tensor,
    valid: Tensor | None = None,
    *,
    min_share: float = 0.01,
    ignore_background: bool = False,
    ignore_overlaps: bool = False,
    resolution: tuple[int, int] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Slots that an object is cut into: 1 is perfect, more is over-segmentation.

    Protocol: hard labels (soft masks resized bilinearly to the size of `true`, then argmax), over all frames of a
    video. A slot belongs to the true segment, background included, that holds most of its pixels, and counts for an
    object if it wins at least `min_share` of the object's pixels. Mean over the objects that have a slot of their own,
    then over videos that have such an object. Objects without a slot of their own are left out: a missed object must
    not make up for one that is cut in two. mIoU says how many are missed.

    Args:
        pred: integer labels `(B, T, H, W)`, or float or bool masks `(B, T, S, h, w)`.
        true: bool masks `(B, T, C, H, W)`, channel 0 = background where the set has one.
        valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.
        min_share: slots that win a smaller share of the object's pixels are left out, in [0, 1).
        ignore_background: channel 0 is the background and no object.
        ignore_overlaps: leave out pixels with several true masks, in true masks and slots, instead of refusing them.
        resolution: `(h, w)` at which to evaluate; None takes the size of `true`.
        reduction: "mean", or "none" for one value a video, NaN where it is skipped.

    Returns:
        Float64 scalar of at least 1 (NaN if no video counts), or `(B,)` with `reduction="none"`.

    Raises:
        ShapeError: if the inputs do not fit; the message says how.
        ConfigError: if `min_share` is out of range.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0, 0, 0]], [[0, 0, 1, 1, 1, 1]]]]], dtype=torch.bool)
        >>> slots_per_object(torch.tensor([[[[0, 0, 1, 1, 2, 2]]]]), true, ignore_background=True).item()
        2.0
    """
    validate_share(min_share)
    counts = contingency(
        pred, true, valid, has_background=ignore_background, ignore_overlaps=ignore_overlaps, resolution=resolution
    ).videos()
    counts = counts.foreground() if ignore_background else counts
    return reduce_values(*slots_per_object_values(counts, min_share), reduction)


def unused_slot_values(masks: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Slots that win no place of a video, and which videos count.

    Args:
        masks: scores `(B, T, S, h, w)` at the host's own size; the largest over S wins.
        valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.

    Returns:
        Values (float64) and counted (bool: a frame is valid), both `(B,)`.

    Raises:
        ShapeError: if the masks are no scores of this shape, or `valid` does not fit.

    Example:
        >>> import torch
        >>> values, counted = unused_slot_values(torch.zeros(1, 2, 3, 4, 4))
        >>> values.tolist(), counted.tolist()
        ([2.0], [True])
    """
    if masks.ndim != 5 or 0 in masks.shape[2:] or not masks.is_floating_point():
        raise ShapeError(
            f"Expected argument `masks` to be float scores (B, T, S, h, w), but got {masks.dtype} of shape "
            f"{tuple(masks.shape)}. Labels do not say how many slots there are."
        )
    batch, frames, slots = masks.shape[:3]
    keep = frame_validity(valid, (batch, frames))
    labels = masks.max(dim=2).indices
    wins = (labels.unsqueeze(2) == torch.arange(slots, device=masks.device)[:, None, None]).flatten(3).any(dim=3)
    counted = torch.ones(batch, dtype=torch.bool, device=masks.device)
    if keep is not None:
        keep = keep.to(masks.device)
        wins, counted = wins & keep.unsqueeze(2), keep.any(dim=1)
    return (slots - wins.any(dim=1).sum(dim=1)).double(), counted


def unused_slots(masks: Tensor, valid: Tensor | None = None, *, reduction: Literal["mean", "none"] = "mean") -> Tensor:
    """Number of slots that win no place of a video.

    Counted at the host's own size, before masks are enlarged, as `used_slots` of the hosts: together they are the
    number of slots.

    Args:
        masks: scores `(B, T, S, h, w)`; the largest over S wins.
        valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.
        reduction: "mean" over videos, or "none" for one value a video, NaN where it is skipped.

    Returns:
        Float64 scalar in [0, S - 1] (NaN if no video counts), or `(B,)` with `reduction="none"`.

    Raises:
        ShapeError: if the masks are no scores of this shape, or `valid` does not fit.

    Example:
        >>> import torch
        >>> masks = torch.zeros(1, 1, 3, 2, 2)
        >>> masks[:, :, 2, :, 0] = 1.0
        >>> unused_slots(masks).item()
        1.0
    """
    return reduce_values(*unused_slot_values(masks, valid), reduction)
