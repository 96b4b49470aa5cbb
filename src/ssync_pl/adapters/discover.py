"""Where the two maps of an unknown host may be: one forward pass, listened to everywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from ssync_pl.adapters.pairing import Pair, Seen, find_pair
from ssync_pl.adapters.softmaxes import SoftmaxCall, SoftmaxRecorder

__all__ = ["Discovery", "FoundPair", "Spot", "discover"]


@dataclass(frozen=True)
class Spot:
    """A softmax as ``"softmax:path"`` would hear it.

    ``calls`` counts the calls of the module with a softmax of this ``shape`` inside; ``innermost`` is whether no module
    further inside runs it.
    """

    path: str
    calls: int
    shape: tuple[int, ...]
    axis: int
    has_gradient: bool
    innermost: bool

    @property
    def slots(self) -> int:
        """Entries on the axis of the softmax: S, where this is a map over slots."""
        return self.shape[self.axis]


@dataclass(frozen=True)
class FoundPair:
    """Two softmaxes that can be slot attention and object masks of one clip, of B videos and T frames."""

    attention: Spot
    masks: Spot
    batch: int
    frames: int

    @property
    def places(self) -> tuple[str, str]:
        """What to write for ``attention`` and ``masks``, as `ssync_pl.adapters.PathAdapter` takes them."""
        return f"softmax:{self.attention.path}", f"softmax:{self.masks.path}"


@dataclass(frozen=True)
class Discovery:
    """Candidates, the likeliest first, and every softmax that was heard, at the innermost module that runs it."""

    pairs: tuple[FoundPair, ...]
    spots: tuple[Spot, ...]


def discover(host: nn.Module, run: Callable[[], Any]) -> Discovery:
    """Runs a host once and looks for softmaxes that can be its two maps.

    Two softmaxes belong together when they are over as many slots, over more patches than slots, on the same videos and
    frames, and the attention comes first. Of several modules around a softmax, one that runs once per frame is meant:
    the innermost one with parameters.

    Args:
        host: The model.
        run: Runs one training step or forward pass of it.

    Returns:
        Candidates, and all that was heard.

    Example:
        >>> host = nn.ModuleDict({"grouping": nn.Softmax(1), "drawing": nn.Softmax(2)})
        >>> logits = torch.zeros(2, 3, 16)
        >>> found = discover(host, lambda: [host["grouping"](logits), host["drawing"](logits.transpose(1, 2))])
        >>> found.pairs[0].places
        ('softmax:grouping', 'softmax:drawing')
    """
    tracker = _Tracker(host)
    try:
        with tracker:
            run()
    finally:
        tracker.remove()
    spots = tracker.spots()
    return Discovery(_rank(spots), tuple(one.spot for one in spots if one.spot.innermost))


@dataclass
class _Heard:
    """One softmax, and the modules around it with the number of their call, outermost first."""

    around: tuple[tuple[str, int], ...]
    shape: tuple[int, ...]
    axis: int
    has_gradient: bool


@dataclass
class _Candidate:
    spot: Spot
    first: int
    last: int
    depth: int
    has_parameters: bool

    def seen(self) -> Seen:
        values = [torch.empty(self.spot.shape, device="meta") for _ in range(self.spot.calls)]
        return Seen(values, self.spot.axis, "logits", self.spot.path)


class _Tracker(SoftmaxRecorder):
    """Hears softmaxes, and knows which modules are running."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.heard: list[_Heard] = []
        self._counts: dict[str, int] = {}
        self._stack: list[tuple[str, int]] = []
        self._handles: list[RemovableHandle] = []
        self._parameters: set[str] = set()
        for name, module in host.named_modules():
            if not name:
                continue  # the host itself is around everything, also around what runs outside of its forward pass
            if next(module.parameters(), None) is not None:
                self._parameters.add(name)
            self._handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            self._handles.append(module.register_forward_hook(partial(self._leave, name), always_call=True))

    @override
    def keep(self, call: SoftmaxCall) -> None:
        trains = call.logits.requires_grad and torch.is_grad_enabled()
        self.heard.append(_Heard(((".", 1), *self._stack), tuple(call.logits.shape), call.axis, trains))

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1
        self._stack.append((name, self._counts[name]))

    def _leave(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        if self._stack and self._stack[-1][0] == name:
            self._stack.pop()

    def spots(self) -> list[_Candidate]:
        """Every softmax, as each module around it would hear it."""
        calls: dict[tuple[str, tuple[int, ...], int], list[tuple[int, int, bool, bool]]] = {}
        for order, heard in enumerate(self.heard):
            for depth, (path, number) in enumerate(heard.around):
                inner = depth == len(heard.around) - 1
                key = (path, heard.shape, heard.axis)
                calls.setdefault(key, []).append((number, order, heard.has_gradient, inner))
        found = []
        for (path, shape, axis), entries in calls.items():
            numbers, orders, gradients, inners = zip(*entries, strict=True)
            spot = Spot(path, len(set(numbers)), shape, axis, all(gradients), any(inners))
            depth = 0 if path == "." else path.count(".") + 1
            found.append(_Candidate(spot, min(orders), max(orders), depth, path in self._parameters))
        return found


def _rank(spots: list[_Candidate]) -> tuple[FoundPair, ...]:
    ranked: list[tuple[tuple[Any, ...], FoundPair]] = []
    by_slots = sorted(spots, key=lambda one: one.spot.slots)
    for _, group in itertools.groupby(by_slots, key=lambda one: one.spot.slots):
        for one, two in itertools.permutations(list(group), 2):
            pair = find_pair([one.seen()], [two.seen()]) if one.first < two.first else None
            if pair is not None and all(layout.count > layout.slots for _, layout in pair.sides):
                ranked.append((_score(one, two, pair), FoundPair(one.spot, two.spot, pair.batch, pair.frames)))
    ranked.sort(key=lambda entry: entry[0], reverse=True)
    # The same two softmaxes are heard from every module around them: only the best place of each is told.
    best: dict[tuple[Any, ...], FoundPair] = {}
    for _, found in ranked:
        best.setdefault((found.attention.shape, found.attention.axis, found.masks.shape, found.masks.axis), found)
    return tuple(best.values())


def _score(one: _Candidate, two: _Candidate, pair: Pair) -> tuple[Any, ...]:
    first, second = (layout for _, layout in pair.sides)
    return (
        one.spot.has_gradient and two.spot.has_gradient,
        pair.batch * pair.frames,
        first.count == second.count,
        -(first.heads > 1) - (second.heads > 1),
        two.last,
        -one.first,
        pair.frames,
        one.has_parameters + two.has_parameters,
        one.depth + two.depth,
    )
