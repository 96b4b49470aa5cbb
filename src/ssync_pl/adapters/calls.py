"""Maps that come about in one call of a module: of slot attention from its projections, of a decoder from its alpha."""

import itertools
import operator
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.adapters.capture import NAME_THEM, Capture, Take, describe, output_entry, submodule
from ssync_pl.errors import HostError

Own = Callable[[Any, Any], Tensor]
"""``(module, output)`` to the host's own softmax."""
Part = Callable[..., Any]


class Projection(NamedTuple):
    """Output of a projection and the autocast it ran under; a host may switch autocast inside its modules."""

    value: Tensor
    autocast: tuple[bool, torch.dtype] | None

    def precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        enabled, dtype = self.autocast
        return torch.autocast(self.value.device.type, dtype=dtype, enabled=enabled)


def take_projection(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Projection:
    """A `take` for a projection: its output with the autocast that is on now."""
    device = output.device.type
    if not torch.amp.is_autocast_available(device):
        return Projection(output, None)
    return Projection(output, (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))


class MapCall(NamedTuple):
    """One call of slot attention or of a decoder.

    Args:
        logits: Before the softmax over slots, minus infinity for absent slots; None where there are only probabilities.
        own: The host's own softmax of them, in the same shape; None where it is not to be had.
        axis: Axis of the slots in both; 0 where slots are folded into the batch.
        valid: ``(B, S)`` bool, slots that exist; None when all do.
    """

    logits: Tensor | None
    own: Tensor | None = None
    axis: int = 1
    valid: Tensor | None = None


def watch_joined(
    capture: Capture, key: str, module: nn.Module, make: Callable[[Any, Any, Part], Any], parts: Mapping[str, Take]
) -> None:
    """Records ``make(module, output, part)`` whenever a module returns.

    ``parts`` has the paths of parts inside it, ``"path input"`` for what a part gets, and what to take of them;
    ``part(path)`` is what was taken last in this call, ``part(path, 2)`` what before.
    """
    inner = {name: submodule(module, name.removesuffix(" input")) for name in parts}

    def latest(name: str) -> Take:
        def take(module: nn.Module, args: tuple[Any, ...], given: Any) -> Any:
            del capture[f"{key} {name}"][:-1]  # lets go of the graphs of earlier iterations
            return parts[name](module, args, given)

        return take

    for name, one in inner.items():
        capture.watch(f"{key} {name}", one, latest(name), optional=True, inputs=name.endswith(" input"))

    def part(name: str, back: int = 1) -> Any:
        values = capture[f"{key} {name}"]
        if len(values) < back:
            raise HostError(
                f"Expected {type(module).__name__} to call '{name}' in each of its calls, but it did not, or without "
                f"gradients, as in activation checkpointing without use_reentrant=False. {NAME_THEM}"
            )
        return values[-back]

    def join(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        made = make(module, output, part)
        for name in parts:
            capture[f"{key} {name}"].clear()
        return made

    capture.watch(key, module, join)


def watch_attention(
    capture: Capture,
    key: str,
    module: nn.Module,
    logits: Callable[[Any, Tensor, Tensor], Tensor],
    projections: tuple[str, ...] = ("to_q", "to_k"),
    *,
    own: Own,
    given: str | None = None,
    mask: Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None] | None = None,
    kept: Own | None = None,
) -> None:
    """Records a `MapCall` under ``key`` whenever a module that attends to slots returns: its last query counts.

    Args:
        capture: Receives the records.
        key: Name of the module's calls.
        module: Slot attention, or a decoder that attends to slots.
        logits: ``(module, query, key)`` to logits, in the operations and the order of the host.
        projections: Names of its children for queries and keys.
        own: Picks the host's softmax of them from ``(module, output)``; see `watch_softmax` where it returns none.
        given: Entry of the output with the logits themselves, where a fork returns them.
        mask: ``(args, kwargs)`` to the slots that exist, ``(B, S)`` bool, where the module is told.
        kept: ``(module, output)`` to the slots that it keeps, ``(B, S)`` bool, where it decides itself.
    """
    parts: dict[str, Take] = dict.fromkeys(projections, take_projection)
    if mask is not None:
        parts[". input"] = lambda module, args, kwargs: mask(args, kwargs)

    def make(module: Any, output: Any, part: Part) -> MapCall:
        returned = output_entry(output, given) if given else None
        if returned is not None:
            return MapCall(*in_shape_of(returned, own(module, output), module))
        query, keys = map(part, projections)
        with query.precision():
            value = logits(module, query.value, keys.value)
        valid = None if mask is None else part(". input")
        if valid is not None:
            valid = valid.to(value.device, torch.bool).expand(value.shape[:2])
            value = value.masked_fill(~valid.unsqueeze(2), float("-inf"))
        if kept is not None:
            valid = kept(module, output) if valid is None else kept(module, output) & valid
        return MapCall(value, in_shape_of(value, own(module, output), module)[1], valid=valid)

    watch_joined(capture, key, module, make, parts)


def watch_softmax(capture: Capture, key: str, module: nn.Module, axis: int = -2) -> None:
    """Records a `MapCall` under ``key`` whenever slot attention returns slots only: what its last softmax was fed.

    ``axis`` is that of the slots in the softmax, -2 or -1.
    """
    capture.tap(f"{key} softmax", module, axis)

    def take(module: nn.Module, args: tuple[Any, ...], output: Any) -> MapCall:
        heard = [*capture[f"{key} softmax"][-1].values()]
        if not heard:
            raise HostError(f"Expected {type(module).__name__} to take a softmax over slots, but none ran. {NAME_THEM}")
        logits = heard[-1].logits
        return MapCall(logits if axis == -2 else logits.transpose(-1, -2), axis=logits.ndim - 2)

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

    def make(module: Any, output: Any, part: Part) -> MapCall:
        alpha, masks = part(inner), own(module, output)
        return MapCall(*in_shape_of(alpha, masks, module), (masks.ndim - alpha.ndim) if axis is None else axis)

    watch_joined(capture, key, module, make, {inner: lambda module, args, output: channel(output)})


def entry(key: str, squeeze: int | None = None) -> Own:
    """Makes an ``own`` that reads a key, an attribute or a position of an output, without the axis ``squeeze``."""

    def pick(module: nn.Module, output: Any) -> Tensor:
        value = output_entry(output, key)
        if value is None:
            kind = type(module).__name__
            raise HostError(f"Expected {kind} to return its map as '{key}', but got {describe(output)}. {NAME_THEM}")
        return value if squeeze is None else value.squeeze(squeeze)

    return pick


def in_shape_of(logits: Tensor, own: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Gives logits the shape of the host's softmax, of which axes side by side may be folded in them; returns both."""
    if logits.shape == own.shape:
        return logits, own
    ends, folds = ([*itertools.accumulate(value.shape, operator.mul)] for value in (logits, own))
    if ends[-1] != folds[-1] or not {*ends} <= {*folds}:
        shapes = f"{tuple(own.shape)}, but got {tuple(logits.shape)}"
        raise HostError(f"Expected logits inside {type(module).__name__} to have the shape of its masks, {shapes}.")
    return logits.reshape(own.shape), own


def scaled_product(module: Any, query: Tensor, key: Tensor) -> Tensor:
    """Logits ``(B, S, N)`` of slot attention with a ``scale``."""
    return torch.einsum("bsd,bnd->bsn", query, key) * module.scale


def check_close(
    mine: Tensor, own: Tensor, what: str, expected: str, scale: float = 1.0, tolerance: float = 0.0
) -> None:
    """Refuses values that differ from the host's own by more than rounding explains; it waits for the device.

    ``scale`` is the size of such values, ``tolerance`` how far they may differ at least.
    """
    with torch.no_grad():
        gap = float((mine.double() - own.double()).abs().max())
    rounding = max(1e-5, 4 * torch.finfo(mine.dtype).eps, 4 * torch.finfo(own.dtype).eps) * max(scale, 1e-12)
    tolerance = max(tolerance, rounding)
    if not gap <= tolerance:
        raise HostError(
            f"Expected the {what} to be {expected}, but they differ by up to {gap:.3g} (tolerance {tolerance:.1g}): "
            f"this host changes its maps on the way. {NAME_THEM}"
        )
