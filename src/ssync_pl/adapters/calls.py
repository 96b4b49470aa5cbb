"""Maps that come about in one call of a module: what its last softmax over slots is fed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.adapters.capture import NAME_THEM, Capture, describe, output_entry
from ssync_pl.errors import HostError


class MapCall(NamedTuple):
    """One call of slot attention or of a decoder.

    Attributes:
        logits: Before the softmax over slots, minus infinity for absent slots; None where there are only probabilities.
        own: Probabilities, in the place of logits.
        axis: Axis of the slots in both; 0 where slots are folded into the batch.
        valid: ``(B, S)`` bool, slots that exist; None when all do.
    """

    logits: Tensor | None
    own: Tensor | None = None
    axis: int = 1
    valid: Tensor | None = None


def watch_softmax(capture: Capture, key: str, module: nn.Module, axis: int | None = -2) -> None:
    """Records a `MapCall` under ``key`` whenever a module returns: the host's own logits, fed to its last softmax.

    Args:
        capture: Receives the records.
        key: Name of the module's calls.
        module: Slot attention, or a decoder that draws object masks.
        axis: Axis of the slots in the softmax; softmaxes over others are not heard. None takes any, for decoders.
    """
    capture.tap(f"{key} softmax", module, axis)

    def take(module: nn.Module, args: tuple[Any, ...], output: Any) -> MapCall:
        heard = capture[f"{key} softmax"][-1]
        if not heard:
            raise HostError(f"Expected {type(module).__name__} to take a softmax over slots, but none ran. {NAME_THEM}")
        (_, place), call = [*heard.items()][-1]
        logits, behind = call.logits, call.logits.shape[place + 1 :]
        if not behind:  # slots are last
            return MapCall(logits.transpose(-1, -2), axis=logits.ndim - 2)
        if len(behind) > 1 and 1 in behind:  # an axis of channels
            logits = logits.reshape(*logits.shape[: place + 1], *(size for size in behind if size != 1))
        return MapCall(logits, axis=place)

    capture.watch(key, module, take)


def entry(key: str) -> Callable[[Any, Any], Tensor]:
    """Makes a function of ``(module, output)`` that reads a key, an attribute or a position of an output."""

    def pick(module: nn.Module, output: Any) -> Tensor:
        value = output_entry(output, key)
        if value is None:
            kind = type(module).__name__
            raise HostError(f"Expected {kind} to return its map as '{key}', but got {describe(output)}. {NAME_THEM}")
        return value

    return pick


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
