"""Maps that come about in one call of a module: of slot attention from its projections, of a decoder from its alpha.

The parts of a call are recorded first; when the module itself returns, one function of the parts gives the logits.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.adapters.capture import NAME_THEM, Capture, describe, output_entry, submodule
from ssync_pl.errors import HostError

__all__ = [
    "MapCall",
    "PartsTaken",
    "Projection",
    "check_close",
    "check_update",
    "entry",
    "in_shape_of",
    "scaled_product",
    "take_projection",
    "token_weights",
    "watch_alpha",
    "watch_attention",
    "watch_projections",
]

Own = Callable[[Any, Any], Tensor]
"""``(module, output)`` to the host's own softmax."""


class Projection(NamedTuple):
    """Output of a projection and the autocast it ran under; a host may switch autocast inside its modules."""

    value: Tensor
    autocast: tuple[bool, torch.dtype] | None

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast under which the host went on with this value."""
        if self.autocast is None:
            return nullcontext()
        enabled, dtype = self.autocast
        return torch.autocast(self.value.device.type, dtype=dtype, enabled=enabled)


class MapCall(NamedTuple):
    """One call of slot attention or of a decoder.

    Args:
        logits: Before the softmax over slots; minus infinity marks slots that do not exist. None where a host gives
            probabilities only.
        own: The host's own softmax of them, in the same shape; None where it is not to be had.
        axis: Axis of the slots in both; 0 where slots are folded into the batch.
        valid: ``(B, S)`` bool, slots that exist; None when all do.
        values: What slot attention weighs, where it returns slots only.
        update: The mean of the values that it made, which goes to its recurrent cell.
        weigh: Turns logits into its weights over patches.
    """

    logits: Tensor | None
    own: Tensor | None = None
    axis: int = 1
    valid: Tensor | None = None
    values: Projection | None = None
    update: Tensor | None = None
    weigh: Callable[[Tensor], Tensor] | None = None


class PartsTaken:
    """A `take`: joins the last values of a call's parts by ``make(module, output, *values)`` when it returns."""

    def __init__(self, capture: Capture, parts: Sequence[str], make: Callable[..., Any]) -> None:
        self.capture = capture
        self.parts = tuple(parts)
        self.make = make

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Joins the parts, or refuses a call in which one did not run."""
        for part in self.parts:
            if not self.capture[part]:
                raise HostError(
                    f"Expected {type(module).__name__} to call '{part}' in each of its calls, but it did not, or it "
                    "did so without gradients, as in reentrant activation checkpointing: use checkpoint(..., "
                    f"use_reentrant=False). {NAME_THEM}"
                )
        return self.make(module, output, *(self.capture[part][-1] for part in self.parts))


class _Restart:
    """A `take` for the projection that runs first and once per call: no query outlives its frame."""

    def __init__(self, capture: Capture, keys: Sequence[str]) -> None:
        self.capture = capture
        self.keys = tuple(keys)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Projection:
        for key in self.keys:
            self.capture[key].clear()
        return take_projection(module, args, output)


def take_projection(module: nn.Module, args: tuple[Any, ...], output: Any) -> Projection:
    """A `take` for a projection: its output with the autocast that is on now."""
    device = output.device.type
    if not torch.amp.is_autocast_available(device):
        return Projection(output, None)
    return Projection(output, (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))


def watch_projections(
    capture: Capture, key: str, module: nn.Module, names: Sequence[str], first: str | None, also: Sequence[str] = ()
) -> list[str]:
    """Records the projections ``names`` of a module under ``key.name``, and returns these keys.

    The child ``first``, which runs once per call before the others, empties them and the keys ``also``.
    """
    keys = [f"{key}.{name}" for name in names]
    for name, own in zip(names, keys, strict=True):
        take = _Restart(capture, (*keys, *also)) if name == first else take_projection
        capture.watch(own, submodule(module, name), take)
    return keys


def watch_attention(
    capture: Capture,
    key: str,
    module: nn.Module,
    logits: Callable[[Any, Tensor, Tensor], Tensor],
    projections: tuple[str, ...] = ("to_q", "to_k"),
    *,
    own: Own | None = None,
    weigh: Callable[[Any, Tensor], Tensor] | None = None,
    cell: str = "gru",
    given: str | None = None,
    mask: Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None] | None = None,
    kept: Callable[[Any, Any], Tensor] | None = None,
    once: bool = False,
    axis: int = 1,
) -> None:
    """Records a `MapCall` under ``key`` whenever a module that attends to slots returns.

    The keys are projected once per call and first, the queries in each iteration: the last query is the final one.

    Args:
        capture: Receives the records.
        key: Name of the module's calls.
        module: Slot attention, or a decoder that attends to slots.
        logits: ``(module, query, key)`` to logits, in the operations and the order of the host.
        projections: Names of its children for queries and keys, and for values where ``weigh`` is given.
        own: Picks the host's softmax of them from ``(module, output)``; None where it returns none.
        weigh: ``(module, logits)`` to the host's weights over patches, for modules that return slots only.
        cell: Child whose first input is the update of the slots, with ``weigh``.
        given: Entry of the output with the logits themselves, where a fork returns them.
        mask: ``(args, kwargs)`` to the slots that exist, ``(B, S)`` bool, where the module is told.
        kept: ``(module, output)`` to the slots that it keeps, ``(B, S)`` bool, where it decides itself.
        once: The module runs once per step, with its projections in any order.
        axis: Axis of the slots in the logits.
    """
    extra = [f"{key}.{cell}"] if weigh else []
    parts = watch_projections(capture, key, module, projections, None if once else projections[1], extra)
    if weigh:
        capture.watch_input(extra[0], submodule(module, cell), lambda module, args, kwargs: args[0])
    if mask is not None:
        capture.watch_input(f"{key} mask", module, lambda module, args, kwargs: mask(args, kwargs))

    def make(module: Any, output: Any, query: Projection, keys: Projection, *rest: Any) -> MapCall:
        with query.precision():
            value = logits(module, query.value, keys.value)
        valid = None if mask is None else capture[f"{key} mask"][-1]
        if valid is not None:
            valid = valid.to(value.device, torch.bool).expand(value.shape[:2])
            value = value.masked_fill(~valid.unsqueeze(2), float("-inf"))
        if kept is not None:
            valid = kept(module, output) if valid is None else kept(module, output) & valid
        used = None if own is None else in_shape_of(value, own(module, output), module)[1]
        call = MapCall(value, used, axis, valid)
        return call if weigh is None else call._replace(values=rest[0], update=rest[1], weigh=partial(weigh, module))

    join = PartsTaken(capture, (*parts, *extra), make)

    def take(module: nn.Module, args: tuple[Any, ...], output: Any) -> MapCall:
        returned = output_entry(output, given) if given else None
        if returned is None or own is None:
            return join(module, args, output)
        return MapCall(*in_shape_of(returned, own(module, output), module), axis)

    capture.watch(key, module, take)


def watch_alpha(
    capture: Capture,
    key: str,
    module: nn.Module,
    inner: str,
    channel: Callable[[Tensor], Tensor],
    own: Own,
    axis: int | None = 1,
) -> None:
    """Records a `MapCall` under ``key`` whenever a decoder returns whose inner network gives alpha beside colours.

    Args:
        capture: Receives the records.
        key: Name of the decoder's calls.
        module: The decoder.
        inner: Path of the inner network in it.
        channel: Picks alpha from the inner network's output.
        own: Picks the host's masks from ``(module, output)``.
        axis: Axis of the slots in the masks; None where alpha has them folded into its first axis, with all in front.
    """
    part = f"{key}.{inner}"
    capture.watch(part, submodule(module, inner), lambda module, args, output: channel(output))

    def make(module: Any, output: Any, alpha: Tensor) -> MapCall:
        masks = own(module, output)
        return MapCall(*in_shape_of(alpha, masks, module), (masks.ndim - alpha.ndim) if axis is None else axis)

    capture.watch(key, module, PartsTaken(capture, [part], make))


def entry(key: str, squeeze: int | None = None) -> Own:
    """Makes an ``own`` that reads an entry of a module's output.

    Args:
        key: A dict's key, an attribute or a position.
        squeeze: Axis of one entry to leave out.
    """

    def pick(module: nn.Module, output: Any) -> Tensor:
        value = output_entry(output, key)
        if value is None:
            raise HostError(
                f"Expected {type(module).__name__} to return its map as '{key}', but got {describe(output)}. "
                f"{NAME_THEM}"
            )
        return value if squeeze is None else value.squeeze(squeeze)

    return pick


def in_shape_of(logits: Tensor, own: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Gives logits the shape of the host's softmax, of which axes side by side may be folded in them; returns both."""
    if logits.shape == own.shape:
        return logits, own
    ends, folds = ([*itertools.accumulate(value.shape, operator.mul)] for value in (logits, own))
    if ends[-1] != folds[-1] or not {*ends} <= {*folds}:
        raise HostError(
            f"Expected the logits inside {type(module).__name__} to have the shape of its masks, {tuple(own.shape)}, "
            f"but got {tuple(logits.shape)}. {NAME_THEM}"
        )
    return logits.reshape(own.shape), own


def scaled_product(module: Any, query: Tensor, key: Tensor) -> Tensor:
    """Logits of slot attention with a ``scale``: query · key · scale, ``(B, S, N)``."""
    return torch.einsum("bsd,bnd->bsn", query, key) * module.scale


def token_weights(logits: Tensor, eps: float) -> Tensor:
    """Weights over patches: the softmax over slots ``(..., S, N)``, plus ``eps``, normalised over patches."""
    weights = logits.softmax(-2) + eps
    return weights / weights.sum(-1, keepdim=True)


def check_close(
    mine: Tensor, own: Tensor, what: str, expected: str, scale: float = 1.0, tolerance: float = 0.0
) -> None:
    """Refuses values that differ from the host's own by more than the rounding of their precision explains.

    It waits for the device. ``scale`` is the size of such values, ``tolerance`` how far they may differ at least;
    ``what`` and ``expected`` are for the message.
    """
    with torch.no_grad():
        gap = float((mine.double() - own.double()).abs().max())
    rounding = max(1e-5, 4 * torch.finfo(mine.dtype).eps, 4 * torch.finfo(own.dtype).eps) * max(scale, 1e-12)
    tolerance = max(tolerance, rounding)
    if not gap <= tolerance:
        raise HostError(
            f"Expected the {what} to be {expected}, but they differ by up to {gap:.3g} (tolerance {tolerance:.1g}). "
            f"This host changes its maps on the way. {NAME_THEM}"
        )


def check_update(call: MapCall, name: str) -> None:
    """Refuses a call of slot attention from whose logits the update that the host made does not follow."""
    if call.logits is None or call.values is None or call.update is None or call.weigh is None:
        return
    values = call.values.value.detach()
    with torch.no_grad(), call.values.precision():
        weights = call.weigh(call.logits).to(values.dtype)
        if weights.ndim == 4:  # heads, which lie side by side in values and update
            values = values.unflatten(-1, (weights.shape[1], -1)).movedim(2, 1)
        mine = weights @ values
    mine = (mine.movedim(1, 2) if mine.ndim == 4 else mine).reshape(call.update.shape)
    expected = "the mean of its values weighted by the softmax over slots"
    check_close(mine, call.update, f"update of the slots in {name}", expected, scale=float(values.abs().max()))
