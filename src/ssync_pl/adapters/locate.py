"""Which adapter serves a host, and which part of the host it has to listen to."""

from __future__ import annotations

import inspect
from typing import NamedTuple

from torch import nn

from ssync_pl.adapters.base import HostAdapter, adapter_names, registered_adapter
from ssync_pl.errors import ConfigError, HostError

__all__ = ["Located", "find_adapter", "locate", "resolve_adapter"]

# Two levels of children reach a model inside a trainer's module inside DDP; deeper ones are parts of a host.
_DEPTH = 2


class Located(NamedTuple):
    """An adapter and the module that it listens to.

    Args:
        adapter: The adapter.
        root: The host, or the model inside it: a wrapper's ``module``, or the child that is the slot model.
        path: Dotted path of ``root`` inside the host; empty for the host itself.

    Example:
        >>> Located._fields
        ('adapter', 'root', 'path')
    """

    adapter: HostAdapter
    root: nn.Module
    path: str


def locate(spec: str | HostAdapter, host: nn.Module, grid: tuple[int, int] | None = None) -> Located:
    """The adapter that a user asked for, and the part of the host that it knows.

    The host itself comes first; then what DDP and `torch.compile` wrap; then its children and theirs, which serves
    trainers' modules around a model.

    Args:
        spec: ``"auto"``, the name of an adapter, or an adapter.
        host: The model that is trained.
        grid: ``(H, W)`` patches, for adapters that cannot always find it.

    Returns:
        Adapter, module and path.

    Raises:
        ConfigError: There is no adapter of that name, or it takes no grid.
        HostError: No adapter knows the host or a part of it, or several do.

    Example:
        >>> from ssync_pl.hosts import SAVi
        >>> located = locate("auto", nn.ModuleDict({"student": SAVi(num_slots=2)}))
        >>> located.adapter.name, located.path
        ('savi', 'student')
    """
    if isinstance(spec, HostAdapter):
        if grid is not None:
            raise ConfigError(f"Expected no `grid` beside an adapter object, but got {grid}. Give it to the adapter.")
        found = _search(host, [spec])
        # Its own `attach` says best what it misses.
        return found[0] if found else Located(spec, host, "")
    if spec == "auto":
        kinds = [kind for name in adapter_names() if (kind := registered_adapter(name)) is not None]
        found = _search(host, [kind() for kind in kinds])
    else:
        kind = registered_adapter(spec)
        if kind is None:
            raise ConfigError(
                f"Expected argument `adapter` to be 'auto' or one of {', '.join(adapter_names())}, but got {spec!r}."
            )
        found = _search(host, [kind()])
    if len(found) == 1:
        adapter, root, path = found[0]
        return Located(_with_grid(adapter, grid), root, path)
    name = type(host).__name__
    if found:
        places = ", ".join(sorted(f"{one.adapter.name} (at {one.path or 'the host'})" for one in found))
        raise HostError(
            f"Expected one adapter to know {name}, but {places} all do. Pass adapter='...', or name the modules of one "
            "model: SSyncCallback(attention='path.of.attention', masks='path.of.decoder')."
        )
    candidates = _candidates(host)
    if spec != "auto":
        raise HostError(
            f"Expected a host that the adapter '{spec}' knows, but {name} lacks its modules. "
            f"Candidates in this host: {candidates}."
        )
    raise HostError(
        f"Expected a host that one of the adapters knows ({', '.join(adapter_names())}), but {name} is none. Name the "
        "modules yourself: SSyncCallback(attention='path.of.attention', masks='path.of.decoder'), where an output with "
        "several entries is picked with 'path:key', and what a module's softmax reads with 'softmax:path'. "
        f"`ssync-pl doctor` helps to find them. Candidates: {candidates}."
    )


def find_adapter(host: nn.Module) -> HostAdapter:
    """The adapter that recognises a host.

    Args:
        host: The model that is trained.

    Returns:
        A new adapter.

    Raises:
        HostError: None or several of them do; the message lists modules that look like the two maps' places.

    Example:
        >>> find_adapter(nn.Identity())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ssync_pl.errors.HostError: Expected a host that one of the adapters knows (...), but Identity is none...
    """
    return locate("auto", host).adapter


def resolve_adapter(spec: str | HostAdapter, host: nn.Module, grid: tuple[int, int] | None = None) -> HostAdapter:
    """The adapter that a user asked for, without the place it listens to.

    Args:
        spec: ``"auto"``, the name of an adapter, or an adapter.
        host: The model that is trained.
        grid: ``(H, W)`` patches, for adapters that cannot always find it.

    Returns:
        An adapter.

    Raises:
        ConfigError: There is no adapter of that name, or it takes no grid.
        HostError: No adapter knows the host, or the named one does not.

    Example:
        >>> resolve_adapter("nothing", nn.Identity())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected argument `adapter` to be 'auto' or one of ..., but got 'nothing'.
    """
    return locate(spec, host, grid).adapter


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
    while True:
        children = dict(module.named_children())
        (name,) = children if len(children) == 1 else ("",)
        if name not in ("_orig_mod", "module") or not _wraps(module):
            return path, module
        path = f"{path}.{name}" if path else name
        module = children[name]


def _wraps(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith(("torch.nn.parallel", "torch._dynamo", "torch.distributed"))


def _with_grid(adapter: HostAdapter, grid: tuple[int, int] | None) -> HostAdapter:
    if grid is None:
        return adapter
    kind = type(adapter)
    if "grid" not in inspect.signature(kind).parameters:
        raise ConfigError(
            f"Expected no `grid` with the adapter '{kind.name}', which reads it off the host. Leave it out."
        )
    return kind(grid=grid)  # type: ignore[call-arg]


def _candidates(host: nn.Module) -> str:
    words = ("attention", "attn", "corrector", "grouping", "decoder", "mask", "slot")
    names = [name for name, _ in host.named_modules() if name and any(w in name.rsplit(".", 1)[-1] for w in words)]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none found by name"
