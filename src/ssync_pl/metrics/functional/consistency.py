"""Whether an object keeps its slot from frame to frame."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ssync_pl.metrics.functional.contingency import Contingency, contingency
from ssync_pl.metrics.functional.reduction import reduce_values

__all__ = ["identity_values", "slot_identity"]


def identity_values(counts: Contingency) -> tuple[Tensor, Tensor]:
    """Share of an object's steps in time at which its slot stays the same, and which videos have such a step.

    Args:
        counts: tables `(B, T, C, S)` of frames; drop the background first.

    Returns:
        Values (float64) and counted (bool), both `(B,)`.

    Example:
        >>> import torch
        >>> true = torch.ones(1, 3, 1, 1, 4, dtype=torch.bool)
        >>> pred = torch.tensor([[[[0, 0, 0, 1]], [[0, 0, 0, 1]], [[1, 1, 1, 0]]]])
        >>> values, counted = identity_values(contingency(pred, true))
        >>> values.tolist(), counted.tolist()
        ([0.5], [True])
    """
    table = counts.table
    if 0 in table.shape[-2:]:
        empty = table.new_zeros(table.shape[0])
        return empty, empty.bool()
    largest = table.amax(dim=-1, keepdim=True)
    visible = largest.squeeze(-1) > 0
    # Slots that share the first place all count as the object's: no tie is decided by the order of slots.
    holders = table == largest
    kept = (holders[:, 1:] & holders[:, :-1]).any(dim=-1)
    steps = visible[:, 1:] & visible[:, :-1]
    number = steps.sum(dim=(1, 2))
    return (kept & steps).sum(dim=(1, 2)).double() / number.clamp(min=1), number > 0


def slot_identity(
    pred: Tensor,
    true: Tensor,
    valid: Tensor | None = None,
    *,
    ignore_background: bool = False,
    ignore_overlaps: bool = False,
    resolution: tuple[int, int] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """How often an object keeps its slot from a frame to the next.

    Protocol: hard labels (soft masks resized bilinearly to the size of `true`, then argmax). An object's slot in a
    frame is the one that wins most of its pixels. Over all objects and pairs of consecutive frames in which the object
    is visible in both, the share at which the slot stays the same; then the mean over videos with such a pair. One slot
    that takes everything scores 1, so read it beside ARI.

    Args:
        pred: integer labels `(B, T, H, W)`, or float or bool masks `(B, T, S, h, w)`.
        true: bool masks `(B, T, C, H, W)`, channel 0 = background where the set has one.
        valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.
        ignore_background: channel 0 is the background and no object.
        ignore_overlaps: leave out pixels with several true masks, in true masks and slots, instead of refusing them.
        resolution: `(h, w)` at which to evaluate; None takes the size of `true`.
        reduction: "mean", or "none" for one value a video, NaN where it is skipped.

    Returns:
        Float64 scalar in [0, 1] (NaN if no video counts), or `(B,)` with `reduction="none"`.

    Raises:
        ShapeError: if the inputs do not fit; the message says how.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0]], [[0, 0, 1, 1]]]]], dtype=torch.bool).expand(1, 2, 2, 1, 4)
        >>> slot_identity(torch.tensor([[[[0, 0, 1, 1]], [[0, 0, 2, 2]]]]), true).item()
        0.5
    """
    counts = contingency(
        pred, true, valid, has_background=ignore_background, ignore_overlaps=ignore_overlaps, resolution=resolution
    )
    counts = counts.foreground() if ignore_background else counts
    return reduce_values(*identity_values(counts), reduction)
