"""Any host whose two maps are outputs of modules that the user names, or inputs of softmaxes inside of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ssync_pl.adapters.base import HostAdapter, frame_size
from ssync_pl.adapters.capture import Capture, submodule
from ssync_pl.adapters.pairing import MapKind, Pair, Seen, find_pair, join_maps, softmax_gap
from ssync_pl.adapters.tap import Softmaxes, TapCapture
from ssync_pl.errors import ConfigError, HostError, ShapeError
from ssync_pl.method.maps import SSyncMaps

__all__ = ["MapKind", "PathAdapter", "Pick", "Place", "parse_place"]

SOFTMAX = "softmax"


class Place(NamedTuple):
    """Where a map is in a host.

    Args:
        text: As the user wrote it.
        softmax: The map is the input of a softmax inside the module, not its output.
        path: Dotted path of the module; ``"."`` is the host itself.
        key: Entry of the module's output.
        axis: Axis of the softmax, where the user names it.

    Example:
        >>> Place("decoder:masks", False, "decoder", "masks", None).path
        'decoder'
    """

    text: str
    softmax: bool
    path: str
    key: str
    axis: int | None

    def module(self, host: nn.Module) -> nn.Module:
        """The module in a host.

        Args:
            host: The host.

        Returns:
            The module.

        Raises:
            HostError: There is none.

        Example:
            >>> parse_place(".").module(nn.Identity())
            Identity()
        """
        return host if self.path == "." else submodule(host, self.path)


def parse_place(text: str) -> Place:
    """Read where a map is.

    Args:
        text: ``"path"`` or ``"path:key"`` for a module's output, ``"softmax:path"`` or ``"softmax:path:axis"`` for the
            input of a softmax inside a module.

    Returns:
        The place.

    Raises:
        ConfigError: The text has no path, or its axis is no number.

    Example:
        >>> parse_place("softmax:slot_attention").path
        'slot_attention'
        >>> parse_place("softmax:decoder:-1").axis
        -1
    """
    first, colon, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
    softmax = first == SOFTMAX and bool(colon)
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


class PathAdapter(HostAdapter):
    """Reads both maps from named modules.

    Each side is named on its own, in one of two ways:

    * ``"path"`` or ``"path:key"``: the module's output is the map, or has it under a key (a dict's key, an attribute,
      or a position), as in ``"processor.corrector:masks"``. Shapes understood: ``(B, S, N)`` for one frame of a call,
      stacked over the calls of a step; ``(B, T, S, N)``; ``(B, T, S, H, W)``; ``(B * T, S, N)`` where the other side
      tells T.
    * ``"softmax:path"``: the map is what the module feeds to a softmax over the slots; its input are the host's own
      logits, so that merging works, and the module may return whatever it likes. The last such softmax of each call
      counts, so name a module that runs once a frame, or once a step, around the iterations. ``"softmax:."`` listens
      to the whole training step. The axis of the slots is the one that both sides can share;
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

    Example:
        >>> adapter = PathAdapter("corrector:logits", "softmax:decoder", attention_kind="logits", grid=(6, 8))
        >>> adapter.name
        'paths'
    """

    name: ClassVar[str] = "paths"

    def __init__(
        self,
        attention: str,
        masks: str,
        attention_kind: MapKind = "probs",
        masks_kind: MapKind = "probs",
        grid: tuple[int, int] | None = None,
    ) -> None:
        for name, kind in (("attention_kind", attention_kind), ("masks_kind", masks_kind)):
            if kind not in ("logits", "probs"):
                raise ConfigError(f"Expected argument `{name}` to be 'logits' or 'probs', but got {kind!r}.")
        sizes = grid if isinstance(grid, (list, tuple)) else ()
        if grid is not None and (len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes)):
            raise ConfigError(f"Expected argument `grid` to be (H, W) patches, but got {grid!r}.")
        self.attention = attention
        self.masks = masks
        self.attention_kind = attention_kind
        self.masks_kind = masks_kind
        self.grid = None if grid is None else (int(grid[0]), int(grid[1]))
        self.slots: int | None = None
        self._looked = False
        self.places = (parse_place(attention), parse_place(masks))

    def match(self, host: nn.Module) -> bool:
        """Whether both paths exist in the host.

        Args:
            host: The model that is trained.

        Returns:
            True when they do.

        Example:
            >>> PathAdapter("0", "softmax:1").match(nn.Sequential(nn.Identity(), nn.Identity()))
            True
        """
        try:
            for place in self.places:
                place.module(host)
        except HostError:
            return False
        return True

    def attach(self, host: nn.Module) -> Capture:
        """Listen to both modules.

        Args:
            host: The model that is trained.

        Returns:
            A closed capture.

        Raises:
            HostError: A path does not exist.

        Example:
            >>> PathAdapter("0", "softmax:1").attach(nn.Sequential(nn.Identity(), nn.Identity())).silent
            ['0', 'softmax:1']
        """
        capture = TapCapture()
        self._looked = False
        modules = {place.text: (place, place.module(host)) for place in self.places}
        for text, (place, module) in modules.items():
            if not place.softmax:
                capture.watch(text, module, Pick(place))
            elif module is host:
                capture.tap_window(text, module, self.slots, place.axis)
            else:
                capture.tap(text, module, self.slots, place.axis)
        return capture

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        """Bring both maps to ``(B, T, S, N)``.

        Args:
            capture: Filled by one training step.
            batch: The batch of that step.

        Returns:
            The maps.

        Raises:
            HostError: A map has a shape that is not understood, or there is no one grid for both.
            ShapeError: The two maps do not belong together.

        Example:
            >>> import torch
            >>> host = nn.Sequential(nn.Identity(), nn.Softmax(1))
            >>> adapter = PathAdapter("0", "softmax:1")
            >>> capture = adapter.attach(host)
            >>> capture.open()
            >>> _ = host(torch.full((1, 2, 9), 0.5))
            >>> adapter.collect(capture)
            SSyncMaps(B=1, T=1, S=2, grid=(3, 3), attention=probs, masks=logits, dtype=torch.float32, device=cpu)
        """
        pair, frame = self.pair(capture), frame_size(batch)
        if not isinstance(capture, TapCapture) or not any(place.softmax for place in self.places):
            return join_maps(pair, self.grid, frame)
        # Where no slot is ever absent, saying so would cost the fast paths of the loss.
        maps = join_maps(pair, self.grid, frame, mark_absent=capture.masks or not self._looked)
        if not self._looked:
            self._looked = True  # once, since this waits for the device
            if maps.slot_valid is not None and bool(maps.slot_valid.all()) and not capture.masks:
                return replace(maps, slot_valid=None)
            capture.masks = True
        return maps

    def pair(self, capture: Capture) -> Pair:
        """The two tensors that were seen, and how they are read.

        Args:
            capture: Filled by one training step.

        Returns:
            The pair that `collect` makes maps of.

        Raises:
            HostError: A map has a shape that is not understood.
            ShapeError: The two maps do not belong together.

        Example:
            >>> import torch
            >>> host = nn.Sequential(nn.Identity(), nn.Softmax(1))
            >>> adapter = PathAdapter("0", "softmax:1")
            >>> capture = adapter.attach(host)
            >>> capture.open()
            >>> _ = host(torch.full((1, 2, 9), 0.5))
            >>> adapter.pair(capture).masks.axis
            1
        """
        kinds = (self.attention_kind, self.masks_kind)
        sides = [
            _softmaxes(capture[place.text], place) if place.softmax else _outputs(capture[place.text], place, kind)
            for place, kind in zip(self.places, kinds, strict=True)
        ]
        pair = find_pair(*sides)
        if pair is not None:
            return pair
        seen = [
            f"'{place.text}' gave {'; '.join(one.describe() for one in side)}"
            for place, side in zip(self.places, sides, strict=True)
        ]
        raise ShapeError(
            "Expected both maps to have the same slots, videos and frames, and patches that fit, but "
            f"{' and '.join(seen)}. Name modules that run once a frame or once a step, around the iterations of slot "
            "attention; where it runs on other frames than the decoder, write a small HostAdapter."
        )

    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        """Compare with the softmaxes that the host computed itself.

        Args:
            capture: Filled by one training step.
            maps: What `collect` made of it.

        Raises:
            HostError: The softmax over slots of a map is not what the host's own softmax gave.

        Example:
            >>> verify = PathAdapter("softmax:0", "1").verify  # called by `SSyncCallback` in the first step
        """
        pair = self.pair(capture)
        for place, (seen, layout) in zip(self.places, pair.sides, strict=True):
            if not place.softmax:
                continue
            gap, tolerance = softmax_gap(seen, layout, pair.batch, pair.frames)
            if gap > tolerance:
                raise HostError(
                    f"Expected the map of '{place.text}' to be the softmax over slots that the host computed, but "
                    f"they differ by up to {gap:.3g} (tolerance {tolerance:.1g}). Name the slot axis: "
                    f"'softmax:{place.path}:axis'."
                )


class Pick:
    """Finds the map in a module's output; for `Capture.watch`.

    Args:
        place: The module, and the entry of its output that is the map.

    Raises:
        HostError: When called: there is no tensor at that place.

    Example:
        >>> import torch
        >>> Pick(parse_place("decoder:masks"))(nn.Identity(), (), {"masks": torch.zeros(1, 2, 9)}).shape
        torch.Size([1, 2, 9])
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        """Take the map out of an output.

        Args:
            module: That ran.
            args: Of the call.
            output: Of the call.

        Returns:
            The tensor at the place.
        """
        value, key = output, self.place.key
        if key:
            if isinstance(output, Mapping):
                value = output.get(key)
            elif isinstance(output, (tuple, list)) and key.removeprefix("-").isdecimal():
                index = int(key)
                value = output[index] if -len(output) <= index < len(output) else None
            else:
                value = getattr(output, key, None)
        if not isinstance(value, Tensor):
            raise HostError(
                f"Expected a tensor at '{self.place.text}', but got {type(value).__name__} from an output of type "
                f"{_describe(output)}. Pick an entry with '{self.place.path}:key', or take the input of a softmax "
                f"inside the module with 'softmax:{self.place.path}'."
            )
        return value


def _describe(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"dict with keys {', '.join(map(str, output))}"
    if hasattr(output, "_fields"):
        return f"{type(output).__name__} with fields {', '.join(output._fields)}"
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of {len(output)}"
    return type(output).__name__


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
        f"Expected '{place.text}' to give (B, S, N) once a frame, (B, T, S, N) or (B, T, S, H, W), but it gave "
        f"{shapes[0]} in {len(values)} call(s). Where a softmax over the slots is inside of it, use "
        f"'softmax:{place.path}'; else write a small HostAdapter that reshapes it."
    )


def _softmaxes(calls: list[Softmaxes], place: Place) -> list[Seen]:
    calls = [call for call in calls if call]
    if not calls:
        raise HostError(
            f"Expected a softmax to run inside '{place.path}' in the training step, but none did. The map may be "
            "normalised without a softmax, or in another module: `ssync-pl doctor` lists what it finds."
        )
    common = [key for key in calls[-1] if all(key in call for call in calls)]
    if not common:
        shapes = sorted({shape for call in calls for shape, _ in call})
        raise HostError(
            f"Expected the softmax inside '{place.path}' to have one shape in all of its calls, but got {shapes}."
        )
    return [Seen([call[key] for call in calls], key[1], "logits", place.text) for key in common]
