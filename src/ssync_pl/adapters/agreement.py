"""Whether a host used what was captured: the self-check of an adapter's first step."""

from __future__ import annotations

import torch
from torch import Tensor

from ssync_pl.adapters.projections import softmax_gap
from ssync_pl.errors import HostError

__all__ = ["check_close", "check_softmax"]


def check_close(mine: Tensor, own: Tensor, what: str, expected: str, scale: float = 1.0) -> None:
    """Compare what follows from captured logits with what the host used; waits for the device.

    Args:
        mine: Computed from captured logits.
        own: The host's, of the same shape.
        what: Name of the host's tensor, for the message.
        expected: What it should be, for the message.
        scale: Size of such values, above 0.

    Raises:
        HostError: They differ.

    Example:
        >>> check_close(torch.zeros(1), torch.ones(1), "image", "the sum")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ssync_pl.errors.HostError: Expected the image to be the sum, but they differ by up to 1 (tolerance 1e-05)....
    """
    with torch.no_grad():
        gap = float((mine.double() - own.double()).abs().max())
    tolerance = max(1e-5, 4 * torch.finfo(mine.dtype).eps, 4 * torch.finfo(own.dtype).eps) * max(scale, 1e-12)
    _refuse_gap(gap, tolerance, what, expected)


def check_softmax(logits: Tensor, probs: Tensor, dim: int, what: str) -> None:
    """Compare the host's map with the softmax over slots of captured logits; waits for the device.

    Args:
        logits: Captured.
        probs: The host's, of the same shape.
        dim: Axis of the slots.
        what: Name of the host's map, for the message.

    Raises:
        HostError: They differ.

    Example:
        >>> check_softmax(torch.zeros(2, 1), torch.full((2, 1), 0.5), 0, "masks")
    """
    _refuse_gap(*softmax_gap([(logits, probs)], dim), what, "the softmax over slots of its logits")


def _refuse_gap(gap: float, tolerance: float, what: str, expected: str) -> None:
    if not gap <= tolerance:
        raise HostError(
            f"Expected the {what} to be {expected}, but they differ by up to {gap:.3g} (tolerance {tolerance:.1g}). "
            "This host changes its maps on the way: name what to use, as in SSyncCallback(attention=..., masks=...) "
            "or attach(model, attention=..., masks=...)."
        )
