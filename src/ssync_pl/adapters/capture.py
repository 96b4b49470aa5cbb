"""Hooks that listen inside a window only: to outputs, to inputs, and to the softmaxes inside of modules."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ssync_pl.errors import HostError

Take = Callable[[nn.Module, tuple[Any, ...], Any], Any]

NAME_THEM = "Name the modules yourself: attention=... and masks=... of SSyncCallback or attach."

_SOFTMAXES = {
    *(torch.softmax, torch.special.softmax, Tensor.softmax, F.softmax),
    *(torch.log_softmax, torch.special.log_softmax, Tensor.log_softmax, F.log_softmax),
}

# Of float16, the smallest number that hosts take for minus infinity.
_ABSENT = -6e4


class SoftmaxCall(NamedTuple):
    """Input of a softmax, whether it trains, and how often such a one ran."""

    logits: Tensor
    trains: bool
    times: int = 1


Softmaxes = dict[tuple[tuple[int, ...], int], SoftmaxCall]
"""The last softmax of each shape and axis, in the order of the calls."""


class Capture:
    """What a host's modules gave inside an open window.

    Hooks stay on the modules from `watch` to `remove`, so that compiled graphs contain them; while the window is closed
    they return at once. A copied or pickled host keeps hooks of an empty capture that is never open.

    Attributes:
        facts: What an adapter knows of the host when it attaches and needs when it collects.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._open = False
        self._training: nn.Module | None = None
        self._records: dict[str, list[Any]] = {}
        self._optional: set[str] = set()
        self.modules: dict[str, nn.Module] = {}
        self._handles: list[RemovableHandle] = []
        self._steps: dict[str, _Bracket] = {}

    def watch(
        self, key: str, module: nn.Module, take: Take | None = None, optional: bool = False, inputs: bool = False
    ) -> None:
        """Records what a module gives, or gets, under a key whenever it runs inside the window.

        Args:
            key: Name of the values.
            module: The module to listen to.
            take: Picks what to keep from ``(module, args, output)``; None keeps the output.
            optional: The module may stay silent, as a host whose loss function a loop calls in place of the host.
            inputs: Listens before the module runs; ``take`` gets ``(module, args, kwargs)``.
        """
        self._records.setdefault(key, [])
        self.modules[key] = module
        self._optional |= {key} if optional else set()
        hook = _Hook(self, key, take)
        self._handles.append(
            module.register_forward_pre_hook(hook, with_kwargs=True) if inputs else module.register_forward_hook(hook)
        )

    def tap(self, key: str, module: nn.Module, axis: int | None = None, step: bool = False) -> None:
        """Records the softmaxes inside a module, over ``axis`` where that is given: one `Softmaxes` per call.

        With ``step`` the whole window counts, also outside of any forward pass, unless it is open for a ``training``:
        then it also spans code that is not the host's.
        """
        bracket = _Bracket(self, axis)
        self._handles.append(module.register_forward_pre_hook(bracket.enter))
        # A forward pass that fails must not leave the recorder on.
        self._handles.append(module.register_forward_hook(bracket.leave, always_call=True))
        self.watch(key, module, bracket.take)
        if step:
            self._steps[key] = _Bracket(self, axis)

    @property
    def is_open(self) -> bool:
        """Whether hooks record now: never in a backward pass, where checkpointing runs modules a second time."""
        # Traced graphs, which could not contain the second call, run no hooks in a backward pass.
        backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        trains = self._training is None or (self._training.training and torch.is_grad_enabled())
        return self._open and trains and not backward

    def open(self, training: nn.Module | None = None) -> None:
        """Starts to listen; ``training`` leaves out what runs while this module is not trained, or under `no_grad`."""
        for bracket in self._steps.values():
            bracket.leave()
        self._open = True
        self._training = training
        for bracket in self._steps.values() if training is None else ():
            bracket.start()

    def close(self) -> bool:
        """Stops to listen; what was recorded stays until `clear`. Returns whether it listened before."""
        for key, bracket in reversed(self._steps.items()):
            if bracket.running:
                bracket.leave()
                # Calls of the host's forward pass are part of the step.
                self[key][:] = [bracket.last] if bracket.last else []
        before, self._open = self._open, False
        return before

    @contextmanager
    def window(self) -> Iterator[None]:
        """Listens during one training step, and lets go of its tensors at the end."""
        self.clear()
        self.open()
        try:
            yield
        finally:
            self.close()
            self.clear()

    def clear(self) -> None:
        """Lets go of everything recorded, and of the graphs it holds."""
        for values in self._records.values():
            values.clear()

    def remove(self) -> None:
        """Takes every hook off the host. May be called again."""
        self.close()
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getitem__(self, key: str) -> list[Any]:
        return self._records[key]

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def only(self, key: str) -> Any:
        """Returns the value of a module that runs once per training step, or refuses another number of calls."""
        values = self._records[key]
        if len(values) != 1:
            raise HostError(f"Expected '{key}' to run once inside the training step, but it ran {len(values)} times.")
        return values[0]

    def last(self, key: str) -> Any:
        """Returns the latest value of a key, or None."""
        return (self._records.get(key) or [None])[-1]

    @property
    def silent(self) -> list[str]:
        """Keys without a value, those of optional modules left out."""
        return [key for key, values in self._records.items() if not values and key not in self._optional]

    def refuse_bypass(self) -> None:
        """Refuses a step that went past the hooks of a module by its ``forward``, since modules inside of it ran."""
        heard = {module for key, module in self.modules.items() if self._records[key]}
        for key in self.silent:
            if heard & {*self.modules[key].modules()} - {self.modules[key]}:
                kind = type(self.modules[key]).__name__
                past = f"goes past them by the method forward of {kind}, or another one"
                raise HostError(f"Expected hooks on '{key}' to run, but the step {past}. Call {kind} as self(...).")

    def __reduce__(self) -> "tuple[type[Capture], tuple[()]]":
        return (Capture, ())


class _Hook:
    """A forward hook, or a pre-hook with keywords; a class, so that a copied or pickled host stays usable."""

    def __init__(self, capture: Capture, key: str, take: Take | None) -> None:
        self.capture = capture
        self.key = key
        self.take = take

    def __call__(self, module: nn.Module, args: tuple[Any, ...], given: Any) -> None:
        if self.capture.is_open:
            if getattr(module, "_is_replica", False):
                copies = "torch.nn.DataParallel runs one per device"
                raise HostError(f"Expected one copy of the host, but {copies}. Use DDP, or give it one device.")
            self.capture[self.key].append(given if self.take is None else self.take(module, args, given))

    def __reduce__(self) -> "tuple[type[_Hook], tuple[Capture, str, None]]":
        return (_Hook, (self.capture, self.key, None))


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
        if func in _SOFTMAXES:
            value = args[0] if args else kwargs.get("input")
            axis = args[1] if len(args) > 1 else kwargs.get("dim")
            if isinstance(value, Tensor) and isinstance(axis, int) and value.ndim >= 3:
                self.keep(value, axis % value.ndim)
        elif not self.masks:
            # By the code and not by the values, which would have to be waited for.
            self.masks = any(isinstance(arg, float) and arg <= _ABSENT for arg in (*args, *kwargs.values()))
        return func(*args, **kwargs)

    def keep(self, logits: Tensor, axis: int) -> None:
        """Keeps a softmax in place of the one before of its kind."""
        if self.axis is not None and self.axis % logits.ndim != axis:
            return
        key = (tuple(logits.shape), axis)
        before = self.seen.get(key)
        trains = logits.requires_grad and torch.is_grad_enabled()
        if before is not None and before.trains and not trains:
            return  # what is computed for a log or by a teacher must not take the place of what is trained
        times = before.times + 1 if before is not None and before.trains == trains else 1
        self.seen.pop(key, None)  # so that the order is that of the last calls
        self.seen[key] = SoftmaxCall(logits, trains, times)


class _Bracket:
    """A recorder around each call of one module, or around a step."""

    def __init__(self, capture: Capture, axis: int | None) -> None:
        self.capture = capture
        self.axis = axis
        self.running: list[SoftmaxRecorder] = []
        self.last: Softmaxes = {}

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.capture.is_open:
            self.start()

    def start(self) -> None:
        recorder = SoftmaxRecorder(self.axis)
        recorder.__enter__()
        self.running.append(recorder)

    def leave(self, module: nn.Module | None = None, args: tuple[Any, ...] = (), output: Any = None) -> None:
        if self.running:
            recorder = self.running.pop()
            recorder.__exit__(None, None, None)
            self.last = recorder.seen
            self.capture.facts["masks"] = self.capture.facts.get("masks", False) or recorder.masks

    def take(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Softmaxes:
        last, self.last = self.last, {}
        return last

    def __reduce__(self) -> "tuple[type[_Bracket], tuple[Capture, int | None]]":
        return (_Bracket, (self.capture, self.axis))


def submodule(host: nn.Module, path: str) -> nn.Module:
    """Returns the module at a dotted path of a host, ``"."`` being the host itself, or raises HostError."""
    module, parts = host, [] if path == "." else path.split(".")
    for depth, part in enumerate(parts):
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            where = ".".join(parts[:depth]) or type(host).__name__
            children = ", ".join(name for name, _ in module.named_children()) or "none"
            raise HostError(
                f"Expected a module at '{path}', but '{where}' has no child '{part}'. Its children: {children}."
            )
        module = child
    return module


def has_modules(host: Any, *paths: str) -> bool:
    """Whether a host has a module at each dotted path."""
    try:
        return isinstance(host, nn.Module) and all(submodule(host, path) is not None for path in paths)
    except HostError:
        return False


def output_entry(output: Any, key: str) -> Tensor | None:
    """Returns the tensor at a dict's key, an attribute or a position of an output (of no key, the output), or None."""
    value = output
    if key and isinstance(output, Mapping):
        value = output.get(key)
    elif isinstance(output, (tuple, list)) and key.removeprefix("-").isdecimal():
        value = output[int(key)] if -len(output) <= int(key) < len(output) else None
    elif key:
        value = getattr(output, key, None)
    return value if isinstance(value, Tensor) else None


def describe(output: Any) -> str:
    """Says in words what a module gave."""
    kind = type(output).__name__
    if isinstance(output, Tensor):
        return f"Tensor {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"dict with keys {', '.join(map(str, output))}"
    if hasattr(output, "_fields"):
        return f"{kind} with fields {', '.join(output._fields)}"
    return f"{kind} of {len(output)}" if isinstance(output, (tuple, list)) else kind
