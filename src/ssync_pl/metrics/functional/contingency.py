"""One pass over the pixels: everything that ARI, mBO and mIoU need is in one small table a frame."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssync_pl.errors import ShapeError
from ssync_pl.metrics.functional.prepare import frame_validity, resize_nearest, to_labels, validate_masks

__all__ = ["Contingency", "contingency"]

# Frames are taken in groups so that the float masks stay small: 2**22 floats are 16 MiB.
_GROUP_ELEMENTS = 2**22


class Contingency(NamedTuple):
    """Pixel counts of true masks against slots.

    Attributes:
        table: float64 `(..., C, S)`, pixels that true mask c and slot s share.
        slot_sizes: float64 `(..., S)`, pixels of slot s, those without a true mask included.
        labelled: bool `(...)`, True where the item has any true mask.

    Example:
        >>> import torch
        >>> true = torch.ones(1, 2, 1, 4, 4, dtype=torch.bool)
        >>> counts = contingency(torch.zeros(1, 2, 4, 4, dtype=torch.long), true)
        >>> counts.table.shape, counts.videos().table.tolist()
        (torch.Size([1, 2, 1, 1]), [[[32.0]]])
    """

    table: Tensor
    slot_sizes: Tensor
    labelled: Tensor

    def videos(self) -> Contingency:
        """Sum the frames of each video: `(B, T, ...)` to `(B, ...)`."""
        return Contingency(self.table.sum(dim=1), self.slot_sizes.sum(dim=1), self.labelled.any(dim=1))

    def foreground(self) -> Contingency:
        """Drop true channel 0, the background; slots keep their background pixels."""
        return self._replace(table=self.table[..., 1:, :])


def contingency(
    pred: Tensor,
    true: Tensor,
    valid: Tensor | None = None,
    *,
    has_background: bool = False,
    ignore_overlaps: bool = False,
    resolution: tuple[int, int] | None = None,
) -> Contingency:
    """Count the pixels that each true mask shares with each slot, frame by frame.

    Args:
        pred: integer labels `(B, T, H, W)`, or float or bool masks `(B, T, S, h, w)`.
        true: bool masks `(B, T, C, H, W)`.
        valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.
        has_background: channel 0 of `true` is the background, so that every pixel must have a true mask.
        ignore_overlaps: drop pixels with several true masks instead of refusing them.
        resolution: `(h, w)` at which to evaluate; None takes the size of `true`.

    Returns:
        Counts with the leading dimensions `(B, T)`; frames that are not valid count nothing.

    Raises:
        ShapeError: if inputs do not fit, true masks overlap without `ignore_overlaps`, or pixels lack a true mask
            although `has_background` is set.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0]], [[0, 0, 1, 1]]]]], dtype=torch.bool)
        >>> contingency(torch.tensor([[[[0, 0, 0, 1]]]]), true).table.tolist()
        [[[[2.0, 0.0], [1.0, 1.0]]]]
    """
    validate_masks(pred, true, resolution)
    batch, frames, channels = true.shape[:3]
    keep = frame_validity(valid, (batch, frames))
    size = (int(true.shape[-2]), int(true.shape[-1])) if resolution is None else resolution
    flat_pred, flat_true = pred.flatten(0, 1), true.flatten(0, 1)
    if keep is not None:
        # Padding may hold anything: it is not even looked at.
        keep = keep.to(true.device).flatten()
        flat_pred, flat_true = flat_pred[keep], flat_true[keep]
    if pred.ndim == 4:
        flat_pred = _compact(flat_pred)
        slots = int(flat_pred.max()) + 1 if flat_pred.numel() else 1
    else:
        slots = int(pred.shape[2])
    per_group = max(1, _GROUP_ELEMENTS // ((slots + channels) * size[0] * size[1]))
    parts = [torch.zeros(batch * frames, *shape, device=true.device) for shape in ((channels, slots), (slots,), (2,))]
    places = torch.arange(batch * frames, device=true.device)
    places = places if keep is None else places[keep]
    # Autocast would round the counts to bfloat16.
    with torch.no_grad(), torch.autocast(device_type=true.device.type, enabled=False):
        for start in range(0, len(places), per_group):
            group = slice(start, start + per_group)
            labels = to_labels(flat_pred[group], size)
            masks = resize_nearest(flat_true[group], size)
            for part, value in zip(parts, _count(labels, masks, slots, ignore_overlaps), strict=True):
                part[places[group]] = value
    table, slot_sizes, cover = (part.double().unflatten(0, (batch, frames)) for part in parts)
    _check_cover(cover, size[0] * size[1], has_background, ignore_overlaps)
    return Contingency(table, slot_sizes, cover[..., 0] > 0)


def _compact(labels: Tensor) -> Tensor:
    """Renumber sparse label values so that the table stays small."""
    if labels.numel() and int(labels.max()) >= 256:
        return torch.unique(labels, return_inverse=True)[1]
    return labels


def _count(labels: Tensor, masks: Tensor, slots: int, ignore_overlaps: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tables `(F, C, S)`, slot sizes `(F, S)` and numbers of labelled and overlapping pixels `(F, 2)`."""
    # float32 is exact here: the sums are whole numbers below 2**24 (16.7 million pixels a frame).
    true = masks.flatten(-2).float()
    owners = labels.flatten(-2)[:, None] == torch.arange(slots, device=labels.device)[:, None]
    won = owners.float()
    depth = true.sum(dim=1)
    overlapping = depth > 1
    cover = torch.stack([(depth > 0).sum(dim=-1), overlapping.sum(dim=-1)], dim=-1).float()
    if ignore_overlaps:
        won = won.masked_fill(overlapping[:, None], 0.0)
    return torch.bmm(true, won.transpose(1, 2)), won.sum(dim=-1), cover


def _check_cover(cover: Tensor, pixels: int, has_background: bool, ignore_overlaps: bool) -> None:
    labelled, overlapping = cover.unbind(-1)
    if not ignore_overlaps and bool(overlapping.any()):
        raise ShapeError(
            f"Expected true masks that do not overlap, but got {int(overlapping.sum())} pixels with several masks. "
            "Do `ignore_overlaps=True` to leave these pixels out."
        )
    if has_background:
        missing = (pixels - labelled) * (labelled > 0)
        if bool(missing.any()):
            raise ShapeError(
                "Expected every pixel to have a true mask, because channel 0 is said to be the background, "
                f"but got {int(missing.sum())} pixels without one. "
                "Do `ignore_background=False` (`has_background=False`) for sets without a background channel."
            )
