"""Slot attentions that return slots and no map: logits from their projections, checked by the update they made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.adapters.agreement import check_close
from ssync_pl.adapters.capture import Capture
from ssync_pl.adapters.projections import Projection, StartOfCall, take_projection
from ssync_pl.errors import HostError

__all__ = [
    "Announce",
    "SlotCall",
    "check_updates",
    "fold_frames",
    "has_modules",
    "map_size",
    "watch_slot_attention",
]

Logits = Callable[[Any, Tensor, Tensor], Tensor]
Weigh = Callable[[Any, Tensor], Tensor]


class SlotCall(NamedTuple):
    """One call of a slot attention: the last iteration's logits, and what the host itself made of them.

    Args:
        logits: ``(B, S, N)``, before the softmax over slots.
        values: ``(B, N, D)``, what the attention weighs.
        update: ``(B * S, D)``, the weighted mean that the host fed to its recurrent cell.
        weigh: Turns logits into the host's weights, ``(B, S, N)``, summing to about 1 over patches.

    Example:
        >>> SlotCall._fields
        ('logits', 'values', 'update', 'weigh')
    """

    logits: Tensor
    values: Projection
    update: Tensor
    weigh: Callable[[Tensor], Tensor]


def watch_slot_attention(
    capture: Capture,
    path: str,
    module: nn.Module,
    projections: tuple[str, str, str],
    logits: Logits,
    weigh: Weigh,
    cell: str = "gru",
) -> None:
    """Record a `SlotCall` under ``path`` whenever a slot attention runs.

    The keys are projected once a call and first, the queries in each iteration: the last query is the final one.

    Args:
        capture: Receives the records.
        path: Of the module in the host.
        module: The slot attention.
        projections: Names of its children for queries, keys and values.
        logits: ``(module, query, key) -> (B, S, N)``, in the operations and the order of the host.
        weigh: ``(module, logits) -> (B, S, N)``, the host's weights over patches.
        cell: Name of the recurrent cell whose first input is the update.

    Example:
        >>> module = nn.ModuleDict({name: nn.Identity() for name in ("q", "k", "v", "gru")})
        >>> capture = Capture()
        >>> watch_slot_attention(capture, "attention", module, ("q", "k", "v"), logits=None, weigh=None)
        >>> capture.silent
        ['attention.q', 'attention.k', 'attention.v', 'attention.gru', 'attention']
    """
    names = [f"{path}.{name}" for name in (*projections, cell)]
    _, key, _, update = names
    for name, child in zip(names, (*projections, cell), strict=True):
        target = getattr(module, child)
        if name == key:
            capture.watch(name, target, StartOfCall(capture, tuple(names)))
        elif name == update:
            capture.watch_input(name, target, _first_input)
        else:
            capture.watch(name, target, take_projection)
    capture.watch(path, module, _EndOfCall(capture, names, logits, weigh))


def check_updates(calls: list[SlotCall], name: str) -> None:
    """Refuse logits from which the host's own update of the slots does not follow.

    The update is computed again with the host's precision, since a host without maps shows nothing else.

    Args:
        calls: Of one training step.
        name: Of the slot attention, for the message.

    Raises:
        HostError: The weighted mean of the values is not what the host fed to its recurrent cell.

    Example:
        >>> logits, values = torch.zeros(1, 2, 3), Projection(torch.ones(1, 3, 4), None)
        >>> check_updates([SlotCall(logits, values, torch.ones(2, 4), lambda x: x.softmax(2))], "correct")
    """
    for call in calls:
        with torch.no_grad(), call.values.precision():
            mine = torch.einsum("bsn,bnd->bsd", call.weigh(call.logits), call.values.value)
        check_close(
            mine.reshape(call.update.shape),
            call.update,
            f"update of the slots in {name}",
            "the mean of its values weighted by the softmax over slots",
            scale=float(call.values.value.detach().abs().max()),
        )


def fold_frames(alpha: Tensor, attention: Tensor, name: str) -> Tensor:
    """Give a decoder's alpha its axes back, where the host folded frames and slots into the batch.

    Args:
        alpha: ``(B * T * S, h, w)`` or ``(B * T, S, h, w)``.
        attention: ``(B, T, S, N)`` logits of the slot attention, for these axes.
        name: Of the decoder, for the message.

    Returns:
        ``(B, T, S, h, w)``.

    Raises:
        HostError: The decoder did not run on these frames and slots.

    Example:
        >>> fold_frames(torch.zeros(12, 4, 4), torch.zeros(2, 3, 2, 16), "decoder").shape
        torch.Size([2, 3, 2, 4, 4])
    """
    batch, frames, slots, _ = attention.shape
    rows = alpha.shape[:-2].numel()
    if rows != batch * frames * slots:
        raise HostError(
            f"Expected '{name}' to run on the {batch} x {frames} frames and {slots} slots that the slot attention saw, "
            f"but it ran on {rows} slots, not {batch * frames * slots}. The two run a different number of times in a "
            "training step: write a HostAdapter that picks the calls."
        )
    return alpha.reshape(batch, frames, slots, *alpha.shape[-2:])


class Announce:
    """Wraps a `take`: leaves None under another key, whose module some training loops bypass.

    A loop may call a method of the host, such as its loss function, in place of the host. Then hooks on the host itself
    never run, and its own output, which only a self-check needs, must not count as missing.

    Args:
        capture: The capture that it records for.
        key: The key that receives None.
        take: Picks what to keep of the watched module.

    Example:
        >>> host = nn.Sequential(nn.Identity())
        >>> capture = Capture()
        >>> capture.watch("output", host)
        >>> capture.watch("0", host[0], Announce(capture, "output", lambda module, args, output: output))
        >>> capture.open()
        >>> _ = host.forward(torch.zeros(1))
        >>> capture["output"], capture.is_empty
        ([None], False)
    """

    def __init__(self, capture: Capture, key: str, take: Callable[[nn.Module, tuple[Any, ...], Any], Any]) -> None:
        self.capture = capture
        self.key = key
        self.take = take

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Leave None, and keep what ``take`` picks.

        Args:
            module: The module that ran.
            args: Its inputs.
            output: Its output.

        Returns:
            What to keep.
        """
        self.capture[self.key].append(None)
        return self.take(module, args, output)


def map_size(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
    """Height and width of a feature map ``(B, C, h, w)``: the grid of its patches; a `take` for `Capture.watch`.

    Args:
        module: The module that ran.
        args: Its inputs.
        output: Its output.

    Returns:
        ``(h, w)``.

    Example:
        >>> map_size(nn.Identity(), (), torch.zeros(1, 3, 4, 6))
        (4, 6)
    """
    return int(output.shape[-2]), int(output.shape[-1])


def has_modules(host: Any, *paths: str) -> bool:
    """Whether a host has a module at each dotted path.

    Args:
        host: A module.
        paths: Such as ``"corrector.to_q"``.

    Returns:
        True when all are there.

    Example:
        >>> has_modules(nn.ModuleDict({"a": nn.Sequential(nn.Identity())}), "a.0"), has_modules(nn.Identity(), "a")
        (True, False)
    """
    for path in paths:
        module = host
        for part in path.split("."):
            module = getattr(module, part, None)
            if not isinstance(module, nn.Module):
                return False
    return True


class _EndOfCall:
    """Logits of the last query with the call's keys."""

    def __init__(self, capture: Capture, keys: list[str], logits: Logits, weigh: Weigh) -> None:
        self.capture = capture
        self.keys = keys
        self.logits = logits
        self.weigh = weigh

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> SlotCall:
        for name in self.keys:
            if not self.capture[name]:
                raise HostError(
                    f"Expected {type(module).__name__} to run '{name}' in each of its calls, after the keys, but it "
                    "did not. Name the modules yourself: SSyncCallback(attention=..., masks=...)."
                )
        query, key, values, update = (self.capture[name][-1] for name in self.keys)
        with query.precision():
            logits = self.logits(module, query.value, key.value)
        return SlotCall(logits, values, update, partial(self.weigh, module))


def _first_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0]
