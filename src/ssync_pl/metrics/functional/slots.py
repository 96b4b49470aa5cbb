"""What becomes of slots: how many share an object, how many are in use, whether objects keep theirs over time."""

import torch
from torch import Tensor

from ssync_pl.errors import require, require_shape
from ssync_pl.metrics.functional.contingency import Contingency
from ssync_pl.metrics.functional.scene import counted_frames


def slots_per_object(counts: Contingency, min_share: float = 0.01) -> Tensor:
    """Computes the number of slots that an object is cut into: 1 is perfect, more is over-segmentation.

    A slot belongs to the true segment, background included, that holds most of its pixels, and counts for an object
    if it wins at least `min_share` of the object's pixels. Mean over the objects that have a slot of their own: a
    missed object must not make up for one that is cut in two. mIoU says how many are missed.

    Args:
        counts: tables `(..., C, S)`; drop the background first. Pixels of a slot in no row are its background.
        min_share: slots that win a smaller share of the object are left out, in [0, 1].

    Returns:
        Float64 `(...)`, at least 1; NaN for items in which no object has a slot.

    Raises:
        ConfigError: `min_share` is out of range.
    """
    require(0.0 <= min_share <= 1.0, "`min_share` to be a share in [0, 1]", min_share)
    table = counts.table
    if not table.shape[-2]:
        return torch.full_like(table.sum(dim=(-2, -1)), torch.nan)
    background = counts.slot_sizes - table.sum(dim=-2)
    best, owner = table.max(dim=-2)
    owned = torch.zeros_like(table, dtype=torch.bool).scatter_(-2, owner.unsqueeze(-2), True)
    owned &= (best > background).unsqueeze(-2)  # ties with the background go to the background
    owned &= (table > 0) & (table >= min_share * table.sum(dim=-1, keepdim=True))
    slots = owned.sum(dim=-1)
    return slots.sum(dim=-1).double() / (slots > 0).sum(dim=-1)


def slot_identity(counts: Contingency) -> Tensor:
    """Computes how often an object keeps its slot from one frame to the next.

    An object's slot in a frame is the one that wins most of its pixels. Over all objects and pairs of consecutive
    frames in which the object is visible in both, the share at which the slot stays the same. One slot that takes
    everything scores 1, so read it beside ARI.

    Args:
        counts: tables `(B, T, C, S)` of frames; drop the background first.

    Returns:
        Float64 `(B,)` in [0, 1]; NaN for videos without such a pair.
    """
    table = counts.table
    largest = table.amax(dim=-1, keepdim=True)
    visible = largest.squeeze(-1) > 0
    # Slots that share the first place all count as the object's: no tie is decided by the order of slots.
    holders = table == largest
    kept = (holders[:, 1:] & holders[:, :-1]).any(dim=-1)
    steps = visible[:, 1:] & visible[:, :-1]
    return (kept & steps).sum(dim=(1, 2)).double() / steps.sum(dim=(1, 2))


def used_slots(masks: Tensor, valid: Tensor | None = None) -> Tensor:
    """Counts the slots that win at least one place of a video, at the host's own size, before masks are enlarged.

    Args:
        masks: scores `(B, T, S, h, w)`; the largest over S wins.
        valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.

    Returns:
        Float64 `(B,)` in [1, S]; NaN for videos without a valid frame.

    Raises:
        ShapeError: the masks are no scores of this shape, or `valid` does not fit.
    """
    fits = masks.ndim == 5 and 0 not in masks.shape[2:] and masks.is_floating_point()
    advice = "Labels do not say how many slots there are."
    require_shape(fits, "`masks` to be float scores (B, T, S, h, w)", masks, advice=advice)
    winners = masks.max(dim=2, keepdim=True).indices
    wins = torch.zeros_like(masks, dtype=torch.bool).scatter_(2, winners, True).flatten(3).any(dim=3)
    counted = counted_frames(valid, (int(masks.shape[0]), int(masks.shape[1])))
    counted = wins.new_ones(wins.shape[:2]) if counted is None else counted.to(masks.device)
    used = (wins & counted.unsqueeze(2)).any(dim=1).sum(dim=1).double()
    return used.masked_fill(~counted.any(dim=1), torch.nan)
