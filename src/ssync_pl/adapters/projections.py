"""Attention logits from the outputs of a host's own projections, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.adapters.capture import Capture
from ssync_pl.errors import HostError

__all__ = ["Projection", "StartOfCall", "require_projections", "softmax_gap", "take_projection"]


class Projection(NamedTuple):
    """Output of a projection and the autocast it ran under; a host may switch autocast inside its modules.

    Args:
        value: What the projection gave.
        autocast: Whether autocast was on, and its dtype; None on devices without autocast.

    Example:
        >>> Projection(torch.zeros(1), None).value
        tensor([0.])
    """

    value: Tensor
    autocast: tuple[bool, torch.dtype] | None

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast under which the host went on with this value.

        Returns:
            A context to compute the product in.

        Example:
            >>> with Projection(torch.zeros(1), (True, torch.bfloat16)).precision():
            ...     torch.is_autocast_enabled("cpu")
            True
        """
        if self.autocast is None:
            return nullcontext()
        enabled, dtype = self.autocast
        return torch.autocast(self.value.device.type, dtype=dtype, enabled=enabled)


def take_projection(module: nn.Module, args: tuple[Any, ...], output: Any) -> Projection:
    """What `Capture.watch` keeps of a projection.

    Args:
        module: The projection.
        args: Its input; not needed.
        output: Its output.

    Returns:
        The output with the autocast that is on now.

    Example:
        >>> take_projection(nn.Identity(), (), torch.zeros(1)).autocast
        (False, torch.bfloat16)
    """
    device = output.device.type
    if not torch.amp.is_autocast_available(device):
        return Projection(output, None)
    return Projection(output, (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))


class StartOfCall:
    """Like `take_projection`, for the projection that runs first and once in a call of slot attention.

    It forgets the projections of the call before, so that no query outlives its frame.

    Args:
        capture: The capture that it records for.
        keys: The keys to empty, its own among them.

    Example:
        >>> capture = Capture()
        >>> capture.watch("to_k", nn.Identity(), StartOfCall(capture, ("to_k",)))
    """

    def __init__(self, capture: Capture, keys: tuple[str, ...]) -> None:
        self.capture = capture
        self.keys = keys

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Projection:
        """Forget the call before, and keep this output.

        Args:
            module: The projection.
            args: Its input; not needed.
            output: Its output.

        Returns:
            What `take_projection` keeps.
        """
        for key in self.keys:
            self.capture[key].clear()
        return take_projection(module, args, output)


def require_projections(capture: Capture, module: nn.Module, *names: str) -> None:
    """Refuse a call of slot attention in which a projection was not heard.

    Args:
        capture: The capture that recorded the call.
        module: The slot attention, for the message.
        names: Keys of the projections.

    Raises:
        HostError: One of them has no value.

    Example:
        >>> capture = Capture()
        >>> capture.watch("to_q", nn.Identity())
        >>> require_projections(capture, nn.Identity(), "to_q")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ssync_pl.errors.HostError: Expected Identity to call its 'to_q' in each of its calls, but it did not, or ...
    """
    for name in names:
        if not capture[name]:
            raise HostError(
                f"Expected {type(module).__name__} to call its '{name}' in each of its calls, but it did not, or it "
                "did so without gradients, as in reentrant activation checkpointing: use checkpoint(..., "
                "use_reentrant=False), or name the modules yourself: SSyncCallback(attention=..., masks=...)."
            )


def softmax_gap(pairs: Sequence[tuple[Tensor, Tensor]], dim: int) -> tuple[float, float]:
    """How far a host's maps are from the softmax of the logits that were captured.

    Args:
        pairs: Logits and the host's probabilities, of one shape each; minus infinity marks slots that do not exist.
        dim: Axis of the slots.

    Returns:
        The largest difference, and what rounding in the maps' precision explains. Waits for the device.

    Example:
        >>> softmax_gap([(torch.zeros(2, 1), torch.tensor([[0.25], [0.75]]))], 0)
        (0.25, 1e-05)
    """
    with torch.no_grad():
        gaps = [(logits.double().softmax(dim) - probs.double()).abs().max() for logits, probs in pairs]
        gap = float(torch.stack(gaps).max())
    return gap, max(1e-5, *(4 * torch.finfo(probs.dtype).eps for _, probs in pairs))
