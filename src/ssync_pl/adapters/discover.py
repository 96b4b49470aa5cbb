"""Where the two maps of an unknown host may be: one step, in which `PathAdapter` would hear each of its modules."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssync_pl.adapters.capture import Capture, SoftmaxCall, SoftmaxRecorder
from ssync_pl.adapters.pairing import Pair, Seen, find_pair


@dataclass(frozen=True)
class Spot:
    """A softmax as ``"softmax:path"`` would hear it.

    ``calls`` counts the calls of the module with such a softmax inside; ``innermost`` is whether no module further
    inside runs it; ``first`` and ``last`` are its places among all softmaxes.
    """

    path: str
    calls: int
    shape: tuple[int, ...]
    axis: int
    has_gradient: bool
    innermost: bool
    first: int
    last: int
    has_parameters: bool
    seen: Seen

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


class _Order(SoftmaxRecorder):
    """Keeps the input of every softmax, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Tensor] = []

    def keep(self, logits: Tensor, axis: int) -> None:
        self.heard.append(logits)


def discover(host: nn.Module, run: Callable[[], Any]) -> Discovery:
    """Runs a training step or forward pass of a host once and looks for softmaxes that can be its two maps.

    They are over as many slots, over more patches than slots, on the same videos and frames, and the attention comes
    first. Of several modules around a softmax, the innermost one with parameters that runs once per frame is meant.
    """
    capture, order = Capture(), _Order()
    modules = {path or ".": module for path, module in host.named_modules()}
    for path, module in modules.items():
        capture.tap(path, module, step=module is host)
    try:
        with order:
            capture.open()
            run()
            capture.close()
        spots = _spots(capture, modules, order.heard)
    finally:
        capture.remove()
    return Discovery(_rank(spots), tuple(spot for spot in spots if spot.innermost))


def _spots(capture: Capture, modules: dict[str, nn.Module], heard: list[Tensor]) -> list[Spot]:
    """Every kind of softmax, as each module around it hears it."""
    place = {id(logits): number for number, logits in enumerate(heard)}
    kinds: dict[tuple[str, tuple[int, ...], int], list[SoftmaxCall]] = {}
    for path in modules:
        for (shape, axis), call in itertools.chain.from_iterable(calls.items() for calls in capture[path]):
            kinds.setdefault((path, shape, axis), []).append(call)
    inner = {id(call.logits): path for (path, _, _), calls in kinds.items() for call in calls}
    spots = []
    for (path, shape, axis), calls in kinds.items():
        values = [call.logits for call in calls]
        trains, innermost = all(call.trains for call in calls), any(inner[id(value)] == path for value in values)
        numbers = [place[id(value)] for value in values]
        weights = path != "." and next(modules[path].parameters(), None) is not None
        seen = Seen([torch.empty(shape, device="meta")] * len(calls), axis, "logits", path)
        spots.append(Spot(path, len(calls), shape, axis, trains, innermost, min(numbers), max(numbers), weights, seen))
    return spots


def _rank(spots: list[Spot]) -> tuple[FoundPair, ...]:
    ranked: list[tuple[tuple[Any, ...], FoundPair]] = []
    for one, two in itertools.permutations(spots, 2):
        if one.first < two.first and one.slots == two.slots:
            pair = find_pair([one.seen], [two.seen])
            if pair is not None and all(layout.count > layout.slots for layout in pair.layouts):
                ranked.append((_score(one, two, pair), FoundPair(one, two, pair.batch, pair.frames)))
    ranked.sort(key=lambda entry: entry[0], reverse=True)
    # The same two softmaxes are heard from every module around them: only the best place of each is told.
    best: dict[tuple[Any, ...], FoundPair] = {}
    for _, found in ranked:
        best.setdefault(tuple((side.last, side.calls) for side in (found.attention, found.masks)), found)
    return tuple(best.values())


def _score(one: Spot, two: Spot, pair: Pair) -> tuple[Any, ...]:
    first, second = pair.layouts
    return (
        one.has_gradient and two.has_gradient,
        pair.batch * pair.frames,
        first.count == second.count,
        -(first.heads > 1) - (second.heads > 1),
        two.last,
        -one.first,
        pair.frames,
        one.has_parameters + two.has_parameters,
        sum(0 if spot.path == "." else spot.path.count(".") + 1 for spot in (one, two)),
    )
