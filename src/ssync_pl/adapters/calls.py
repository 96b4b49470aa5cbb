"""Maps that come about in one call of a module: of slot attention from its softmax, of a decoder from its alpha."""

import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.adapters.capture import NAME_THEM, Capture, describe, output_entry, submodule
from ssync_pl.errors import HostError

Own = Callable[[Any, Any], Tensor]
"""``(module, output)`` to the host's own softmax."""


class MapCall(NamedTuple):
    """One call of slot attention or of a decoder.

    Attributes:
        logits: Before the softmax over slots, minus infinity for absent slots; None where there are only probabilities.
        own: The host's own softmax of them, in the same shape; None where it is not to be had.
        axis: Axis of the slots in both; 0 where slots are folded into the batch.
        valid: ``(B, S)`` bool, slots that exist; None when all do.
    """

    logits: Tensor | None
    own: Tensor | None = None
    axis: int = 1
    valid: Tensor | None = None


def watch_softmax(capture: Capture, key: str, module: nn.Module, axis: int = -2) -> None:
    """Records a `MapCall` under ``key`` whenever a module that attends to slots returns: what its last softmax was fed.

    Args:
        capture: Receives the records.
        key: Name of the module's calls.
        module: Slot attention, or a decoder that attends to slots.
        axis: Axis of the slots in the softmax, -2 or -1.
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

    def take(module: nn.Module, args: tuple[Any, ...], output: Any) -> MapCall:
        given = capture[f"{key} alpha"]
        if not given:
            raise HostError(
                f"Expected {type(module).__name__} to call '{inner}' in each of its calls, but it did not, or without "
                f"gradients, as in activation checkpointing without use_reentrant=False. {NAME_THEM}"
            )
        alpha, masks = given[-1], own(module, output)
        given.clear()  # lets go of the graphs of earlier ones
        return MapCall(*in_shape_of(alpha, masks, module), (masks.ndim - alpha.ndim) if axis is None else axis)

    network = submodule(module, inner)
    capture.watch(f"{key} alpha", network, lambda module, args, output: channel(output), optional=True)
    capture.watch(key, module, take)


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
