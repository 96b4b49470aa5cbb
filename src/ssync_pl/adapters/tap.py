"""Listening to softmaxes: what a host's modules do not return, the softmax that they call still gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ssync_pl.adapters.capture import Capture

__all__ = ["SoftmaxCall", "SoftmaxRecorder", "Softmaxes", "TapCapture", "softmax_call"]

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

Softmaxes = dict[tuple[tuple[int, ...], int], Tensor]
"""The last input of a softmax by its shape and axis, in the order of the calls."""


class SoftmaxCall(NamedTuple):
    """What a softmax was called with.

    Args:
        logits: Its input, as the host computed it.
        axis: The axis it normalises, counted from the front.

    Example:
        >>> SoftmaxCall(torch.zeros(2, 3, 4), 1).axis
        1
    """

    logits: Tensor
    axis: int


def softmax_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> SoftmaxCall | None:
    """Whether a call of a torch function is a softmax over an axis of a batch.

    Args:
        func: The function, such as `torch.softmax`, ``Tensor.softmax`` or `torch.nn.functional.log_softmax`.
        args: Its arguments.
        kwargs: Its keywords.

    Returns:
        Input and axis, or None.

    Example:
        >>> softmax_call(torch.softmax, (torch.zeros(2, 3, 4),), {"dim": -2}).axis
        1
        >>> softmax_call(torch.sigmoid, (torch.zeros(2, 3, 4),), {}) is None
        True
    """
    if func not in _SOFTMAXES:
        return None
    value = args[0] if args else kwargs.get("input")
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(value, Tensor) or not isinstance(axis, int) or value.ndim < 3:
        return None
    return SoftmaxCall(value, axis % value.ndim)


class SoftmaxRecorder(TorchFunctionMode):
    """Keeps the last input of every kind of softmax that runs inside of it.

    Args:
        slots: Size of the softmax's axis; None keeps all sizes.
        axis: The axis itself, which may be negative; None keeps all.

    Attributes:
        seen: What was recorded.
        masks: Whether anything was filled with minus infinity, or nearly so, as hosts mark slots that do not exist.

    Example:
        >>> with SoftmaxRecorder() as recorder:
        ...     _ = torch.zeros(2, 3, 4).softmax(1)
        >>> list(recorder.seen)
        [((2, 3, 4), 1)]
    """

    def __init__(self, slots: int | None = None, axis: int | None = None) -> None:
        super().__init__()
        self.slots = slots
        self.axis = axis
        self.seen: Softmaxes = {}
        self.masks = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call = softmax_call(func, args, kwargs)
        if call is not None:
            logits, axis = call
            wanted = self.axis is None or self.axis % logits.ndim == axis
            if wanted and self.slots in (None, logits.shape[axis]):
                key = (tuple(logits.shape), axis)
                before = self.seen.get(key)
                # What is computed for a log or by a teacher must not take the place of what is trained.
                if before is None or torch.is_grad_enabled() or not before.requires_grad:
                    self.seen.pop(key, None)  # so that the order is that of the last calls
                    self.seen[key] = logits
        elif not self.masks:
            # By the code and not by the values, which would have to be waited for.
            self.masks = any(isinstance(arg, float) and arg <= _ABSENT for arg in (*args, *kwargs.values()))
        return func(*args, **kwargs)


class TapCapture(Capture):
    """A capture that also hears softmaxes: each call of a tapped module gives one `Softmaxes`.

    Attributes:
        masks: Whether a tapped module has marked slots that do not exist; it stays True.

    Example:
        >>> layer, capture = nn.Softmax(1), TapCapture()
        >>> capture.tap("attention", layer)
        >>> capture.open()
        >>> _ = layer(torch.zeros(2, 3, 4))
        >>> capture.close()
        >>> list(capture["attention"][0])
        [((2, 3, 4), 1)]
    """

    def __init__(self) -> None:
        super().__init__()
        self.masks = False
        self._window_taps: list[tuple[str, int | None, int | None]] = []
        self._entered: list[tuple[str, SoftmaxRecorder]] = []

    def tap(self, key: str, module: nn.Module, slots: int | None = None, axis: int | None = None) -> None:
        """Record the softmaxes that run inside a module's forward pass, once a call.

        Args:
            key: Name under which the values are kept, in the order of the calls.
            module: The module to listen to.
            slots: As in `SoftmaxRecorder`.
            axis: As in `SoftmaxRecorder`.

        Example:
            >>> TapCapture().tap("attention", nn.Softmax(1), slots=3)
        """
        bracket = _Bracket(self, slots, axis)
        self.keep(module.register_forward_pre_hook(bracket.enter))
        # A forward pass that fails must not leave the recorder on.
        self.keep(module.register_forward_hook(bracket.leave, always_call=True))
        self.watch(key, module, bracket.take)

    def tap_window(self, key: str, module: nn.Module, slots: int | None = None, axis: int | None = None) -> None:
        """Record the softmaxes of a whole training step, also outside of any forward pass.

        A window that asks for training only also spans code that is not the host's (`ssync_pl.attach`), so there the
        module's forward pass counts.

        Args:
            key: Name under which the one value is kept.
            module: The host.
            slots: As in `SoftmaxRecorder`.
            axis: As in `SoftmaxRecorder`.

        Example:
            >>> capture = TapCapture()
            >>> capture.tap_window("host", nn.Identity())
            >>> capture.open()
            >>> _ = torch.zeros(2, 3, 4).softmax(1)
            >>> capture.close()
            >>> len(capture.only("host"))
            1
        """
        self.tap(key, module, slots, axis)
        self._window_taps.append((key, slots, axis))

    def open(self, training_only: bool = False) -> None:
        """Start to listen.

        Args:
            training_only: As in `Capture.open`.

        Example:
            >>> TapCapture().open()
        """
        self._leave()
        super().open(training_only)
        if not training_only:
            for key, slots, axis in self._window_taps:
                recorder = SoftmaxRecorder(slots, axis)
                recorder.__enter__()
                self._entered.append((key, recorder))

    def close(self) -> None:
        """Stop to listen; what was recorded stays until `clear`.

        Example:
            >>> TapCapture().close()
        """
        for key, recorder in self._leave():
            self.masks = self.masks or recorder.masks
            # Calls of the host's forward pass are part of the step.
            self[key][:] = [recorder.seen] if recorder.seen else []
        super().close()

    def _leave(self) -> list[tuple[str, SoftmaxRecorder]]:
        entered, self._entered = self._entered, []
        for _, recorder in reversed(entered):
            recorder.__exit__(None, None, None)
        return entered

    def __deepcopy__(self, memo: dict[int, Any]) -> TapCapture:
        return TapCapture()

    def __reduce__(self) -> tuple[type[TapCapture], tuple[()]]:
        return (TapCapture, ())


class _Bracket:
    """A recorder around each call of one module; a copied or pickled host keeps hooks that do nothing."""

    def __init__(self, capture: TapCapture, slots: int | None, axis: int | None) -> None:
        self.capture = capture
        self.slots = slots
        self.axis = axis
        self.running: list[SoftmaxRecorder] = []
        self.last: Softmaxes = {}

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.capture.is_open:
            recorder = SoftmaxRecorder(self.slots, self.axis)
            recorder.__enter__()
            self.running.append(recorder)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.running:
            recorder = self.running.pop()
            recorder.__exit__(None, None, None)
            self.last = recorder.seen
            self.capture.masks = self.capture.masks or recorder.masks

    def take(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Softmaxes:
        last, self.last = self.last, {}
        return last

    def __reduce__(self) -> tuple[type[_Bracket], tuple[TapCapture, int | None, int | None]]:
        return (_Bracket, (self.capture, self.slots, self.axis))
