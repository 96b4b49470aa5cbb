"""Heads and patches: how maps come to one over slots on one grid.

What the softmax of the host normalises decides how several heads of slot attention become one map.

* One softmax over slots and heads together (OCLF, AdaSlot): the attention of a slot is its sum over heads, which is the
  softmax over slots of the logsumexp over heads. The merged logits are exact. Use `joint_heads`.
* One softmax over slots in each head (SAVi, slot attention with ``heads``): the attention of a slot is its mean over
  heads. No raw logits have this softmax, since that of a logsumexp weighs each head by its own normaliser. The loss
  needs the mean of the probabilities, merging takes the mean of the logits. Use `separate_heads`.
  With one head both are the host's logits, to the bit.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssync_pl.errors import ConfigError, HostError
from ssync_pl.method.labels import compute_dtype
from ssync_pl.method.maps import SSyncMaps

Grid = tuple[int, int]


class SlotMap(NamedTuple):
    """One side's map: logits, probabilities, or both; beside probabilities, logits serve merging only."""

    logits: Tensor | None
    probs: Tensor | None = None


def stack_frames(values: list[Tensor], name: str) -> Tensor:
    """Stacks what a module gave for each frame, T tensors ``(B, ...)``, into a clip ``(B, T, ...)``.

    Raises HostError where it did not run, or shapes differ between frames, as with slots that grow inside a step.
    """
    check_frames(values, name)
    return torch.stack(values, dim=1)


def check_frames(values: list[Tensor], name: str) -> None:
    """Refuses frames that cannot be stacked."""
    if not values:
        raise HostError(f"Expected '{name}' to run inside the training step, but it did not.")
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) != 1:
        raise HostError(f"Expected '{name}' to give one shape for all frames, but got {shapes}.")


def check_grid(grid: Any) -> Grid | None:
    """Returns a user's ``(H, W)``, which a configuration file gives as a list, as a tuple; or None."""
    if grid is None:
        return None
    sides = list(grid) if isinstance(grid, (tuple, list)) else []
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ConfigError(f"Expected argument `grid` to be (H, W), two positive integers, but got {grid!r}.")
    return sides[0], sides[1]


def resolve_grid(
    patches: int,
    explicit: Grid | None = None,
    patch_size: int | tuple[int, int] | None = None,
    frame: tuple[int, int] | None = None,
) -> Grid:
    """Finds the rows and columns of a flat axis of patches.

    In this order: given by the user, ``explicit``; patch size with the frame's height and width; the one square patch
    size that cuts an oblong frame into this many patches; a perfect square, unless the frame is known to be oblong.
    Raises HostError where none of them tells it.
    """
    if explicit is not None:
        if explicit[0] * explicit[1] != patches:
            raise HostError(f"Expected argument `grid` to have {patches} patches, but got {tuple(explicit)}.")
        return int(explicit[0]), int(explicit[1])
    rows, columns = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size or (0, 0)
    if frame is not None and rows and columns and (frame[0] // rows) * (frame[1] // columns) == patches:
        return frame[0] // rows, frame[1] // columns
    side = math.isqrt(patches)
    if frame is None or frame[0] == frame[1]:
        if side * side == patches:
            return side, side
        raise HostError(f"Expected a grid for {patches} patches, which is no square. Pass grid=(H, W).")
    # Smaller patches are more patches, so the search ends at the first size that gives too many.
    for size in range(math.isqrt(frame[0] * frame[1] // patches), 0, -1):
        grid = (frame[0] // size, frame[1] // size)
        if grid[0] * grid[1] == patches:
            return grid
        if grid[0] * grid[1] > patches:
            break
    raise HostError(f"Expected square patches, but none cut {frame} pixels into {patches}. Pass grid=(H, W).")


def finer_grid(grid: Grid, patches: int) -> Grid:
    """Grid of a decoder with another number of patches than the attention, of the same proportions."""
    ratio = math.sqrt(patches / (grid[0] * grid[1]))
    finer = (round(grid[0] * ratio), round(grid[1] * ratio))
    if finer[0] * finer[1] != patches:
        raise HostError(f"Expected a decoder of {patches} patches to have the proportions of {grid}. Pass grid=(H, W).")
    return finer


def patch_stride(encoder: nn.Module | None) -> tuple[int, int] | None:
    """Stride of the first convolution whose kernels do not overlap: the patch embedding of a ViT."""
    for module in encoder.modules() if encoder is not None else ():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride and max(module.stride) > 1:
            return int(module.stride[0]), int(module.stride[1])
    return None


def frame_size(batch: Any) -> tuple[int, int] | None:
    """Finds height and width of the frames of a batch, in pixels, or None where it does not say so.

    Frames are tensors of 4 or 5 axes, ``(..., 3, H, W)`` or ``(..., H, W, 3)``, at ``video`` or ``image`` first.
    """
    values = list(batch) if isinstance(batch, (list, tuple)) else [batch]
    if isinstance(batch, Mapping):
        # Stored features (B, T, N, D) of a short clip would pass for frames of T colours.
        values = [*map(batch.get, ("video", "image")), *(value for key, value in batch.items() if key != "features")]
    for value in values:
        if isinstance(value, Tensor) and value.ndim in (4, 5):
            for rows, columns, colours in ((-2, -1, -3), (-3, -2, -1)):
                if value.shape[colours] in (1, 3, 4):
                    return int(value.shape[rows]), int(value.shape[columns])
    return None


def join_sides(
    attention: SlotMap,
    grid: Grid,
    masks: SlotMap,
    mask_grid: Grid,
    slot_valid: Tensor | None = None,
    frame_valid: Tensor | None = None,
) -> SSyncMaps:
    """Makes maps of two sides ``(B, T, S, N)``, each on its grid.

    The finer map is averaged to the coarser grid as probabilities, which keeps the sum over slots at 1; its logits are
    averaged too, for merging only. ``frame_valid`` ``(B, T)`` leaves out all patches of a frame. Raises HostError where
    the grids do not divide each other.
    """
    sides: tuple[Grid, Grid] = ((grid[0], grid[1]), (mask_grid[0], mask_grid[1]))
    coarse = min(sides)
    if any(side % small for size in sides for side, small in zip(size, coarse, strict=True)):
        both = f"the attention, {sides[0]}, and of the masks, {sides[1]}"
        raise HostError(f"Expected the grids of {both}, to divide each other. Pass grid=(H, W) of the attention.")
    attention, masks = (_pool(side, size, coarse) for side, size in zip((attention, masks), sides, strict=True))
    patches = coarse[0] * coarse[1]
    return SSyncMaps(
        attention_logits=attention.logits,
        attention_probs=attention.probs,
        # The decoder's logits serve the loss only, which reads the probabilities where there are any.
        mask_logits=masks.logits if masks.probs is None else None,
        mask_probs=masks.probs,
        grid=coarse,
        slot_valid=slot_valid,
        patch_valid=None if frame_valid is None else frame_valid.unsqueeze(2).expand(-1, -1, patches),
    )


def _pool(side: SlotMap, fine: Grid, coarse: Grid) -> SlotMap:
    if fine == coarse:
        return side
    logits, probs = side
    if probs is None and logits is not None:
        probs = logits.to(compute_dtype(logits.dtype)).softmax(2)

    def average(value: Tensor) -> Tensor:
        pixels = value.to(compute_dtype(value.dtype)).unflatten(3, fine).flatten(0, 1)
        kernel = (fine[0] // coarse[0], fine[1] // coarse[1])
        return F.avg_pool2d(pixels, kernel).unflatten(0, value.shape[:2]).flatten(3)

    return SlotMap(*(None if value is None else average(value) for value in (logits, probs)))


def joint_heads(logits: Tensor, heads_dim: int) -> Tensor:
    """Merges heads, at ``heads_dim``, that share one softmax over slots and heads, as in ``(B, S, heads, N)``.

    Returns logits without that axis, float32 at least where there are several heads; minus infinity marks absent slots.
    """
    if logits.shape[heads_dim] == 1:
        return logits.squeeze(heads_dim)
    logits = logits.to(compute_dtype(logits.dtype))
    absent = logits.isneginf()
    # The gradient of a logsumexp of minus infinities is NaN; finite stand-ins keep it at zero.
    merged = logits.masked_fill(absent, torch.finfo(logits.dtype).min).logsumexp(heads_dim)
    return merged.masked_fill(absent.all(heads_dim), float("-inf"))


def separate_heads(logits: Tensor, heads_dim: int, slots_dim: int) -> SlotMap:
    """Merges heads, at ``heads_dim``, that have a softmax over slots each, as in ``(B, heads, S, N)``.

    Returns means over heads of the logits and of the probabilities, float32 at least; of one head, its logits alone.
    """
    if logits.shape[heads_dim] == 1:
        return SlotMap(logits.squeeze(heads_dim))
    logits = logits.to(compute_dtype(logits.dtype))
    return SlotMap(logits.mean(heads_dim), logits.softmax(slots_dim).mean(heads_dim))
