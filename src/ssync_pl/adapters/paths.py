"""Any host whose two maps are outputs of modules that the user names, or inputs of softmaxes inside of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from typing_extensions import override

from ssync_pl.adapters.base import HostAdapter
from ssync_pl.adapters.capture import Capture, describe, has_modules, output_entry, submodule
from ssync_pl.adapters.grids import Grid, check_grid, frame_size
from ssync_pl.adapters.pairing import MapKind, Pair, Seen, find_pair, join_maps
from ssync_pl.adapters.softmaxes import Softmaxes
from ssync_pl.errors import ConfigError, HostError, ShapeError
from ssync_pl.method.maps import SSyncMaps

__all__ = [
    "MapKind",
    "PathAdapter",
    "Pick",
    "Place",
    "check_kind",
    "common_softmaxes",
    "parse_place",
]


class Place(NamedTuple):
    """Where a map is in a host: ``text`` as the user wrote it, and its parts."""

    text: str
    softmax: bool
    path: str
    key: str
    axis: int | None


def parse_place(text: str) -> Place:
    """Reads ``"path"``, ``"path:key"``, ``"softmax:path"`` or ``"softmax:path:axis"``.

    Raises:
        ConfigError: The text has no path, or its axis is no number.
    """
    first, colon, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
    softmax = first == "softmax" and bool(colon)
    path, _, key = rest.partition(":") if softmax else (first, colon, rest)
    if not path:
        raise ConfigError(
            f"Expected a place as 'path', 'path:key' or 'softmax:path', but got {text!r}. Name a module of the host by "
            "its dotted path; '.' is the host itself."
        )
    if not softmax:
        return Place(text, False, path, key, None)
    if key and not key.removeprefix("-").isdecimal():
        raise ConfigError(
            f"Expected the axis of the softmax behind 'softmax:{path}:', but got {key!r}. The softmax's input is taken "
            "as it is: leave the last part out, or give the number of the slot axis."
        )
    return Place(text, True, path, "", int(key) if key else None)


def check_kind(name: str, kind: MapKind) -> MapKind:
    """Returns a kind of map, or refuses it with a ConfigError that names the argument."""
    if kind not in ("logits", "probs"):
        raise ConfigError(f"Expected argument `{name}` to be 'logits' or 'probs', but got {kind!r}.")
    return kind


class PathAdapter(HostAdapter):
    """Reads both maps from named modules.

    Each side is named on its own, in one of two ways:

    * ``"path"`` or ``"path:key"``: the module's output is the map, or has it under a key (a dict's key, an attribute,
      or a position), as in ``"processor.corrector:masks"``. Shapes understood: ``(B, S, N)`` for one frame of a call,
      stacked over the calls of a step; ``(B, T, S, N)``; ``(B, T, S, H, W)``; ``(B * T, S, N)`` where the other side
      tells T.
    * ``"softmax:path"``: the map is what the module feeds to a softmax over the slots; its input are the host's own
      logits, so that merging works, and the module may return whatever it likes. The last such softmax of each call
      counts, so name a module that runs once per frame, or once per step, around the iterations. ``"softmax:."``
      listens to the whole training step. The axis of the slots is the one that both sides can share;
      ``"softmax:path:axis"`` names it.

    ``"."`` is the host itself. Where the two grids differ, the finer map is averaged to the coarser one. Heads with a
    softmax each count as their mean.

    Args:
        attention: Place of the slot attention.
        masks: Place of the decoder's masks.
        attention_kind: ``"probs"`` (softmax over slots) or ``"logits"``; the input of a softmax always is logits.
        masks_kind: The same for the decoder's map.
        grid: ``(H, W)`` patches; None reads it off the maps or the size of the batch's frames, or takes a square.

    Raises:
        ConfigError: A place or a kind is not understood, or ``grid`` is not two numbers.
    """

    name: ClassVar[str] = "paths"

    def __init__(
        self,
        attention: str,
        masks: str,
        attention_kind: MapKind = "probs",
        masks_kind: MapKind = "probs",
        grid: Grid | None = None,
    ) -> None:
        self.attention = attention
        self.masks = masks
        self.attention_kind = check_kind("attention_kind", attention_kind)
        self.masks_kind = check_kind("masks_kind", masks_kind)
        self.grid = check_grid(grid)
        self.places = (parse_place(attention), parse_place(masks))
        self._looked = False

    @override
    def match(self, host: nn.Module) -> bool:
        return has_modules(host, *(place.path for place in self.places))

    @override
    def attach(self, host: nn.Module) -> Capture:
        capture = Capture()
        self._looked = False
        modules = {place.text: (place, submodule(host, place.path)) for place in self.places}
        for text, (place, module) in modules.items():
            if place.softmax:
                tap = capture.tap_step if module is host else capture.tap
                tap(text, module, place.axis)
            else:
                capture.watch(text, module, Pick(place))
        return capture

    @override
    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        pair, frame = self.pair(capture), frame_size(batch)
        if not any(place.softmax for place in self.places):
            return join_maps(pair, self.grid, frame)
        # Where no slot is ever absent, saying so would cost the fast paths of the loss.
        marked = capture.facts.get("masks", False)
        maps = join_maps(pair, self.grid, frame, mark_absent=marked or not self._looked)
        if not self._looked:
            self._looked = True  # once, since this waits for the device
            if maps.slot_valid is not None and bool(maps.slot_valid.all()) and not marked:
                return replace(maps, slot_valid=None)
            capture.facts["masks"] = True
        return maps

    def pair(self, capture: Capture) -> Pair:
        """Finds the two tensors that were seen, and how they are read.

        Raises:
            HostError: A map has a shape that is not understood, or is one of several that one call gave.
            ShapeError: The two maps do not belong together.
        """
        kinds = (self.attention_kind, self.masks_kind)
        sides = [
            _softmaxes(capture[place.text], place) if place.softmax else _outputs(capture[place.text], place, kind)
            for place, kind in zip(self.places, kinds, strict=True)
        ]
        pair = find_pair(*sides)
        if pair is None:
            seen = [
                f"'{place.text}' gave {'; '.join(one.describe() for one in side)}"
                for place, side in zip(self.places, sides, strict=True)
            ]
            raise ShapeError(
                "Expected both maps to have the same slots, videos and frames, and patches that fit, but "
                f"{' and '.join(seen)}. Name modules that run once per frame or once per step, around the iterations "
                "of slot attention; where it runs on other frames than the decoder, write a small HostAdapter."
            )
        drawn = self._drawn(pair)
        if pair.frames == 1 and drawn > 1:
            raise HostError(
                f"Expected one softmax over slots in each call of '{self.places[1].path}', but {drawn} of the shape "
                f"{tuple(pair.masks.values[0].shape)} ran, which may be frames, of which the last alone would count. "
                "Let a module of its own draw the masks of a frame, such as an nn.Softmax that runs once per frame, "
                "and name it: masks='softmax:path.of.that_module'."
            )
        return pair

    def _drawn(self, pair: Pair) -> int:
        """How many softmaxes ran in a call of the masks' module, without those of the attention inside of it."""
        inner, outer = (place.path for place in self.places)
        one, two = pair.attention, pair.masks
        inside = self.places[0].softmax and inner != outer and (outer == "." or inner.startswith(f"{outer}."))
        same = (one.axis, one.values[0].shape) == (two.axis, two.values[0].shape)
        return two.inside - (one.inside if inside and same else 0)


class Pick:
    """Finds the map in a module's output; a `take` for `Capture.watch`."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        """Takes the tensor at the place out of an output, or refuses an output without one."""
        value = output_entry(output, self.place.key)
        if value is None:
            raise HostError(
                f"Expected a tensor at '{self.place.text}', but got an output of type {describe(output)}. Pick an "
                f"entry with '{self.place.path}:key', or take the input of a softmax inside the module with "
                f"'softmax:{self.place.path}'."
            )
        return value


def _outputs(values: list[Tensor], place: Place, kind: MapKind) -> list[Seen]:
    if not values:
        raise HostError(f"Expected '{place.text}' to run inside the training step, but it did not.")
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) != 1:
        raise HostError(f"Expected '{place.text}' to give one shape for all frames, but got {shapes}.")
    ndim = values[0].ndim
    if ndim == 3:
        return [Seen(values, 1, kind, place.text, heads=False)]
    if ndim in (4, 5) and len(values) == 1:
        return [Seen(values, 2, kind, place.text, heads=False)]
    raise HostError(
        f"Expected '{place.text}' to give (B, S, N) once per frame, (B, T, S, N) or (B, T, S, H, W), but it gave "
        f"{shapes[0]} in {len(values)} call(s). Where a softmax over the slots is inside of it, use "
        f"'softmax:{place.path}'; else write a small HostAdapter that reshapes it."
    )


def _softmaxes(calls: list[Softmaxes], place: Place) -> list[Seen]:
    if not any(calls):
        raise HostError(
            f"Expected a softmax to run inside '{place.path}' in the training step, but none did. The map may be "
            "normalised without a softmax, or in another module: `ssync-pl doctor` lists what it finds."
        )
    found = common_softmaxes(calls, place)
    if not found:
        shapes = sorted({shape for call in calls for shape, _ in call})
        raise HostError(
            f"Expected the softmax inside '{place.path}' to have one shape in all of its calls, but got {shapes}."
        )
    return found


def common_softmaxes(calls: list[Softmaxes], place: Place) -> list[Seen]:
    """The softmaxes of one shape and axis that ran in every call of a module that heard any, in their last order."""
    calls = [call for call in calls if call]
    common = [key for key in calls[-1] if all(key in call for call in calls)] if calls else []
    return [
        Seen(
            [call[key].logits for call in calls],
            key[1],
            "logits",
            place.text,
            inside=max(call[key].times for call in calls),
        )
        for key in common
    ]
