"""From labels or masks of any size to what the metrics count: one slot and one object per pixel."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssync_pl.errors import ShapeError, require_shape

_INTEGER_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Soft masks are enlarged for a group of frames at a time: 2**22 floats are 16 MiB.
_GROUP_ELEMENTS = 2**22


class Scene(NamedTuple):
    """The F frames of a batch that count."""

    slots: Tensor  # int64 (F, H, W), slot of each pixel
    objects: Tensor  # int64 (F, H, W), channel of the first true mask of each pixel; -1 without one
    overlaps: Tensor  # bool (F, H, W), pixels with several true masks
    places: Tensor  # int64 (F,), places of the frames in B * T
    shape: tuple[int, int]  # (B, T)
    num_slots: int
    num_objects: int

    def spread(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Puts values `(F, ...)` at their videos and frames, float64 `(B, T, ...)`."""
        size = (self.shape[0] * self.shape[1], *values.shape[1:])
        out = torch.full(size, fill, dtype=torch.float64, device=values.device)
        return out.index_copy(0, self.places, values.double()).unflatten(0, self.shape)


def read_scene(pred: Tensor, true: Tensor, valid: Tensor | None = None) -> Scene:
    """Reads predicted and true masks as published: soft masks are resized bilinearly to the true ones, then argmax.

    Args:
        pred: integer labels `(B, T, H, W)`; or masks `(B, T, S, h, w)`, float (probabilities) or bool (one-hot).
        true: bool masks `(B, T, C, H, W)`.
        valid: bool `(B,)` or `(B, T)`, False for padding, which may hold anything; None counts all.

    Returns:
        The scene.

    Raises:
        ShapeError: the inputs do not fit, or `pred` holds negative labels, NaN, or bool masks that are not one-hot.
    """
    _check_shapes(pred, true)
    size = (int(true.shape[-2]), int(true.shape[-1]))
    shape = (int(true.shape[0]), int(true.shape[1]))
    counted = counted_frames(valid, shape)
    places = torch.arange(shape[0] * shape[1], device=true.device)
    flat_pred, flat_true = pred.flatten(0, 1), true.flatten(0, 1)
    if counted is not None:
        places = places[counted.to(true.device).flatten()]
        flat_pred, flat_true = flat_pred[places], flat_true[places]
    slots, num_slots = _read_labels(flat_pred, size) if pred.ndim == 4 else (_win(flat_pred, size), pred.shape[2])
    covered, first = flat_true.view(torch.uint8).max(dim=1)
    objects = torch.where(covered > 0, first, -1)
    overlaps = flat_true.sum(dim=1, dtype=torch.int16) > 1
    return Scene(slots, objects, overlaps, places, shape, int(num_slots), int(true.shape[2]))


def counted_frames(valid: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Spreads a validity mask `(B,)` or `(B, T)` over frames `(B, T)`; None where everything counts."""
    if valid is None:
        return None
    fits = valid.dtype == torch.bool and tuple(valid.shape) in (shape[:1], shape)
    require_shape(fits, f"`valid` to be bool of shape {shape[:1]} (videos) or {shape} (frames)", valid)
    return valid[:, None].expand(shape) if valid.ndim == 1 else valid


def labels_to_masks(labels: Tensor, num_classes: int) -> Tensor:
    """Returns one-hot masks of labels; a negative label belongs to no mask.

    Args:
        labels: integers `(..., H, W)` below `num_classes`.
        num_classes: number of channels C.

    Returns:
        Bool `(..., C, H, W)`.

    Raises:
        ShapeError: the labels are no integers, or one is `num_classes` or more.
    """
    require_shape(labels.dtype in _INTEGER_TYPES and labels.ndim >= 2, "`labels` to be integers (..., H, W)", labels)
    if labels.numel() and int(labels.max()) >= num_classes:
        raise ShapeError(f"Expected labels below num_classes={num_classes}, but got {int(labels.max())}.")
    return labels.unsqueeze(-3) == torch.arange(num_classes, device=labels.device)[:, None, None]


def _check_shapes(pred: Tensor, true: Tensor) -> None:
    fits = true.ndim == 5 and true.dtype == torch.bool and 0 not in true.shape[2:]
    advice = "Do `labels_to_masks(labels, num_classes)` with labels; images have T = 1."
    require_shape(fits, "`true` to be bool masks (B, T, C, H, W)", true, advice=advice)
    is_masks = pred.ndim == 5 and (pred.is_floating_point() or pred.dtype == torch.bool)
    fits = (is_masks or (pred.ndim == 4 and pred.dtype in _INTEGER_TYPES)) and 0 not in pred.shape[2:]
    require_shape(fits, "`pred` to be integer labels (B, T, H, W), or float or bool masks (B, T, S, h, w)", pred)
    same = pred.shape[:2] == true.shape[:2]
    require_shape(same, "`pred` and `true` of the same videos and frames (B, T)", pred, true)
    if pred.device != true.device:
        raise ShapeError(f"Expected `pred` and `true` on one device, but got {pred.device} and {true.device}.")


def _read_labels(labels: Tensor, size: tuple[int, int]) -> tuple[Tensor, int]:
    """Labels `(F, H, W)` at `size`, and one more than the largest."""
    labels = _resize_nearest(labels, size).long()
    low, high = (int(end) for end in labels.aminmax()) if labels.numel() else (0, 0)
    if low < 0:
        raise ShapeError(f"Expected `pred` to hold labels of at least 0, but got {low}. Give the rest a label, too.")
    if high >= 256:  # sparse values are renumbered, so that tables stay small
        names, labels = torch.unique(labels, return_inverse=True)
        high = len(names) - 1
    return labels, high + 1


def _win(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Slot that wins each pixel, `(F, H, W)`, of masks `(F, S, h, w)`."""
    if masks.dtype == torch.bool and bool((masks.sum(dim=1) != 1).any()):
        raise ShapeError("Expected bool `pred` to be one-hot over slots, but got pixels with no slot or several.")
    group = max(1, _GROUP_ELEMENTS // (masks.shape[1] * size[0] * size[1]))
    labels = []
    for part in masks.split(group):
        part = part.float()
        if part.shape[-2:] != torch.Size(size):
            part = F.interpolate(part, size=size, mode="bilinear")
        peak, winner = part.max(dim=1)
        if bool(peak.isnan().any()):
            raise ShapeError("Expected `pred` to be free of NaN, but got NaN masks. The model has diverged.")
        labels.append(winner)
    return torch.cat(labels) if labels else masks.new_zeros((0, *size), dtype=torch.int64)


def _resize_nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixels of `interpolate(mode="nearest-exact")`, which refuses bool and int64."""
    sides = zip(size, maps.shape[-2:], strict=True)
    rows, columns = (((2 * torch.arange(new, device=maps.device) + 1) * old) // (2 * new) for new, old in sides)
    return maps[..., rows[:, None], columns]
