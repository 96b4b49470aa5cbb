"""What an adapter is, which adapters there are, and which of them knows a host."""

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import nn

from ssync_pl.adapters.capture import Capture
from ssync_pl.errors import ConfigError, HostError
from ssync_pl.method.maps import SSyncMaps

# Two levels of children reach a model inside a trainer's module inside DDP; deeper ones are parts of a host.
_DEPTH = 2


class HostAdapter(ABC):
    """Turns one family of hosts into `SSyncMaps`: recognise, listen, collect."""

    name: ClassVar[str]
    """Short name for ``adapter=...``."""

    @abstractmethod
    def match(self, host: nn.Module) -> bool:
        """Whether this adapter knows the host, or a part of one, by its structure."""

    @abstractmethod
    def attach(self, host: nn.Module) -> Capture:
        """Puts hooks on the host and returns their closed capture, whose ``remove()`` takes them off again.

        Raises HostError where the host has no such modules, or draws no object masks.
        """

    @abstractmethod
    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        """Turns what one training step gave into maps ``(B, T, S, N)``, attached to the graph.

        Args:
            capture: Filled by one training step.
            batch: The batch of that step, for hosts whose grid follows from the size of the frames.

        Raises:
            HostError: The modules did not run as this family runs them, or the grid is not known.
        """

    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        """Compares what was recomputed with what the host itself used; called in the first step, raises HostError."""
        return


_REGISTRY: dict[str, type[HostAdapter]] = {}


def register_adapter(adapter: type[HostAdapter]) -> type[HostAdapter]:
    """Makes an adapter class known by its name, in place of another of that name; works as a decorator."""
    _REGISTRY[adapter.name] = adapter
    return adapter


def adapter_names() -> list[str]:
    """Returns the sorted names of all registered adapters."""
    return sorted(_REGISTRY)


class Located(NamedTuple):
    """An adapter, the module that it listens to, which is the host or a model inside it, and its path, or ``""``."""

    adapter: HostAdapter
    root: nn.Module
    path: str


def locate(spec: str | HostAdapter, host: nn.Module, grid: tuple[int, int] | None = None) -> Located:
    """Finds the adapter that a user asked for, and the part of the host that it knows.

    The host itself comes first, then what DDP and `torch.compile` wrap, then its children and theirs. ``spec`` is
    ``"auto"``, the name of an adapter, or an adapter; ``grid`` is for adapters that cannot always find it. Raises
    ConfigError for an unknown name or a grid that is not taken, HostError where no adapter knows the host, or several.
    """
    if isinstance(spec, HostAdapter):
        if grid is not None:
            raise ConfigError(f"Expected no `grid` beside an adapter object, but got {grid}. Give it to the adapter.")
        # Where it does not match, its own `attach` says best what it misses.
        return next(iter(_search(host, [spec])), Located(spec, host, ""))
    known = ", ".join(adapter_names())
    if spec != "auto" and spec not in _REGISTRY:
        raise ConfigError(f"Expected argument `adapter` to be 'auto' or one of {known}, but got {spec!r}.")
    found = _search(host, [_REGISTRY[name]() for name in (adapter_names() if spec == "auto" else [spec])])
    if len(found) == 1:
        return found[0]._replace(adapter=_with_grid(found[0].adapter, grid))
    name, words = type(host).__name__, ("attention", "attn", "corrector", "grouping", "decoder", "mask", "slot")
    if found:
        places = ", ".join(sorted(f"{one.adapter.name} (at {one.path or 'the host'})" for one in found))
        raise HostError(
            f"Expected one adapter to know {name}, but {places} all do. Pass adapter='...', or name the modules of one "
            "model: SSyncCallback(attention='path.of.attention', masks='path.of.decoder')."
        )
    paths = [path for path, _ in host.named_modules() if any(word in path.rpartition(".")[2] for word in words)]
    candidates = f"Candidates: {', '.join([*paths[:12], *(['...'] if paths[12:] else [])]) or 'none found by name'}."
    if spec != "auto":
        raise HostError(f"Expected a host that the adapter '{spec}' knows, but {name} lacks its modules. {candidates}")
    raise HostError(
        f"Expected a host that one of the adapters knows ({known}), but {name} is none. Name the modules yourself, as "
        "`ssync-pl doctor` finds them: SSyncCallback(attention='path.of.attention', masks='path.of.decoder'), where "
        f"'path:key' picks an entry of an output and 'softmax:path' what a softmax reads. {candidates}"
    )


def _search(host: nn.Module, adapters: list[HostAdapter]) -> list[Located]:
    """What is found at the shallowest depth where anything is."""
    level = [_unwrapped(host, "")]
    for _ in range(_DEPTH + 1):
        found = [Located(adapter, root, path) for path, root in level for adapter in adapters if adapter.match(root)]
        if found:
            return found
        level = [
            _unwrapped(child, f"{path}.{name}" if path else name)
            for path, root in level
            for name, child in root.named_children()
        ]
    return []


def _unwrapped(module: nn.Module, path: str) -> tuple[str, nn.Module]:
    """The module inside `torch.compile` and data-parallel wrappers, whose only child it is."""
    while type(module).__module__.startswith(("torch.nn.parallel", "torch._dynamo", "torch.distributed")):
        children = dict(module.named_children())
        (name,) = children if len(children) == 1 else ("",)
        if name not in ("_orig_mod", "module"):
            break
        path, module = f"{path}.{name}" if path else name, children[name]
    return path, module


def _with_grid(adapter: HostAdapter, grid: tuple[int, int] | None) -> HostAdapter:
    if grid is None:
        return adapter
    kind = type(adapter)
    if "grid" not in inspect.signature(kind).parameters:
        raise ConfigError(f"Expected no `grid` with '{kind.name}', which reads it off the host. Leave it out.")
    return kind(grid=grid)  # type: ignore[call-arg]
