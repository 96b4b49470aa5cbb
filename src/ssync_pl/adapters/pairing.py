"""From the tensors of two modules, in whatever layout, to one pair of maps: the shapes say which axis is what."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ssync_pl.adapters.grids import Grid, SlotMap, join_sides, resolve_grid, separate_heads
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps

MapKind = Literal["logits", "probs"]


class Seen(NamedTuple):
    """What each call gave, in their order, and the axis of the slots in one of them.

    ``heads`` is whether there may be an axis of heads, ``inside`` how many such softmaxes ran in a call at most.
    """

    values: list[Tensor]
    axis: int
    kind: MapKind
    name: str
    heads: bool = True
    inside: int = 1

    def describe(self) -> str:
        last = f", the last of {self.inside} in each" if self.inside > 1 else ""
        return f"{tuple(self.values[0].shape)} with slots on axis {self.axis} in {len(self.values)} call(s){last}"


@dataclass(frozen=True)
class Layout:
    """One way to read the axes of a map, in ``order``: batch, frames, heads, slots, patches.

    ``frames`` is None where the first axis may be videos and frames together; ``patches`` is ``(N,)`` or ``(H, W)``.
    """

    order: tuple[int, ...]
    batch: int
    frames: int | None
    heads: int
    slots: int
    patches: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.patches)

    @property
    def grid(self) -> Grid | None:
        return (self.patches[0], self.patches[1]) if len(self.patches) == 2 else None


class Pair(NamedTuple):
    """Attention and masks of one clip and how to read each, B videos of T frames."""

    attention: Seen
    masks: Seen
    layouts: tuple[Layout, Layout]
    batch: int
    frames: int


def layouts(shape: tuple[int, ...], axis: int, stacked: bool) -> tuple[Layout, ...]:
    """All ways to read a map whose slot axis is known, the plainest first.

    Patches are the axes behind the slots, or the last ones before them where none are behind: ``(B, S, N)``,
    ``(B, S, H, W)``, ``(B, S, 1, H, W)``, ``(B, N, S)``, ``(B, heads, S, N)``, ``(B, T, S, H, W)`` and the like. A
    ``stacked`` map has the calls, which are frames, on axis 1.
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
            order, counts = (*front, axis, *patches, *flat), tuple(shape[i] for i in patches)
            found.append(Layout(order, sizes["batch"], sizes.get("frames"), sizes.get("heads", 1), shape[axis], counts))
    return tuple(found)


def _roles(count: int, stacked: bool) -> list[tuple[str, ...]]:
    folded: list[tuple[str, ...]] = [("batch",), ("batch", "heads")]
    known: list[tuple[str, ...]] = [("batch", "frames"), ("batch", "frames", "heads")]
    return [roles for roles in (known if stacked else [*known, *folded]) if len(roles) == count]


def find_pair(attention: Iterable[Seen], masks: Iterable[Seen]) -> Pair | None:
    """Finds the two maps that belong together: the same slots, the same videos and frames, patches that fit.

    Of several candidates, given in the order of the host: one with more patches than slots, then one whose grids divide
    each other, then equal numbers of patches, then one without heads, then the last.
    """
    best: tuple[tuple[int, ...], Pair] | None = None
    for (i, one), (j, two) in itertools.product(enumerate(attention), enumerate(masks)):
        alike = (one.name, one.axis, one.values[0].shape) == (two.name, two.axis, two.values[0].shape)
        if alike or (one.heads and two.heads and one.values[-1] is two.values[-1]):
            continue  # one softmax is not both maps
        for a, m in itertools.product(_layouts(one), _layouts(two)):
            sizes, (few, many) = _clip(a, m), sorted((a.count, m.count))
            if sizes is not None and a.slots == m.slots and many % few == 0:
                heads = (a.heads > 1) + (m.heads > 1)
                rank = (int(few > a.slots), int(_nest(a, m)), int(few == many), -heads, j, i)
                if best is None or rank > best[0]:
                    best = (rank, Pair(one, two, (a, m), *sizes))
    return None if best is None else best[1]


def _layouts(seen: Seen) -> list[Layout]:
    shape, calls = tuple(seen.values[0].shape), len(seen.values)
    stacked = (shape[0], calls, *shape[1:]) if calls > 1 else shape
    found = layouts(stacked, seen.axis + (calls > 1), calls > 1) if seen.axis else ()  # without a batch, none
    return [one for one in found if seen.heads or one.heads == 1]


def _clip(a: Layout, m: Layout) -> tuple[int, int] | None:
    """Videos and frames of both, where these are the same; one may have them folded together."""
    if a.frames is None and m.frames is None:
        return (a.batch, 1) if a.batch == m.batch else None
    known, other = (a, m) if a.frames is not None else (m, a)
    frames = known.frames or 1
    same = other.batch == (known.batch * frames if other.frames is None else known.batch)
    return (known.batch, frames) if same and other.frames in (None, frames) else None


def _nest(a: Layout, m: Layout) -> bool:
    """Whether the patches of one make up those of the other; a flat axis counts as a square where it can be one."""
    sides = [math.isqrt(layout.count) for layout in (a, m)]
    squares = [(side, side) if side * side == one.count else None for side, one in zip(sides, (a, m), strict=True)]
    one, two = a.grid or squares[0], m.grid or squares[1]
    if one is None or two is None:
        return True
    coarse, fine = sorted((one, two))
    return fine[0] % coarse[0] == 0 and fine[1] % coarse[1] == 0


def sources(pair: Pair, frame: int) -> Tensor:
    """Finds the frames ``(B, T)`` whose attention has a part in the masks of one frame of the first video, as bool."""
    logits, probs = _arrange(pair.masks, pair.layouts[1], pair.batch, pair.frames)
    read = torch.as_tensor(probs if logits is None else logits)[0, frame].square().sum()
    values = pair.attention.values
    found = torch.autograd.grad(read, values, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(one) if part is None else part.abs() for one, part in zip(values, found, strict=True)]
    seen = pair.attention._replace(values=parts, kind="probs")
    return torch.as_tensor(_arrange(seen, pair.layouts[0], pair.batch, pair.frames).probs).amax((2, 3)) > 0


def _arrange(seen: Seen, layout: Layout, batch: int, frames: int) -> SlotMap:
    """Brings what was seen to ``(B, T, S, N)``, the host's own tensor where nothing has to be rearranged."""
    value = seen.values[0] if len(seen.values) == 1 else torch.stack(seen.values, dim=1)
    if layout.order != tuple(range(value.ndim)):
        value = value.permute(layout.order)
    if layout.heads > 1:
        value = value.reshape(batch, frames, layout.heads, layout.slots, layout.count)
        return SlotMap(None, value.mean(2)) if seen.kind == "probs" else separate_heads(value, 2, 3)
    shape = (batch, frames, layout.slots, layout.count)
    value = value if tuple(value.shape) == shape else value.reshape(shape)
    return SlotMap(value) if seen.kind == "logits" else SlotMap(None, value)


def join_maps(
    pair: Pair, grid: Grid | None = None, frame: tuple[int, int] | None = None, mark_absent: bool = False
) -> SSyncMaps:
    """Brings a pair to ``(B, T, S, N)`` on one grid, the coarser of both.

    ``mark_absent`` puts slots whose logits are minus infinity, or nearly so, in the whole clip to ``slot_valid``.
    """
    sides = zip((pair.attention, pair.masks), pair.layouts, strict=True)
    attention, masks = (_arrange(seen, layout, pair.batch, pair.frames) for seen, layout in sides)
    first, second = _grids(pair.layouts, grid, frame)
    return join_sides(attention, first, masks, second, _present(attention, masks) if mark_absent else None)


def _grids(sides: tuple[Layout, Layout], explicit: Grid | None, frame: tuple[int, int] | None) -> list[Grid]:
    """Grids of attention and masks: their own rows and columns, what the user says, or what the frames tell."""
    counts = [side.count for side in sides]
    if explicit is not None and math.prod(explicit) not in counts:
        numbers = " or ".join(map(str, sorted({*counts})))
        raise HostError(f"Expected argument `grid` to have {numbers} patches, but got {explicit}.")
    if counts[0] == counts[1]:
        known = {size for size in (explicit, *(side.grid for side in sides)) if size is not None}
        if len(known) > 1:
            raise HostError(f"Expected one `grid`, as the maps' own rows and columns, but got {sorted(known)}.")
        return [resolve_grid(counts[0], next(iter(known), None), frame=frame)] * 2
    stated = [explicit if explicit is not None and math.prod(explicit) == count else None for count in counts]
    return [
        side.grid or resolve_grid(side.count, size, frame=frame or other.grid)
        for side, size, other in zip(sides, stated, reversed(sides), strict=True)
    ]


def _present(*sides: SlotMap) -> Tensor | None:
    logits = [side.logits.detach() for side in sides if side.logits is not None]
    # "Not below" and not "above", so that NaN counts as present and is found by the checks.
    present = [~(one.amax((1, 3)) <= torch.finfo(one.dtype).min / 2) for one in logits]
    return torch.stack(present).all(0) if present else None
