"""Spec of models that are built around the `slot-attention` package from PyPI."""

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from ssync_pl.adapters.base import register_adapter
from ssync_pl.adapters.calls import MapCall, watch_softmax
from ssync_pl.adapters.capture import Capture, has_modules, submodule
from ssync_pl.adapters.grids import Grid, check_frames
from ssync_pl.adapters.paths import parse_place, watch_place
from ssync_pl.adapters.slot_model import GridAdapter
from ssync_pl.errors import ConfigError, HostError


@register_adapter
class SlotAttentionPackageAdapter(GridAdapter):
    """Models around one ``SlotAttention`` or ``MultiHeadSlotAttention`` of the package, with any decoder.

    Several heads, which have a softmax over slots each, count as their mean. By default, the last softmax over these
    slots in the training step gives the masks; a decoder that runs once per frame has to be named. In an
    ``AdaptiveSlotWrapper``, slots that are not kept do not exist, and an image that keeps none is left out.

    The package samples new slots in every call, so that every frame is a clip of its own (T = 1).

    Args:
        attention: Dotted path of the module; None finds it, where there is exactly one.
        masks: Place of the decoder's masks, as for `PathAdapter`: ``(B, S, N)``, ``(B, S, H, W)`` or
            ``(B, S, 1, H, W)``, with B or B · T in front.
        alpha_axis: Axis of a module's output on which the last entry is the logit of the mask, beside the colours: 1
            for ``(B * S, 4, H, W)``, -1 for ``(B * S, H, W, 4)``. None: the output is the map itself, as
            probabilities.
        grid: ``(H, W)`` patches of the attention; None takes it from the masks or the size of the batch's frames, or a
            square.

    Source: Object-Centric Learning with Slot Attention (arXiv 2006.15055); adaptive slots: AdaSlot (arXiv 2406.09196).
    """

    name: ClassVar[str] = "slot-attention"
    decoder = "masks"
    decoder_calls = "frames"
    frames_are_clips = True

    def __init__(
        self,
        attention: str | None = None,
        masks: str = "softmax:.",
        alpha_axis: int | None = None,
        grid: Grid | None = None,
    ) -> None:
        super().__init__(grid)
        self.path = attention
        self.masks = parse_place(masks)
        self.alpha_axis = alpha_axis
        if alpha_axis is not None and self.masks.softmax:
            raise ConfigError(f"Expected `alpha_axis` only with the output of a module, but got masks={masks!r}.")

    def match(self, host: nn.Module) -> bool:
        return len(self._found(host)) == 1 and has_modules(host, self.masks.path)

    def _found(self, host: nn.Module) -> list[nn.Module]:
        named = {path: module for path, module in host.named_modules(remove_duplicate=False) if path}
        places = named if self.path is None else [path for path in (self.path,) if path in named]
        return [*dict.fromkeys(named[path] for path in places if _is_package(named[path]))]

    def needs(self) -> str:
        place = self.path or "some path"
        return f"one module of the `slot-attention` package at {place} and a module at '{self.masks.path}'"

    def listen(self, host: Any, capture: Capture) -> None:
        (module,) = self._found(host)
        if _parent(host, module, "slot_attention", "vq") is not None:
            raise HostError(
                "Expected the decoder's slots to be those of the slot attention, but MetaSlotAttention averages slots "
                "of one code and packs the rest to the front. Leave it out, or name maps over its own slots."
            )
        watch_softmax(capture, "attention", module)
        wrapper = _parent(host, module, "slot_attn", "pred_keep_slot")
        if wrapper is not None:
            capture.watch("exist", wrapper, lambda module, args, output: output[1].detach() > 0.5)
        decoder = submodule(host, self.masks.path)
        watch_place(capture, "masks", decoder, self.masks, step=decoder is host)

    def calls(self, capture: Capture) -> tuple[list[MapCall], list[MapCall]]:
        calls, _ = super().calls(capture)
        logits = [call.logits for call in calls if call.logits is not None]
        check_frames(logits, "attention")
        # The package's own softmax is heard as well; the same tensor cannot be both maps.
        candidates, slots = self._candidates(capture, {*map(id, logits)}), logits[0].shape[-2]
        images = len(calls) * len(logits[0]) // max(len(candidates), 1)
        maps = [[_as_map(value, axis, images, slots) for value, axis in one] for one in candidates]
        drawn = [found for one in maps for found in [found for found in one if found is not None][-1:]]
        if not drawn or len(drawn) != len(candidates):
            seen = sorted({tuple(value.shape) for one in candidates for value, _ in one})
            raise HostError(
                f"Expected '{self.masks.text}' to give masks over the slots of attention maps {tuple(logits[0].shape)} "
                f"in {len(calls)} call(s), but it gave {seen}. Name a decoder that runs as often: masks='path:key'."
            )
        if len(calls) > 1 and len(drawn) == 1 and drawn[0].axis == 1:
            ran = f"the slot attention ran {len(calls)} times and the decoder once, on frames folded into its batch"
            raise HostError(f"Expected to know which frame is which, but {ran}. Call both once, or once per frame.")
        if self.alpha_axis is None and not self.masks.softmax:
            drawn = [MapCall(None, own=call.logits, axis=call.axis) for call in drawn]
        return calls, drawn

    def _candidates(self, capture: Capture, own: set[int]) -> list[list[tuple[Tensor, int]]]:
        """What each call of the decoder gave, with the axes on which its slots may be."""
        if self.masks.softmax:
            return [
                [(call.logits, axis) for (_, axis), call in softmaxes.items() if id(call.logits) not in own]
                for softmaxes in capture["masks"]
                if softmaxes
            ]
        values: list[Tensor] = capture["masks"]
        if self.alpha_axis is not None:
            if not all(-value.ndim <= self.alpha_axis < value.ndim for value in values):
                raise HostError(f"Expected '{self.masks.text}' to have an axis {self.alpha_axis}, but it has none.")
            values = [value.select(self.alpha_axis, -1) for value in values]
        return [[(value, axis) for axis in range(min(value.ndim, 3))] for value in values]


def _as_map(value: Tensor, axis: int, images: int, slots: int) -> MapCall | None:
    """Masks of all images as ``(images, S, ...)`` or ``(B, T, S, ...)``, where their slots are on this axis."""
    if axis == 0 and len(value) == images * slots:
        value, axis = value.unflatten(0, (images, slots)), 1
    if axis == 0 or math.prod(value.shape[:axis]) != images or value.shape[axis] != slots:
        return None
    patches = [size for size in value.shape[axis + 1 :] if size != 1]
    return MapCall(value.reshape(*value.shape[: axis + 1], *patches), axis=axis) if len(patches) in (1, 2) else None


def _parent(host: nn.Module, module: nn.Module, place: str, other: str) -> nn.Module | None:
    parents = (one for one in host.modules() if getattr(one, place, None) is module and has_modules(one, other))
    return next(parents, None)


def _is_package(module: nn.Module) -> bool:
    children = ["to_q", "to_k", "to_v", "gru", "norm_input", "norm_slots"]
    children += ["combine_heads"] if has_modules(module, "split_heads") else []
    attributes = ("slots_mu", "slots_logsigma", "scale", "eps")
    return has_modules(module, *children) and all(hasattr(module, name) for name in attributes)
