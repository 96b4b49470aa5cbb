"""Forward hooks that listen only inside a window, and can be taken off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ssync_pl.errors import HostError

__all__ = ["Capture", "refuse_replicas", "submodule"]

Take = Callable[[nn.Module, tuple[Any, ...], Any], Any]
TakeInput = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


class Capture:
    """What a host's modules produced inside an open window.

    Hooks stay on the modules from `watch` to `remove`, so that compiled graphs contain them; while the window is closed
    they return at once. A copy of a capture (a host is deep-copied by weight averaging) is empty and stays closed.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> capture = Capture()
        >>> capture.watch("layer", layer)
        >>> capture.open()
        >>> _ = layer(torch.zeros(1, 2))
        >>> capture.close()
        >>> len(capture["layer"])
        1
        >>> capture.remove()
        >>> len(layer._forward_hooks)
        0
    """

    def __init__(self) -> None:
        self._open = False
        self._training_only = False
        self._records: dict[str, list[Any]] = {}
        self._handles: list[RemovableHandle] = []

    def watch(self, key: str, module: nn.Module, take: Take | None = None) -> None:
        """Record a module's output whenever it runs inside the window.

        Args:
            key: Name under which the values are kept, in the order of the calls.
            module: The module to listen to.
            take: Picks what to keep from ``(module, args, output)``; None keeps the output.

        Example:
            >>> Capture().watch("decoder", nn.Identity(), lambda module, args, output: output.detach())
        """
        self._records.setdefault(key, [])
        self._handles.append(module.register_forward_hook(_Hook(self, key, take)))

    def watch_input(self, key: str, module: nn.Module, take: TakeInput) -> None:
        """Record something of a module's input whenever it runs inside the window.

        Args:
            key: Name under which the values are kept, in the order of the calls.
            module: The module to listen to.
            take: Picks what to keep from ``(module, args, kwargs)``.

        Example:
            >>> layer, capture = nn.Identity(), Capture()
            >>> capture.watch_input("input", layer, lambda module, args, kwargs: args[0].shape)
            >>> capture.open()
            >>> _ = layer(torch.zeros(1, 2))
            >>> capture.only("input")
            torch.Size([1, 2])
        """
        self._records.setdefault(key, [])
        self._handles.append(module.register_forward_pre_hook(_InputHook(self, key, take), with_kwargs=True))

    def keep(self, handle: RemovableHandle) -> None:
        """Take over a hook that an adapter registered itself, so that `remove` takes it off as well.

        Such a hook must do nothing while `is_open` is False.

        Args:
            handle: What ``register_..._hook`` returned.

        Example:
            >>> layer, capture = nn.Identity(), Capture()
            >>> capture.keep(layer.register_forward_pre_hook(lambda module, args: None))
            >>> capture.remove()
            >>> len(layer._forward_pre_hooks)
            0
        """
        self._handles.append(handle)

    @property
    def is_open(self) -> bool:
        """Whether hooks record now.

        Returns:
            True between `open` and `close`, under `torch.no_grad` only where `open` did not ask for training. False
            inside a backward pass, where activation checkpointing runs modules a second time.

        Example:
            >>> Capture().is_open
            False
        """
        return self._open and not _in_backward() and (not self._training_only or torch.is_grad_enabled())

    def open(self, training_only: bool = False) -> None:
        """Start to listen.

        Args:
            training_only: Leave out everything under `torch.no_grad`.

        Example:
            >>> capture = Capture()
            >>> capture.open()
            >>> capture.is_open
            True
        """
        self._open = True
        self._training_only = training_only

    def close(self) -> None:
        """Stop to listen; what was recorded stays until `clear`.

        Example:
            >>> Capture().close()
        """
        self._open = False

    def clear(self) -> None:
        """Let go of everything recorded, and of the graphs it holds.

        Example:
            >>> Capture().clear()
        """
        for values in self._records.values():
            values.clear()

    def remove(self) -> None:
        """Take every hook off the host. May be called again.

        Example:
            >>> Capture().remove()
        """
        self.close()
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getitem__(self, key: str) -> list[Any]:
        return self._records[key]

    def only(self, key: str) -> Any:
        """The value of a module that runs once a training step.

        Args:
            key: Name given to `watch`.

        Returns:
            The value.

        Raises:
            HostError: The module ran more than once, or not at all.

        Example:
            >>> capture = Capture()
            >>> capture.watch("decoder", nn.Identity())
            >>> capture.only("decoder")
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected 'decoder' to run once inside the training step, but it ran 0 times.
        """
        values = self._records[key]
        if len(values) != 1:
            raise HostError(f"Expected '{key}' to run once inside the training step, but it ran {len(values)} times.")
        return values[0]

    @property
    def is_empty(self) -> bool:
        """Some watched module produced nothing.

        Returns:
            True when at least one key has no value.

        Example:
            >>> capture = Capture()
            >>> capture.watch("decoder", nn.Identity())
            >>> capture.is_empty
            True
        """
        return not all(self._records.values())

    @property
    def silent(self) -> list[str]:
        """Keys without a value.

        Returns:
            Names given to `watch`.

        Example:
            >>> capture = Capture()
            >>> capture.watch("decoder", nn.Identity())
            >>> capture.silent
            ['decoder']
        """
        return [key for key, values in self._records.items() if not values]

    def __deepcopy__(self, memo: dict[int, Any]) -> Capture:
        return Capture()

    def __reduce__(self) -> tuple[type[Capture], tuple[()]]:
        return (Capture, ())


class _Hook:
    """One forward hook; a class and not a closure, so that a copied or pickled host stays usable."""

    def __init__(self, capture: Capture, key: str, take: Take | None) -> None:
        self.capture = capture
        self.key = key
        self.take = take

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.capture.is_open:
            refuse_replicas(module)
            value = output if self.take is None else self.take(module, args, output)
            self.capture[self.key].append(value)

    def __reduce__(self) -> tuple[type[_Hook], tuple[Capture, str, None]]:
        return (_Hook, (self.capture, self.key, None))


class _InputHook:
    """One forward pre-hook; a class for the same reason as `_Hook`."""

    def __init__(self, capture: Capture, key: str, take: TakeInput | None) -> None:
        self.capture = capture
        self.key = key
        self.take = take

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.take is not None and self.capture.is_open:
            self.capture[self.key].append(self.take(module, args, kwargs))

    def __reduce__(self) -> tuple[type[_InputHook], tuple[Capture, str, None]]:
        return (_InputHook, (self.capture, self.key, None))


def _in_backward() -> bool:
    # Traced graphs, which could not contain the second call, run no hooks in a backward pass.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def refuse_replicas(module: nn.Module) -> None:
    """Stop a training in which `torch.nn.DataParallel` runs copies of the host in threads.

    Args:
        module: The module that runs.

    Raises:
        HostError: It is a copy of another device, whose frames would mix with those of the others.

    Example:
        >>> refuse_replicas(nn.Identity())
    """
    if getattr(module, "_is_replica", False):
        raise HostError(
            "Expected one copy of the host in this process, but torch.nn.DataParallel runs one for each of several "
            "devices at the same time. Use DistributedDataParallel, or give DataParallel one device."
        )


def submodule(host: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path of a host.

    Args:
        host: The host.
        path: Such as ``"processor.module.corrector"``.

    Returns:
        The module.

    Raises:
        HostError: There is none; the message names the children at the place where the path breaks.

    Example:
        >>> submodule(nn.Sequential(nn.Linear(1, 2)), "0").out_features
        2
    """
    module = host
    for depth, part in enumerate(path.split(".")):
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            where = ".".join(path.split(".")[:depth]) or type(host).__name__
            children = ", ".join(name for name, _ in module.named_children()) or "none"
            raise HostError(
                f"Expected the host to have a module at '{path}', but '{where}' has no child '{part}'. "
                f"Its children: {children}."
            )
        module = child
    return module
