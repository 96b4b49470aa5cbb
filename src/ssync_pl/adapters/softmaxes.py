"""Listening to softmaxes: what a host's modules do not return, the softmax that they call still gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["SoftmaxCall", "SoftmaxRecorder", "Softmaxes", "softmax_call"]

_SOFTMAXES = {
    torch.softmax,
    torch.log_softmax,
    torch.special.softmax,
    torch.special.log_softmax,
    Tensor.softmax,
    Tensor.log_softmax,
    F.softmax,
    F.log_softmax,
}

# Of float16, the smallest number that hosts take for minus infinity.
_ABSENT = -6e4


class SoftmaxCall(NamedTuple):
    """Input of a softmax, the axis that it normalises, counted from the front, and how often such a one ran."""

    logits: Tensor
    axis: int
    times: int = 1


Softmaxes = dict[tuple[tuple[int, ...], int], SoftmaxCall]
"""The last softmax of each shape and axis, in the order of the calls."""


def softmax_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> SoftmaxCall | None:
    """Returns input and axis where a call of a torch function is a softmax over an axis of a batch, else None."""
    if func not in _SOFTMAXES:
        return None
    value = args[0] if args else kwargs.get("input")
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(value, Tensor) or not isinstance(axis, int) or value.ndim < 3:
        return None
    return SoftmaxCall(value, axis % value.ndim)


class SoftmaxRecorder(TorchFunctionMode):
    """Keeps the last input of every kind of softmax that runs inside of it, over ``axis`` where that is given.

    ``masks`` tells whether anything was filled with minus infinity, or nearly so, as hosts mark absent slots.
    """

    def __init__(self, axis: int | None = None) -> None:
        super().__init__()
        self.axis = axis
        self.seen: Softmaxes = {}
        self.masks = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call = softmax_call(func, args, kwargs)
        if call is not None:
            self.keep(call)
        elif not self.masks:
            # By the code and not by the values, which would have to be waited for.
            self.masks = any(isinstance(arg, float) and arg <= _ABSENT for arg in (*args, *kwargs.values()))
        return func(*args, **kwargs)

    def keep(self, call: SoftmaxCall) -> None:
        """Keeps a softmax in place of the one before of its kind."""
        logits, axis, _ = call
        wanted = self.axis is None or self.axis % logits.ndim == axis
        if not wanted:
            return
        key = (tuple(logits.shape), axis)
        before = self.seen.get(key)
        trained = logits.requires_grad and torch.is_grad_enabled()
        if before is not None and before.logits.requires_grad and not trained:
            return  # what is computed for a log or by a teacher must not take the place of what is trained
        if before is not None and before.logits.requires_grad == trained:
            call = call._replace(times=before.times + 1)
        self.seen.pop(key, None)  # so that the order is that of the last calls
        self.seen[key] = call
