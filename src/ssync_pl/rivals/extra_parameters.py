"""Parameters that a callback trains beside the host's own: into the optimizer, and out of the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["average_gradients", "join_state", "split_state", "with_parameters"]


def with_parameters(host: nn.Module, extra: nn.Module, name: str, configure: Callable[[], Any]) -> Any:
    """Run a function that makes optimizers and schedulers, while the host seems to have another module's parameters.

    A group that is added to a finished optimizer has no learning-rate factor in its schedulers, which keep one for
    each group. Here the parameters are there from the start, behind the host's own, in the group that the host makes
    of its parameters.

    Args:
        host: The host; nothing of it is changed afterwards.
        extra: Whose parameters are added to ``host.parameters()`` and ``host.named_parameters()``.
        name: Before their names, as if it were a child of the host.
        configure: Makes the optimizers.

    Returns:
        What ``configure`` returned.

    Example:
        >>> host, extra = nn.Linear(2, 1, bias=False), nn.Linear(3, 1, bias=False)
        >>> with_parameters(host, extra, "extra", lambda: [name for name, _ in host.named_parameters()])
        ['weight', 'extra.weight']
        >>> [name for name, _ in host.named_parameters()]
        ['weight']
    """
    own = host.named_parameters

    def named_parameters(
        prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        below = f"{prefix}.{name}" if prefix else name
        return chain(own(prefix, recurse, remove_duplicate), extra.named_parameters(below) if recurse else ())

    host.__dict__["named_parameters"] = named_parameters  # `parameters` goes through it
    try:
        return configure()
    finally:
        del host.__dict__["named_parameters"]


def split_state(
    state: Mapping[str, Any], optimizer: Optimizer, extra: nn.Module
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take the state of a module's parameters out of that of an optimizer, as if it had never had them.

    Args:
        state: The optimizer's ``state_dict()``; not changed.
        optimizer: The optimizer.
        extra: The module.

    Returns:
        The state without them, its parameters numbered without a gap, and their states by name.

    Example:
        >>> host, extra = nn.Linear(2, 1, bias=False), nn.Linear(3, 1, bias=False)
        >>> adam = torch.optim.Adam([*host.parameters(), *extra.parameters()])
        >>> (host.weight.sum() + extra.weight.sum()).backward(); adam.step()
        >>> plain, taken = split_state(adam.state_dict(), adam, extra)
        >>> plain["param_groups"][0]["params"], list(plain["state"]), list(taken)
        ([0], [0], ['weight'])
    """
    names = {id(parameter): name for name, parameter in extra.named_parameters()}
    numbers: dict[Any, int] = {}
    taken: dict[str, Any] = {}
    groups = []
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        kept = []
        for parameter, number in zip(group["params"], saved["params"], strict=True):
            name = names.get(id(parameter))
            if name is None:
                kept.append(numbers.setdefault(number, len(numbers)))
            elif number in state["state"]:
                taken[name] = state["state"][number]
        groups.append({**saved, "params": kept})
    plain = {numbers[number]: value for number, value in state["state"].items() if number in numbers}
    return {**state, "state": plain, "param_groups": groups}, taken


def join_state(
    plain: Mapping[str, Any], optimizer: Optimizer, extra: nn.Module, taken: Mapping[str, Any]
) -> dict[str, Any]:
    """The reverse of `split_state`, for an optimizer that has the parameters.

    Args:
        plain: State of an optimizer without them; not changed.
        optimizer: The optimizer that will load the result.
        extra: The module.
        taken: States by name; parameters without one start afresh.

    Returns:
        A state for ``optimizer.load_state_dict``. Where the other parameters differ in number from those of
        ``plain``, it is returned as it is, and the optimizer will say so.

    Example:
        >>> host, extra = nn.Linear(2, 1, bias=False), nn.Linear(3, 1, bias=False)
        >>> plain = torch.optim.Adam(host.parameters()).state_dict()
        >>> both = torch.optim.Adam([*host.parameters(), *extra.parameters()])
        >>> join_state(plain, both, extra, {})["param_groups"][0]["params"]
        [0, 1]
    """
    names = {id(parameter): name for name, parameter in extra.named_parameters()}
    others = [[id(p) for p in group["params"] if id(p) not in names] for group in optimizer.param_groups]
    if [len(group) for group in others] != [len(group["params"]) for group in plain["param_groups"]]:
        return dict(plain)
    state: dict[int, Any] = {}
    groups = []
    count = 0
    for group, saved in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        own = iter(saved["params"])
        first = count
        for parameter in group["params"]:
            name = names.get(id(parameter))
            value = plain["state"].get(next(own)) if name is None else taken.get(name)
            if value is not None:
                state[count] = value
            count += 1
        groups.append({**saved, "params": list(range(first, count))})
    return {**plain, "state": state, "param_groups": groups}


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over ranks, for parameters that are no part of what DDP wraps.

    It may be called after each backward pass of an accumulation: what was averaged before stays what it is.

    Args:
        parameters: The parameters, with a gradient on all ranks or on none.

    Example:
        >>> average_gradients([])
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() < 2:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()
