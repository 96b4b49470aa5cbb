"""Where the two maps of an unknown host may be: one forward pass, listened to everywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ssync_pl.adapters.pairing import Pair, Seen, find_pair
from ssync_pl.adapters.tap import softmax_call

__all__ = ["Discovery", "FoundPair", "Spot", "discover"]


@dataclass(frozen=True)
class Spot:
    """A softmax as ``"softmax:path"`` would hear it.

    Args:
        path: Dotted path of the module around it; ``"."`` is the host itself.
        calls: How often the module ran with a softmax of this shape inside.
        shape: Of the softmax's input in one call.
        axis: Of the softmax.
        has_gradient: Whether its input carries gradient.
        innermost: Whether no module further inside runs the softmax.

    Example:
        >>> Spot("slot_attention", 4, (2, 7, 256), 1, True, True).slots
        7
    """

    path: str
    calls: int
    shape: tuple[int, ...]
    axis: int
    has_gradient: bool
    innermost: bool

    @property
    def slots(self) -> int:
        """Entries on the axis of the softmax.

        Returns:
            S, where this is a map over slots.

        Example:
            >>> Spot("decoder", 1, (8, 256, 7), 2, True, True).slots
            7
        """
        return self.shape[self.axis]


@dataclass(frozen=True)
class FoundPair:
    """Two softmaxes that can be slot attention and object masks of one clip.

    Args:
        attention: The slot attention.
        masks: The decoder's masks.
        batch: B videos.
        frames: T frames.

    Example:
        >>> attention, masks = Spot("a", 4, (2, 7, 256), 1, True, True), Spot("b", 1, (8, 7, 256), 1, True, True)
        >>> FoundPair(attention, masks, 2, 4).places
        ('softmax:a', 'softmax:b')
    """

    attention: Spot
    masks: Spot
    batch: int
    frames: int

    @property
    def places(self) -> tuple[str, str]:
        """What to write for ``attention`` and ``masks``.

        Returns:
            Two places, as `ssync_pl.adapters.PathAdapter` takes them.

        Example:
            >>> spot = Spot("decoder", 1, (8, 7, 256), 1, True, True)
            >>> FoundPair(spot, spot, 8, 1).places[1]
            'softmax:decoder'
        """
        return f"softmax:{self.attention.path}", f"softmax:{self.masks.path}"


@dataclass(frozen=True)
class Discovery:
    """What `discover` heard.

    Args:
        pairs: Candidates, the likeliest first.
        spots: Every softmax over an axis, at the innermost module that runs it.

    Example:
        >>> Discovery((), ()).pairs
        ()
    """

    pairs: tuple[FoundPair, ...]
    spots: tuple[Spot, ...]


def discover(host: nn.Module, run: Callable[[], Any]) -> Discovery:
    """Run a host once and look for softmaxes that can be its two maps.

    Two softmaxes belong together when they are over as many slots, over more patches than slots, on the same videos and
    frames, and the attention comes first. Of several modules around a softmax, one that runs once a frame is meant: the
    innermost one with parameters.

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
        with _Listener(tracker):
            run()
    finally:
        tracker.remove()
    spots = tracker.spots()
    innermost = tuple(one.spot for one in spots if one.spot.innermost)
    return Discovery(_rank(spots), innermost)


@dataclass
class _Heard:
    """One softmax call and the calls of modules around it, outermost first."""

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


class _Listener(TorchFunctionMode):
    def __init__(self, tracker: _Tracker) -> None:
        super().__init__()
        self.tracker = tracker

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call = softmax_call(func, args, kwargs)
        if call is not None:
            trains = call.logits.requires_grad and torch.is_grad_enabled()
            self.tracker.hear(tuple(call.logits.shape), call.axis, trains)
        return func(*args, **kwargs)


class _Tracker:
    """Knows which modules are running."""

    def __init__(self, host: nn.Module) -> None:
        self.heard: list[_Heard] = []
        self._counts: dict[str, int] = {}
        self._stack: list[tuple[str, int]] = []
        self._handles = []
        self._parameters: set[str] = set()
        for name, module in host.named_modules():
            if not name:
                continue  # the host itself is around everything, also around what runs outside of its forward pass
            if next(module.parameters(), None) is not None:
                self._parameters.add(name)
            self._handles.append(module.register_forward_pre_hook(_Enter(self, name)))
            self._handles.append(module.register_forward_hook(_Leave(self, name), always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def enter(self, name: str) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1
        self._stack.append((name, self._counts[name]))

    def leave(self, name: str) -> None:
        if self._stack and self._stack[-1][0] == name:
            self._stack.pop()

    def hear(self, shape: tuple[int, ...], axis: int, has_gradient: bool) -> None:
        self.heard.append(_Heard(((".", 1), *self._stack), shape, axis, has_gradient))

    def spots(self) -> list[_Candidate]:
        calls: dict[tuple[str, tuple[int, ...], int], list[tuple[int, int, bool, bool]]] = {}
        for order, heard in enumerate(self.heard):
            for depth, (path, number) in enumerate(heard.around):
                inner = depth == len(heard.around) - 1
                key = (path, heard.shape, heard.axis)
                calls.setdefault(key, []).append((number, order, heard.has_gradient, inner))
        found = []
        for (path, shape, axis), entries in calls.items():
            spot = Spot(
                path=path,
                calls=len({number for number, _, _, _ in entries}),
                shape=shape,
                axis=axis,
                has_gradient=all(gradient for _, _, gradient, _ in entries),
                innermost=any(inner for _, _, _, inner in entries),
            )
            depth = 0 if path == "." else path.count(".") + 1
            orders = [order for _, order, _, _ in entries]
            found.append(_Candidate(spot, min(orders), max(orders), depth, path in self._parameters))
        return found


class _Enter:
    def __init__(self, tracker: _Tracker, name: str) -> None:
        self.tracker = tracker
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.tracker.enter(self.name)


class _Leave(_Enter):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        self.tracker.leave(self.name)


def _rank(spots: list[_Candidate]) -> tuple[FoundPair, ...]:
    ranked: list[tuple[tuple[Any, ...], FoundPair]] = []
    by_slots = sorted(spots, key=lambda one: one.spot.slots)
    for _, group in itertools.groupby(by_slots, key=lambda one: one.spot.slots):
        for one, two in itertools.permutations(list(group), 2):
            pair = find_pair([one.seen()], [two.seen()]) if one.first < two.first else None
            if pair is None or not _more_patches_than_slots(pair):
                continue
            ranked.append((_score(one, two, pair), FoundPair(one.spot, two.spot, pair.batch, pair.frames)))
    ranked.sort(key=lambda entry: entry[0], reverse=True)
    # The same two softmaxes are heard from every module around them: only the best place of each is told.
    best: dict[tuple[Any, ...], FoundPair] = {}
    for _, found in ranked:
        best.setdefault((found.attention.shape, found.attention.axis, found.masks.shape, found.masks.axis), found)
    return tuple(best.values())


def _more_patches_than_slots(pair: Pair) -> bool:
    return all(layout.count > layout.slots for _, layout in pair.sides)


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
