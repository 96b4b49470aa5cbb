"""From the tensors of two modules, in whatever layout, to one pair of maps: the shapes say which axis is what."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssync_pl.adapters.base import resolve_grid
from ssync_pl.adapters.heads import separate_heads
from ssync_pl.errors import HostError, ShapeError
from ssync_pl.method.labels import compute_dtype
from ssync_pl.method.maps import SSyncMaps

__all__ = ["Layout", "MapKind", "Pair", "Seen", "find_pair", "join_maps", "layouts", "softmax_gap"]

MapKind = Literal["logits", "probs"]


class Seen(NamedTuple):
    """One map as a host computes it.

    Args:
        values: What each call gave, of one shape, in the order of the calls.
        axis: Axis of the slots in one of them.
        kind: Whether these are logits or probabilities.
        name: Where it was seen, for messages.
        heads: Whether there may be an axis of heads.

    Example:
        >>> Seen([torch.zeros(2, 3, 16)], 1, "logits", "corrector").axis
        1
    """

    values: list[Tensor]
    axis: int
    kind: MapKind
    name: str
    heads: bool = True

    def describe(self) -> str:
        """What was seen, in words.

        Returns:
            Shape, axis of the slots and number of calls.

        Example:
            >>> Seen([torch.zeros(2, 3, 16)] * 4, 1, "logits", "corrector").describe()
            '(2, 3, 16) with slots on axis 1 in 4 calls'
        """
        calls = f"{len(self.values)} call{'s' if len(self.values) != 1 else ''}"
        return f"{tuple(self.values[0].shape)} with slots on axis {self.axis} in {calls}"


@dataclass(frozen=True)
class Layout:
    """One way to read the axes of a map.

    Args:
        order: Axes in the order batch, frames, heads, slots, patches; axes of one entry behind the slots come last.
        batch: Size of the first axis.
        frames: T, or None where the first axis may be videos and frames together.
        heads: Number of heads; 1 without such an axis.
        slots: S.
        patches: ``(N,)`` or ``(H, W)``.

    Example:
        >>> layouts((2, 16, 3), 2, stacked=False)[0].patches
        (16,)
    """

    order: tuple[int, ...]
    batch: int
    frames: int | None
    heads: int
    slots: int
    patches: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of patches.

        Returns:
            N.

        Example:
            >>> layouts((2, 3, 4, 4), 1, stacked=False)[0].count
            16
        """
        return self.patches[0] * (self.patches[1] if len(self.patches) > 1 else 1)


class Pair(NamedTuple):
    """Attention and masks of one clip, read alike.

    Args:
        attention: What was seen of the slot attention.
        masks: What was seen of the decoder.
        attention_layout: How to read the first.
        masks_layout: How to read the second.
        batch: B videos.
        frames: T frames.

    Example:
        >>> Pair._fields[-2:]
        ('batch', 'frames')
    """

    attention: Seen
    masks: Seen
    attention_layout: Layout
    masks_layout: Layout
    batch: int
    frames: int

    @property
    def sides(self) -> tuple[tuple[Seen, Layout], tuple[Seen, Layout]]:
        """What was seen and how to read it.

        Returns:
            Attention, masks.

        Example:
            >>> seen = Seen([torch.zeros(2, 3, 16)], 1, "logits", "model")
            >>> find_pair([seen], [seen._replace(name="decoder")]).sides[0][0] is seen
            True
        """
        return (self.attention, self.attention_layout), (self.masks, self.masks_layout)


@lru_cache(maxsize=256)
def layouts(shape: tuple[int, ...], axis: int, stacked: bool) -> tuple[Layout, ...]:
    """All ways to read a map whose slot axis is known.

    Patches are the axes behind the slots, or the last ones before them where none are behind: ``(B, S, N)``,
    ``(B, S, H, W)``, ``(B, S, 1, H, W)``, ``(B, N, S)``, ``(B, heads, S, N)``, ``(B, T, S, H, W)`` and the like.

    Args:
        shape: Of the tensor.
        axis: Of the slots.
        stacked: The tensor is what several calls gave, stacked on axis 1, which is time then.

    Returns:
        Layouts, the plainest first.

    Example:
        >>> [(one.frames, one.heads) for one in layouts((2, 4, 3, 16), 2, stacked=False)]
        [(4, 1), (None, 4)]
    """
    behind = range(axis + 1, len(shape))
    wide = tuple(i for i in behind if shape[i] != 1)
    flat = tuple(i for i in behind if shape[i] == 1)
    if wide:
        choices = [(tuple(range(axis)), wide)] if len(wide) <= 2 else []
    else:
        choices = [(tuple(range(axis - n)), tuple(range(axis - n, axis))) for n in (1, 2) if axis - n >= 1]
    found = []
    for front, patches in choices:
        for roles in _roles(len(front), stacked):
            sizes = dict(zip(roles, (shape[i] for i in front), strict=True))
            found.append(
                Layout(
                    order=(*front, axis, *patches, *flat),
                    batch=sizes["batch"],
                    frames=sizes.get("frames"),
                    heads=sizes.get("heads", 1),
                    slots=shape[axis],
                    patches=tuple(shape[i] for i in patches),
                )
            )
    return tuple(found)


def _roles(count: int, stacked: bool) -> list[tuple[str, ...]]:
    if count == 1:
        return [] if stacked else [("batch",)]
    if count == 2:
        return [("batch", "frames")] if stacked else [("batch", "frames"), ("batch", "heads")]
    return [("batch", "frames", "heads")] if count == 3 else []


def find_pair(attention: Iterable[Seen], masks: Iterable[Seen]) -> Pair | None:
    """The two maps that belong together: the same slots, the same videos and frames, patches that fit.

    Of several, one with more patches than slots, then one whose grids divide each other as far as that can be told,
    then equal numbers of patches, then one without heads, then what was computed last.

    Args:
        attention: Candidates of the slot attention, in the order in which the host computed them.
        masks: The same of the decoder.

    Returns:
        The pair, or None.

    Example:
        >>> frames = Seen([torch.zeros(2, 3, 16)] * 4, 1, "logits", "corrector")
        >>> folded = Seen([torch.zeros(8, 3, 1, 8, 8)], 1, "logits", "decoder")
        >>> find_pair([frames], [folded])[-2:]
        (2, 4)
    """
    best: tuple[tuple[int, ...], Pair] | None = None
    for (i, one), (j, two) in itertools.product(enumerate(attention), enumerate(masks)):
        if (one.name, one.axis, one.values[0].shape) == (two.name, two.axis, two.values[0].shape):
            continue  # one softmax is not both maps
        for a, m in itertools.product(_layouts(one), _layouts(two)):
            sizes = _clip(a, m)
            if sizes is None or a.slots != m.slots or not _divide(a.count, m.count):
                continue
            more = min(a.count, m.count) > a.slots
            rank = (int(more), int(_nest(a, m)), int(a.count == m.count), -(a.heads > 1) - (m.heads > 1), j, i)
            if best is None or rank > best[0]:
                best = (rank, Pair(one, two, a, m, *sizes))
    return None if best is None else best[1]


def _layouts(seen: Seen) -> list[Layout]:
    shape, axis, stacked = tuple(seen.values[0].shape), seen.axis, len(seen.values) > 1
    if stacked:
        shape, axis = (shape[0], len(seen.values), *shape[1:]), axis + 1
    if seen.axis == 0:
        return []  # no batch
    return [one for one in layouts(shape, axis, stacked) if seen.heads or one.heads == 1]


def _clip(a: Layout, m: Layout) -> tuple[int, int] | None:
    if a.frames is None and m.frames is None:
        return (a.batch, 1) if a.batch == m.batch else None
    known, other = (a, m) if a.frames is not None else (m, a)
    frames = known.frames or 1
    if other.frames is None:
        return (known.batch, frames) if other.batch == known.batch * frames else None
    return (known.batch, frames) if (other.batch, other.frames) == (known.batch, frames) else None


def _nest(a: Layout, m: Layout) -> bool:
    """Whether the patches of one make up those of the other; a flat axis counts as a square where it can be one."""
    one, two = (_likely_grid(layout) for layout in (a, m))
    if one is None or two is None:
        return True
    coarse, fine = sorted((one, two))
    return all(side % small == 0 for side, small in zip(fine, coarse, strict=True))


def _likely_grid(layout: Layout) -> tuple[int, int] | None:
    if len(layout.patches) == 2:
        return layout.patches[0], layout.patches[1]
    side = math.isqrt(layout.count)
    return (side, side) if side * side == layout.count else None


def _divide(one: int, two: int) -> bool:
    return max(one, two) % min(one, two) == 0


class _Side(NamedTuple):
    """A map as ``(B, T, S, N)``: logits, probabilities, or both where heads were merged."""

    logits: Tensor | None
    probs: Tensor | None


def _arrange(seen: Seen, layout: Layout, batch: int, frames: int) -> _Side:
    value = seen.values[0] if len(seen.values) == 1 else torch.stack(seen.values, dim=1)
    if layout.order != tuple(range(value.ndim)):
        value = value.permute(layout.order)
    if layout.heads > 1:
        value = value.reshape(batch, frames, layout.heads, layout.slots, layout.count)
        if seen.kind == "probs":
            return _Side(None, value.mean(2))
        return _Side(*separate_heads(value, heads_dim=2, slots_dim=3))
    shape = (batch, frames, layout.slots, layout.count)
    value = value if tuple(value.shape) == shape else value.reshape(shape)
    return _Side(value, None) if seen.kind == "logits" else _Side(None, value)


def join_maps(
    pair: Pair, grid: tuple[int, int] | None = None, frame: tuple[int, int] | None = None, mark_absent: bool = False
) -> SSyncMaps:
    """Bring a pair to ``(B, T, S, N)`` on one grid.

    Where the grids differ, the finer map is averaged to the coarser grid as probabilities, which keeps the sum over
    slots at 1; attention logits are averaged too, for merging only. Several heads with a softmax each become their
    mean, see `ssync_pl.adapters.heads`.

    Args:
        pair: What belongs together.
        grid: ``(H, W)`` patches from the user.
        frame: Height and width of the frames, in pixels, for a flat axis of patches.
        mark_absent: Look for slots whose logits are minus infinity (or the smallest number) in the whole clip, and
            mark them in ``slot_valid``.

    Returns:
        The maps, with the host's own tensors where nothing has to be rearranged.

    Raises:
        HostError: There is no one grid, or the grids do not divide each other.

    Example:
        >>> frames = Seen([torch.zeros(2, 3, 16)] * 4, 1, "logits", "corrector")
        >>> folded = Seen([torch.zeros(8, 3, 1, 8, 8)], 1, "logits", "decoder")
        >>> join_maps(find_pair([frames], [folded]))
        SSyncMaps(B=2, T=4, S=3, grid=(4, 4), attention=logits, masks=probs, dtype=torch.float32, device=cpu)
    """
    attention = _arrange(pair.attention, pair.attention_layout, pair.batch, pair.frames)
    masks = _arrange(pair.masks, pair.masks_layout, pair.batch, pair.frames)
    valid = _present(attention, masks) if mark_absent else None
    fine = _grids(pair, grid, frame)
    coarse = min(fine)
    if any(side % small for size in fine for side, small in zip(size, coarse, strict=True)):
        raise HostError(
            f"Expected the grid of '{pair.attention.name}', {fine[0]}, and that of '{pair.masks.name}', {fine[1]}, to "
            "divide each other, but they do not. Pass grid=(H, W) of the attention, or write a HostAdapter that "
            "resamples."
        )
    attention, masks = (_pool(side, size, coarse) for side, size in zip((attention, masks), fine, strict=True))
    return SSyncMaps(
        attention_logits=attention.logits,
        attention_probs=attention.probs,
        # The decoder's logits serve the loss only, which reads the probabilities where there are any.
        mask_logits=masks.logits if masks.probs is None else None,
        mask_probs=masks.probs,
        grid=coarse,
        slot_valid=valid,
    )


def softmax_gap(seen: Seen, layout: Layout, batch: int, frames: int) -> tuple[float, float]:
    """How far the softmax over slots of a map is from the softmax that the host computed; this waits for the device.

    Args:
        seen: Inputs of the host's softmax.
        layout: How they are read.
        batch: B videos.
        frames: T frames.

    Returns:
        The largest difference, and how large it may be for numbers of this precision.

    Example:
        >>> seen = Seen([torch.randn(2, 16, 3)], 2, "logits", "decoder")
        >>> softmax_gap(seen, layouts((2, 16, 3), 2, stacked=False)[0], 2, 1)[0] < 1e-6
        True
    """
    with torch.no_grad():
        side = _arrange(seen, layout, batch, frames)
        used = seen._replace(values=[value.softmax(seen.axis) for value in seen.values], kind="probs")
        own = _arrange(used, layout, batch, frames).probs
        probs = side.logits.double().softmax(2) if side.probs is None and side.logits is not None else side.probs
        if own is None or probs is None:  # unreachable: probabilities were asked for
            raise ShapeError("Expected probabilities, but got none.")
        gap = float((probs.double() - own.double()).abs().nan_to_num().max())
    return gap, max(1e-5, 4 * torch.finfo(own.dtype).eps)


def _grids(
    pair: Pair, explicit: tuple[int, int] | None, frame: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    sides = (pair.attention_layout, pair.masks_layout)
    own = [(one.patches[0], one.patches[1]) if len(one.patches) == 2 else None for one in sides]
    if sides[0].count == sides[1].count:
        known = {size for size in (explicit, *own) if size is not None}
        if len(known) > 1:
            raise HostError(
                f"Expected one grid of patches, but got {', '.join(map(str, sorted(known)))} from argument `grid` and "
                "the maps' own rows and columns. Leave `grid` out, or make the maps agree."
            )
        size = resolve_grid(sides[0].count, next(iter(known), None), frame=frame)
        return size, size
    if explicit is not None and explicit[0] * explicit[1] not in (sides[0].count, sides[1].count):
        raise HostError(
            f"Expected argument `grid` to have {sides[0].count} patches, as '{pair.attention.name}' gives, or "
            f"{sides[1].count}, as '{pair.masks.name}' does, but got {explicit}."
        )
    first, second = (
        size
        or resolve_grid(
            side.count,
            explicit if explicit is not None and explicit[0] * explicit[1] == side.count else None,
            frame=frame or other,
        )
        for side, size, other in zip(sides, own, reversed(own), strict=True)
    )
    return first, second


def _pool(side: _Side, fine: tuple[int, int], coarse: tuple[int, int]) -> _Side:
    if fine == coarse:
        return side
    probs = side.probs
    if probs is None:
        logits = side.logits
        if logits is None:  # unreachable: each side has one of them
            raise ShapeError("Expected a map, but got none.")
        probs = logits.to(compute_dtype(logits.dtype)).softmax(2)
    return _Side(*(None if value is None else _average(value, fine, coarse) for value in (side.logits, probs)))


def _average(value: Tensor, fine: tuple[int, int], coarse: tuple[int, int]) -> Tensor:
    value = value.to(compute_dtype(value.dtype)).unflatten(3, fine)
    kernel = (fine[0] // coarse[0], fine[1] // coarse[1])
    return F.avg_pool2d(value.flatten(0, 1), kernel).unflatten(0, value.shape[:2]).flatten(3)


def _present(*sides: _Side) -> Tensor | None:
    present = None
    for side in sides:
        if side.logits is None:
            continue
        logits = side.logits.detach()
        # "Not below" and not "above", so that NaN counts as present and is found by the checks.
        here = ~(logits.amax((1, 3)) <= torch.finfo(logits.dtype).min / 2)
        present = here if present is None else present & here
    return present
