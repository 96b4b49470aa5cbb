"""Any host whose two maps are outputs of modules that the user names, or inputs of softmaxes inside of them."""

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ssync_pl.adapters.base import HostAdapter
from ssync_pl.adapters.capture import Capture, Softmaxes, describe, has_modules, output_entry, submodule
from ssync_pl.adapters.grids import Grid, check_frames, check_grid, frame_size
from ssync_pl.adapters.pairing import MapKind, Pair, Seen, find_pair, join_maps
from ssync_pl.errors import ConfigError, HostError, ShapeError, require
from ssync_pl.method.maps import SSyncMaps


class Place(NamedTuple):
    """Where a map is in a host: ``text`` as the user wrote it, and its parts."""

    text: str
    softmax: bool
    path: str
    key: str = ""
    axis: int | None = None


def parse_place(text: str) -> Place:
    """Reads ``"path"``, ``"path:key"``, ``"softmax:path"`` or ``"softmax:path:axis"``, or raises ConfigError."""
    first, colon, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
    softmax = first == "softmax" and bool(colon)
    path, _, key = rest.partition(":") if softmax else (first, colon, rest)
    if not path:
        raise ConfigError(f"Expected a place as 'path', 'path:key' or 'softmax:path', but got {text!r}.")
    if not softmax:
        return Place(text, False, path, key)
    if key and not key.removeprefix("-").isdecimal():
        raise ConfigError(f"Expected the axis of the softmax behind 'softmax:{path}:', but got {key!r}. Give a number.")
    return Place(text, True, path, axis=int(key) if key else None)


class PathAdapter(HostAdapter):
    """Reads both maps from named modules.

    Each side is named on its own, in one of two ways:

    * ``"path"`` or ``"path:key"``: the module's output is the map, or has it under a key (a dict's key, an attribute,
      or a position): ``(B, S, N)`` for one frame of a call, stacked over the calls of a step; ``(B, T, S, N)``;
      ``(B, T, S, H, W)``; ``(B * T, S, N)`` where the other side tells T. H and W may have one channel before them.
    * ``"softmax:path"``: the map is what the module feeds to its last softmax over the slots in each call: the host's
      own logits, so that merging works. Name a module that runs once per frame or per step, around the iterations.
      ``"softmax:."`` listens to the whole training step; ``"softmax:path:axis"`` names the axis of the slots.

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
        for name, kind in (("attention_kind", attention_kind), ("masks_kind", masks_kind)):
            if kind not in ("logits", "probs"):
                raise ConfigError(f"Expected argument `{name}` to be 'logits' or 'probs', but got {kind!r}.")
        self.attention, self.masks = attention, masks
        self.attention_kind, self.masks_kind = attention_kind, masks_kind
        self.places = (parse_place(attention), parse_place(masks))
        self.grid = check_grid(grid)

    def match(self, host: nn.Module) -> bool:
        return has_modules(host, *(place.path for place in self.places))

    def attach(self, host: nn.Module) -> Capture:
        capture = Capture()
        for place, module in {place: submodule(host, place.path) for place in self.places}.items():
            watch_place(capture, place.text, module, place, step=module is host)
        return capture

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        pair, frame, facts = self.pair(capture), frame_size(batch), capture.facts
        if not any(place.softmax for place in self.places):
            return join_maps(pair, self.grid, frame)
        # Where no slot is ever absent, saying so would only cost time in each step.
        maps = join_maps(pair, self.grid, frame, mark_absent=facts.get("masks", False) or "looked" not in facts)
        if "looked" not in facts:
            absent = maps.slot_valid is not None and not bool(maps.slot_valid.all())  # once: it waits for the device
            facts.update(looked=True, masks=facts.get("masks", False) or absent)
            if not facts["masks"]:
                return replace(maps, slot_valid=None)
        return maps

    def pair(self, capture: Capture) -> Pair:
        """Finds the two tensors that were seen, and how they are read, or raises HostError or ShapeError."""
        first, second = (
            _softmaxes(capture[place.text], place) if place.softmax else _outputs(capture[place.text], place, kind)
            for place, kind in zip(self.places, (self.attention_kind, self.masks_kind), strict=True)
        )
        pair = find_pair(first, second)
        if pair is None:
            gave = [
                f"'{place.text}' gave {'; '.join(one.describe() for one in side)}"
                for place, side in zip(self.places, (first, second), strict=True)
            ]
            raise ShapeError(
                "Expected both maps to have the same slots, videos and frames, and patches that fit, but "
                f"{' and '.join(gave)}. Name modules that run once per frame or per step, around the iterations."
            )
        slots, patches = pair.layouts[0].slots, min(layout.count for layout in pair.layouts)
        if slots > patches:
            raise ShapeError(
                f"Expected more patches than slots, but got {patches} and {slots}. Put slots before patches."
            )
        one, two = pair.attention, pair.masks
        drawn, (inner, outer) = two.inside, (place.path for place in self.places)
        if self.places[0].softmax and inner != outer and (outer == "." or inner.startswith(f"{outer}.")):
            # The softmaxes of the attention ran inside of the masks' module too.
            drawn -= one.inside if (one.axis, one.values[0].shape) == (two.axis, two.values[0].shape) else 0
        if pair.frames == 1 and drawn > 1:
            raise HostError(
                f"Expected one softmax over slots in each call of '{outer}', but {drawn} of the shape "
                f"{tuple(two.values[0].shape)} ran, of which the last alone would count. Let a module of its own, such "
                "as an nn.Softmax, draw the masks of a frame: masks='softmax:path.of.that_module'."
            )
        return pair


def watch_place(capture: Capture, key: str, module: nn.Module, place: Place, step: bool) -> None:
    """Records what a module gives at a place, or the softmaxes inside it, or in the whole ``step``."""

    def pick(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        value = output_entry(output, place.key)
        if value is None:
            ways = f"Pick '{place.path}:key', or 'softmax:{place.path}' for a softmax inside."
            given = describe(output)
            raise HostError(f"Expected a tensor at '{place.text}', but got an output of type {given}. {ways}")
        return value

    if place.softmax:
        capture.tap(key, module, place.axis, step)
    else:
        capture.watch(key, module, pick)


def _outputs(values: list[Tensor], place: Place, kind: MapKind) -> list[Seen]:
    check_frames(values, place.text)
    if values[0].ndim in (5, 6) and values[0].shape[-3] == 1:  # a channel axis, as many decoders give their masks
        values = [value.squeeze(-3) if value.ndim == 6 else value.flatten(2) for value in values]
    ndim = values[0].ndim
    if ndim == 3 or (ndim in (4, 5) and len(values) == 1):
        return [Seen(values, 1 if ndim == 3 else 2, kind, place.text, heads=False)]
    raise HostError(
        f"Expected '{place.text}' to give (B, S, N) once per frame, (B, T, S, N) or (B, T, S, H, W), but it gave "
        f"{tuple(values[0].shape)} in {len(values)} call(s). A softmax over slots inside is 'softmax:{place.path}'."
    )


def _softmaxes(calls: list[Softmaxes], place: Place) -> list[Seen]:
    """The softmaxes of one shape and axis that ran in every call of a module that heard any, in their last order."""
    calls = [call for call in calls if call]
    if not calls:
        where = f"'{place.path}' in the training step"
        raise HostError(f"Expected a softmax to run inside {where}, but none did. See `ssync-pl doctor`.")
    common = [key for key in calls[-1] if all(key in call for call in calls)]
    if not common:
        shapes = sorted({shape for call in calls for shape, _ in call})
        raise HostError(f"Expected the softmax inside '{place.path}' to have one shape in all calls, but got {shapes}.")
    # What is computed for a log must not take the place of what is trained.
    common = [key for key in common if all(call[key].trains for call in calls)] or common
    heard = [(key[1], [call[key] for call in calls]) for key in common]
    return [
        Seen([one.logits for one in ones], axis, "logits", place.text, inside=max(one.times for one in ones))
        for axis, ones in heard
    ]


def adapter_from(
    adapter: str | HostAdapter,
    attention: str | None,
    masks: str | None,
    attention_kind: MapKind,
    masks_kind: MapKind,
    grid: tuple[int, int] | None,
) -> tuple[str | HostAdapter, tuple[int, int] | None]:
    """Settles the two ways to name a host's maps: by an adapter, or by the modules that give them."""
    require(isinstance(adapter, (str, HostAdapter)), "argument `adapter` to be a name or an adapter", repr(adapter))
    named, advice = f"{attention=}, {masks=}", "Name both modules, or neither and let `adapter` find them."
    together = (attention is None) == (masks is None)
    require(together, "arguments `attention` and `masks` to come together", named, advice=advice)
    if attention is not None and masks is not None:
        require(adapter == "auto", "either `adapter` or `attention` and `masks`", "both", advice="Leave one out.")
        return PathAdapter(attention, masks, attention_kind, masks_kind, grid), None
    alone, kinds = attention_kind == masks_kind == "probs", "`attention_kind` and `masks_kind`"
    require(alone, f"{kinds} only beside `attention` and `masks`", "them alone", advice="Adapters know these.")
    return adapter, grid
