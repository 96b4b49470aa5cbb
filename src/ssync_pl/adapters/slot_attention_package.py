"""Spec of models that are built around the `slot-attention` package from PyPI."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from ssync_pl.adapters.base import HostAdapter, register_adapter
from ssync_pl.adapters.calls import MapCall, check_update, token_weights, watch_attention
from ssync_pl.adapters.capture import Capture, has_modules, submodule
from ssync_pl.adapters.grids import Grid, check_grid, frame_size
from ssync_pl.adapters.pairing import MapKind, Pair, Seen, find_pair, join_maps
from ssync_pl.adapters.paths import Pick, common_softmaxes, parse_place
from ssync_pl.errors import ConfigError, HostError
from ssync_pl.method.maps import SSyncMaps

__all__ = ["SlotAttentionPackageAdapter"]


@register_adapter
class SlotAttentionPackageAdapter(HostAdapter):
    """Models around one ``SlotAttention`` or ``MultiHeadSlotAttention`` of the package, with any decoder.

    The package returns slots and no map. Logits are computed again from its last query and its keys; several heads,
    which have a softmax over slots each, count as their mean. The decoder is the user's own: by default, the last
    softmax over these slots in the training step gives its masks; a decoder that runs once per frame has to be named.
    In an ``AdaptiveSlotWrapper``, slots that are not kept do not exist, and an image that keeps none is left out.

    Note:
        The package samples new slots in every call: slot 3 of one frame is not slot 3 of the next. Every frame is
        therefore a clip of its own (T = 1), also where frames of a video are folded into the batch or come one after
        another; labels are compared and merged inside a frame.

    Args:
        attention: Dotted path of the module; None finds it, where there is exactly one.
        masks: Where the decoder's masks are: ``"path"`` or ``"path:key"`` for a module's output, ``"softmax:path"`` for
            what a module feeds to a softmax over slots; ``"softmax:."`` listens to the whole training step. The map is
            ``(B, S, N)``, ``(B, S, H, W)`` or ``(B, S, 1, H, W)``, with B or B · T in front.
        alpha_axis: Axis of a module's output on which the last entry is the logit of the mask, beside the colours: 1
            for ``(B * S, 4, H, W)``, -1 for ``(B * S, H, W, 4)``. None: the output is the map itself, as
            probabilities.
        grid: ``(H, W)`` patches of the attention; None takes it from the masks or the size of the batch's frames, or a
            square.

    Raises:
        ConfigError: An argument is not understood, or they contradict each other.

    Source: Object-Centric Learning with Slot Attention (arXiv 2006.15055); adaptive slots: AdaSlot (arXiv 2406.09196).
    """

    name: ClassVar[str] = "slot-attention"

    def __init__(
        self,
        attention: str | None = None,
        masks: str = "softmax:.",
        alpha_axis: int | None = None,
        grid: Grid | None = None,
    ) -> None:
        self.masks = parse_place(masks)
        if alpha_axis is not None and self.masks.softmax:
            raise ConfigError(
                f"Expected `alpha_axis` only with the output of a module, but got masks={masks!r}, whose softmax is "
                "over the map itself. Name the decoder: masks='path'."
            )
        self.attention = attention
        self.alpha_axis = alpha_axis
        self.grid = check_grid(grid)

    @override
    def match(self, host: nn.Module) -> bool:
        try:
            self._attention(host)
        except HostError:
            return False
        return has_modules(host, self.masks.path)

    @override
    def attach(self, host: nn.Module) -> Capture:
        module = self._attention(host)
        _refuse_reordered(host, module)
        capture = Capture()
        heads = _heads(module)
        watch_attention(
            capture,
            "attention",
            module,
            _per_head_product,
            ("to_q", "to_k", "to_v"),
            weigh=lambda module, logits: token_weights(logits, module.eps),
            # With several heads, the update passes through a projection before it reaches the cell.
            cell="combine_heads" if heads else "gru",
            axis=2 if heads else 1,
        )
        wrapper = _parent(host, module, "slot_attn", "pred_keep_slot")
        if wrapper is not None:
            capture.watch("kept", wrapper, lambda module, args, output: output[1].detach())
        decoder = submodule(host, self.masks.path)
        if self.masks.softmax:
            tap = capture.tap_step if self.masks.path == "." else capture.tap
            tap("masks", decoder, axis=self.masks.axis)
            capture.tap("own softmax", module)
        else:
            capture.watch("masks", decoder, Pick(self.masks))
        return capture

    @override
    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        calls: list[MapCall] = capture["attention"]
        logits = [call.logits for call in calls if call.logits is not None]
        shapes = sorted({tuple(value.shape) for value in logits})
        if len(shapes) != 1:
            raise HostError(f"Expected one number of frames and slots in all calls of a step, but got {shapes}.")
        attention = Seen(logits, calls[0].axis, "logits", "attention", heads=logits[0].ndim == 4)
        pair = find_pair([attention], self._masks(capture, attention))
        if pair is None:
            raise HostError(
                f"Expected '{self.masks.text}' to give masks over the slots of attention maps {shapes[0]} in "
                f"{len(calls)} call(s), but it gave {self._seen(capture)}. Name the decoder, which has to run as often "
                "as the slot attention: SlotAttentionPackageAdapter(masks='path:key')."
            )
        _refuse_unknown_order(pair)
        maps = join_maps(pair, self.grid, frame_size(batch))
        batch_size, frames, slots, patches = maps.shape
        valid = patch_valid = None
        if "kept" in capture:
            valid = torch.stack(capture["kept"], dim=1).reshape(batch_size * frames, slots) > 0.5
            patch_valid = valid.any(1)[:, None, None].expand(-1, 1, patches)
        return SSyncMaps(
            attention_logits=_frames(maps.attention_logits),
            attention_probs=_among(_frames(maps.attention_probs), valid),
            mask_logits=_frames(maps.mask_logits),
            mask_probs=_among(_frames(maps.mask_probs), valid),
            grid=maps.grid,
            slot_valid=valid,
            patch_valid=patch_valid,
        )

    @override
    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        for call in capture["attention"]:
            check_update(call, "the slot attention")

    def _attention(self, host: nn.Module) -> nn.Module:
        if self.attention is not None:
            module = submodule(host, self.attention)
            if not _is_package(module):
                raise HostError(
                    f"Expected a SlotAttention or MultiHeadSlotAttention of the `slot-attention` package at "
                    f"'{self.attention}', but got {type(module).__name__}. Use "
                    "SSyncCallback(attention=..., masks=...) for modules of your own."
                )
            return module
        found = [(path, module) for path, module in host.named_modules() if path and _is_package(module)]
        if len(found) == 1:
            return found[0][1]
        places = ", ".join(f"'{path}'" for path, _ in found) or "none"
        raise HostError(
            f"Expected one module of the `slot-attention` package inside {type(host).__name__}, but got {places}. "
            "Name it: SlotAttentionPackageAdapter(attention='path')."
        )

    def _masks(self, capture: Capture, attention: Seen) -> list[Seen]:
        first, count = attention.values[0], len(attention.values)
        frames, slots = first.shape[0], first.shape[attention.axis]
        if self.masks.softmax:
            # The package's own softmax is heard as well; the same tensor cannot be both maps.
            own = {id(call.logits) for calls in capture["own softmax"] for call in calls.values()}
            heard = [
                {key: call for key, call in calls.items() if key[0][key[1]] == slots and id(call.logits) not in own}
                for calls in capture["masks"]
            ]
            return [seen._replace(heads=False) for seen in common_softmaxes(heard, self.masks)]
        values: list[Tensor] = capture["masks"]
        if self.alpha_axis is not None:
            values = [_last_entry(value, self.alpha_axis, self.masks.text) for value in values]
        for folded in (frames * slots, frames * slots * count):
            if all(value.shape[0] == folded for value in values):
                values = [value.unflatten(0, (-1, slots)) for value in values]
                break
        if len({value.shape for value in values}) != 1:
            return []
        axes = [axis for axis in (1, 2) if axis < values[0].ndim - 1 and values[0].shape[axis] == slots]
        kind: MapKind = "probs" if self.alpha_axis is None else "logits"
        return [Seen(values, axis, kind, self.masks.text, heads=False) for axis in axes]

    def _seen(self, capture: Capture) -> str:
        if self.masks.softmax:
            shapes = [f"{shape} over axis {axis}" for calls in capture["masks"] for shape, axis in calls]
            return f"softmaxes of {', '.join(sorted(set(shapes)))}" if shapes else "no softmax"
        return f"{sorted({tuple(value.shape) for value in capture['masks']})}"


def _per_head_product(module: Any, query: Tensor, key: Tensor) -> Tensor:
    split = module.split_heads if _heads(module) else nn.Identity()
    return torch.einsum("...sd,...nd->...sn", split(query), split(key)) * module.scale


def _frames(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.flatten(0, 1).unsqueeze(1)


def _among(probs: Tensor | None, slot_valid: Tensor | None) -> Tensor | None:
    if probs is None or slot_valid is None:
        return probs
    probs = probs.masked_fill(~slot_valid[:, None, :, None], 0.0)
    return probs / probs.sum(2, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)


def _refuse_unknown_order(pair: Pair) -> None:
    calls = len(pair.attention.values)
    if calls > 1 and len(pair.masks.values) == 1 and pair.masks_layout.frames is None:
        raise HostError(
            f"Expected to know which frame is which, but the slot attention ran {calls} times and the decoder once, on "
            "frames folded into its batch, videos first or frames first. Call the slot attention once on the folded "
            "frames, or the decoder once per frame."
        )


def _last_entry(value: Tensor, axis: int, text: str) -> Tensor:
    if not -value.ndim <= axis < value.ndim:
        raise HostError(f"Expected '{text}' to have an axis {axis}, but got {tuple(value.shape)}.")
    return value.select(axis, -1)


def _refuse_reordered(host: nn.Module, module: nn.Module) -> None:
    if _parent(host, module, "slot_attention", "vq") is not None:
        raise HostError(
            "Expected the decoder's slots to be those of the slot attention, but a MetaSlotAttention averages slots of "
            "one code and packs the rest to the front, so that no slot keeps its place. Leave it out, or give the "
            "attention of its own slots out of your model: SSyncCallback(attention=..., masks=...)."
        )


def _parent(host: nn.Module, module: nn.Module, place: str, other: str) -> nn.Module | None:
    for parent in host.modules():
        if getattr(parent, place, None) is module and has_modules(parent, other):
            return parent
    return None


def _heads(module: nn.Module) -> bool:
    return has_modules(module, "split_heads")


def _is_package(module: nn.Module) -> bool:
    children = ("to_q", "to_k", "to_v", "gru", "norm_input", "norm_slots", *(("combine_heads",) * _heads(module)))
    return has_modules(module, *children) and all(
        hasattr(module, name) for name in ("slots_mu", "slots_logsigma", "scale", "eps")
    )
