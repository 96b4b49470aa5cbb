"""Hooks that listen inside a window only: to outputs, to inputs, and to the softmaxes inside of modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ssync_pl.adapters.softmaxes import Softmaxes, SoftmaxRecorder
from ssync_pl.errors import HostError

__all__ = ["NAME_THEM", "Capture", "describe", "has_modules", "output_entry", "submodule"]

Take = Callable[[nn.Module, tuple[Any, ...], Any], Any]

NAME_THEM = "Name the modules yourself: attention=... and masks=... of SSyncCallback or attach."


class Capture:
    """What a host's modules gave inside an open window.

    Hooks stay on the modules from `watch` to `remove`, so that compiled graphs contain them; while the window is closed
    they return at once. A copied or pickled host keeps hooks of an empty capture that is never open.

    Attributes:
        facts: What an adapter knows of the host when it attaches and needs when it collects.

    Example:
        >>> layer, capture = nn.Linear(2, 2), Capture()
        >>> capture.watch("layer", layer)
        >>> capture.open()
        >>> output = layer(torch.zeros(1, 2))
        >>> capture.only("layer") is output
        True
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._open = False
        self._training_only = False
        self._records: dict[str, list[Any]] = {}
        self._optional: set[str] = set()
        self._modules: dict[str, nn.Module] = {}
        self._handles: list[RemovableHandle] = []
        self._step_taps: list[tuple[str, int | None]] = []
        self._recorders: list[tuple[str, SoftmaxRecorder]] = []

    def watch(self, key: str, module: nn.Module, take: Take | None = None, optional: bool = False) -> None:
        """Records a module's output whenever it runs inside the window.

        Args:
            key: Name under which the values are kept, in the order of the calls.
            module: The module to listen to.
            take: Picks what to keep from ``(module, args, output)``; None keeps the output.
            optional: The module may stay silent, as a host whose loss function a loop calls in place of the host.
        """
        self._add(key, module, optional)
        self._handles.append(module.register_forward_hook(_Hook(self, key, take)))

    def watch_input(self, key: str, module: nn.Module, take: Take) -> None:
        """Records what ``take`` picks from ``(module, args, kwargs)`` whenever a module runs inside the window."""
        self._add(key, module, optional=False)
        self._handles.append(module.register_forward_pre_hook(_Hook(self, key, take), with_kwargs=True))

    def tap(self, key: str, module: nn.Module, axis: int | None = None) -> None:
        """Records the softmaxes inside a module, over ``axis`` where that is given: one `Softmaxes` per call."""
        bracket = _Bracket(self, axis)
        self._handles.append(module.register_forward_pre_hook(bracket.enter))
        # A forward pass that fails must not leave the recorder on.
        self._handles.append(module.register_forward_hook(bracket.leave, always_call=True))
        self.watch(key, module, bracket.take)

    def tap_step(self, key: str, host: nn.Module, axis: int | None = None) -> None:
        """Records the softmaxes of a whole training step, also outside of any forward pass.

        A window that asks for training only also spans code that is not the host's (`ssync_pl.attach`), so there the
        host's forward pass counts.
        """
        self.tap(key, host, axis)
        self._step_taps.append((key, axis))

    @property
    def is_open(self) -> bool:
        """Whether hooks record now.

        Never inside a backward pass, where activation checkpointing runs modules a second time, nor under
        `torch.no_grad` where `open` asked for training only.
        """
        return self._open and not _in_backward() and (not self._training_only or torch.is_grad_enabled())

    def open(self, training_only: bool = False) -> None:
        """Starts to listen; ``training_only`` leaves out everything under `torch.no_grad`."""
        self._leave_step()
        self._open = True
        self._training_only = training_only
        for key, axis in () if training_only else self._step_taps:
            recorder = SoftmaxRecorder(axis)
            recorder.__enter__()
            self._recorders.append((key, recorder))

    def close(self) -> None:
        """Stops to listen; what was recorded stays until `clear`."""
        for key, recorder in self._leave_step():
            # Calls of the host's forward pass are part of the step.
            self[key][:] = [recorder.seen] if recorder.seen else []
            self._note(recorder)
        self._open = False

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
        values = self._records.get(key)
        return values[-1] if values else None

    @property
    def silent(self) -> list[str]:
        """Keys without a value, those of optional modules left out."""
        return [key for key, values in self._records.items() if not values and key not in self._optional]

    @property
    def is_empty(self) -> bool:
        """Whether some watched module gave nothing."""
        return bool(self.silent)

    def refuse_bypass(self) -> None:
        """Refuses a step that went past the hooks of a module by its ``forward``, since modules inside of it ran."""
        heard = {module for key, module in self._modules.items() if self._records[key]}
        for key in self.silent:
            if heard & {*self._modules[key].modules()} - {self._modules[key]}:
                name = type(self._modules[key]).__name__
                raise HostError(
                    f"Expected the hooks on '{key}' to run, but the step calls the method forward of {name}, such as "
                    "self.forward(...), which goes past all hooks. Call the module itself: self(...)."
                )

    def _add(self, key: str, module: nn.Module, optional: bool) -> None:
        self._records.setdefault(key, [])
        self._modules[key] = module
        if optional:
            self._optional.add(key)

    def _note(self, recorder: SoftmaxRecorder) -> None:
        self.facts["masks"] = self.facts.get("masks", False) or recorder.masks

    def _leave_step(self) -> list[tuple[str, SoftmaxRecorder]]:
        entered, self._recorders = self._recorders, []
        for _, recorder in reversed(entered):
            recorder.__exit__(None, None, None)
        return entered

    def __deepcopy__(self, memo: dict[int, Any]) -> Capture:
        return Capture()

    def __reduce__(self) -> tuple[type[Capture], tuple[()]]:
        return (Capture, ())


class _Hook:
    """A forward hook, or a pre-hook with keywords; a class, so that a copied or pickled host stays usable."""

    def __init__(self, capture: Capture, key: str, take: Take | None) -> None:
        self.capture = capture
        self.key = key
        self.take = take

    def __call__(self, module: nn.Module, args: tuple[Any, ...], given: Any) -> None:
        if self.capture.is_open:
            _refuse_replicas(module)
            self.capture[self.key].append(given if self.take is None else self.take(module, args, given))

    def __reduce__(self) -> tuple[type[_Hook], tuple[Capture, str, None]]:
        return (_Hook, (self.capture, self.key, None))


class _Bracket:
    """A recorder around each call of one module."""

    def __init__(self, capture: Capture, axis: int | None) -> None:
        self.capture = capture
        self.axis = axis
        self.running: list[SoftmaxRecorder] = []
        self.last: Softmaxes = {}

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.capture.is_open:
            recorder = SoftmaxRecorder(self.axis)
            recorder.__enter__()
            self.running.append(recorder)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.running:
            recorder = self.running.pop()
            recorder.__exit__(None, None, None)
            self.last = recorder.seen
            self.capture._note(recorder)

    def take(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Softmaxes:
        last, self.last = self.last, {}
        return last

    def __reduce__(self) -> tuple[type[_Bracket], tuple[Capture, int | None]]:
        return (_Bracket, (self.capture, self.axis))


def submodule(host: nn.Module, path: str) -> nn.Module:
    """Returns the module at a dotted path of a host; ``"."`` is the host itself.

    Raises:
        HostError: There is none; the message names the children at the place where the path breaks.
    """
    if path == ".":
        return host
    module = host
    parts = path.split(".")
    for depth, part in enumerate(parts):
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            where = ".".join(parts[:depth]) or type(host).__name__
            children = ", ".join(name for name, _ in module.named_children()) or "none"
            raise HostError(
                f"Expected the host to have a module at '{path}', but '{where}' has no child '{part}'. "
                f"Its children: {children}."
            )
        module = child
    return module


def has_modules(host: Any, *paths: str) -> bool:
    """Whether a host has a module at each dotted path."""
    if not isinstance(host, nn.Module):
        return False
    try:
        return all(submodule(host, path) is not None for path in paths)
    except HostError:
        return False


def output_entry(output: Any, key: str) -> Tensor | None:
    """Returns the tensor at a dict's key, an attribute or a position of an output (of no key, the output), or None."""
    value = output
    if isinstance(output, Mapping) and key:
        value = output.get(key)
    elif isinstance(output, (tuple, list)) and key.removeprefix("-").isdecimal():
        index = int(key)
        value = output[index] if -len(output) <= index < len(output) else None
    elif key:
        value = getattr(output, key, None)
    return value if isinstance(value, Tensor) else None


def describe(output: Any) -> str:
    """Says in words what a module gave."""
    if isinstance(output, Tensor):
        return f"Tensor {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"dict with keys {', '.join(map(str, output))}"
    if hasattr(output, "_fields"):
        return f"{type(output).__name__} with fields {', '.join(output._fields)}"
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of {len(output)}"
    return type(output).__name__


def _in_backward() -> bool:
    # Traced graphs, which could not contain the second call, run no hooks in a backward pass.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _refuse_replicas(module: nn.Module) -> None:
    if getattr(module, "_is_replica", False):
        raise HostError(
            "Expected one copy of the host in this process, but torch.nn.DataParallel runs one for each of several "
            "devices at the same time. Use DistributedDataParallel, or give DataParallel one device."
        )
