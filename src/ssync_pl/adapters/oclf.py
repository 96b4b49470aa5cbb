"""Specs of the object-centric learning framework (OCLF), with which DINOSAUR and others are built, and of AdaSlot."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from ssync_pl.adapters.base import register_adapter
from ssync_pl.adapters.calls import MapCall, entry, watch_alpha, watch_attention
from ssync_pl.adapters.capture import NAME_THEM, Capture, describe
from ssync_pl.adapters.grids import patch_stride
from ssync_pl.adapters.heads import joint_heads
from ssync_pl.adapters.slot_model import GridAdapter
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps

_DECODERS = ("object_decoder", "decoder")
_SLOT_ATTENTION = ("to_q", "to_k", "to_v", "n_heads", "dims_per_head", "scale")


@register_adapter
class OclfAdapter(GridAdapter):
    """Hosts with ``models.perceptual_grouping[.module].slot_attention`` and ``models.object_decoder`` (or ``decoder``).

    Slot attention takes one softmax over slots and heads, and returns the mean over heads, which sums to 1 / heads; its
    heads are merged by `joint_heads`, which is exact. It runs once for images (T = 1) and once per frame where the host
    wraps it to go through time. Slots that the host masks do not exist: both maps are normalised over the others. A
    slot masked in one frame counts as masked in the clip. Decoders are those whose inner ``decoder`` ends in an alpha
    channel (patch, spatial broadcast, optical flow, amodal), run once on the clip or once per frame. Decoders without
    object masks of their own are refused: autoregressive ones, and those that render densities.

    Source: DINOSAUR (arXiv 2209.14860), SAVi (arXiv 2111.12594).
    """

    name: ClassVar[str] = "oclf"
    attention, decoder = "slot_attention", "decoder"
    decoder_calls = "frames"
    drops_slots: ClassVar[bool] = False
    """Whether slot attention decides which slots to keep, with a score network."""

    @override
    def match(self, host: nn.Module) -> bool:
        return self._slot_attention(host) is not None and _decoder(host) is not None

    @override
    def needs(self) -> str:
        score = ", `single_gumbel_score_network`" if self.drops_slots else ""
        return (
            "slot attention at 'models.perceptual_grouping.slot_attention' (with `to_q`, `to_k`, `n_heads`, "
            f"`scale`{score}) and a decoder with a `decoder` of its own at 'models.object_decoder' or 'models.decoder'"
        )

    @override
    def listen(self, host: Any, capture: Capture) -> None:
        attention, decoder = self._slot_attention(host), _decoder(host)
        _refuse_without_masks(host, attention, decoder)
        capture.facts["patch_size"] = patch_stride(_child(_root(host), "feature_extractor"))
        kept = _kept if self.drops_slots and getattr(decoder, "mask_type", None) != "none" else None
        watch_attention(capture, "slot_attention", attention, _joint_product, own=_summed, mask=_present, kept=kept)
        watch_alpha(capture, "decoder", decoder, "decoder", _alpha, _masks, axis=None)

    def _slot_attention(self, host: nn.Module) -> Any:
        grouping = _inside(_child(_root(host), "perceptual_grouping"), "slot_attention")
        module = None if grouping is None else grouping.slot_attention
        if module is None or not all(hasattr(module, name) for name in _SLOT_ATTENTION):
            return None
        return module if (_child(module, "single_gumbel_score_network") is not None) == self.drops_slots else None


@register_adapter
class AdaSlotAdapter(OclfAdapter):
    """Hosts of `OclfAdapter` whose slot attention has a ``single_gumbel_score_network``, which drops slots per image.

    It returns a fourth value, the decision ``(B, S)`` which slots to keep. Dropped slots do not exist, and both maps
    are normalised over those that were kept; an image that keeps none is left out. SSync gives no gradient to the
    decision itself: it moves the maps, the host's own losses move the number of slots. Where the decoder ignores the
    decision (``mask_type="none"``), so does this adapter.

    Source: AdaSlot (arXiv 2406.09196).
    """

    name: ClassVar[str] = "adaslot"
    drops_slots: ClassVar[bool] = True

    @override
    def comparable(self, call: MapCall, maps: SSyncMaps) -> tuple[Tensor | None, Tensor | None, float]:
        logits, own, valid = call.logits, call.own, maps.slot_valid
        if call.valid is not None or valid is None or logits is None or own is None:
            return logits, own, 0.0
        batch, slots = valid.shape
        kept = valid.view(batch, *[1] * (call.axis - 1), slots, *[1] * (logits.ndim - call.axis - 1))
        with torch.no_grad():
            some = kept.any(call.axis, keepdim=True)
            total = own.sum(call.axis, keepdim=True)
            # An image without slots has nothing to compare: both sides become uniform.
            logits = logits.masked_fill(~kept, float("-inf")).masked_fill(~some, 0.0)
            own = torch.where(some, own / total, 1 / slots)
        # A straight-through decision is 1 only up to its rounding, which half precision and a penalty of 1e5 make
        # visible.
        return logits, own, 1e-2


def _joint_product(module: Any, query: Tensor, key: Tensor) -> Tensor:
    heads = (module.n_heads, module.dims_per_head)
    logits = torch.einsum("bihd,bjhd->bihj", query.unflatten(-1, heads), key.unflatten(-1, heads)) * module.scale
    return joint_heads(logits, 2)


def _summed(module: Any, output: Any) -> Tensor:
    attention = entry("1")(module, output)
    return attention * module.n_heads


def _present(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    masked = args[2] if len(args) > 2 else None
    return ~masked.bool() if isinstance(masked, Tensor) else None


def _kept(module: Any, output: Any) -> Tensor:
    kept = entry("3")(module, output)
    if kept.ndim != 2:
        raise HostError(
            f"Expected {type(module).__name__} to return slots, attention, probabilities and decisions (B, S), but "
            f"got decisions {tuple(kept.shape)}. {NAME_THEM}"
        )
    return kept.detach() > 0.5


def _masks(module: nn.Module, output: Any) -> Tensor:
    # An amodal decoder returns sigmoids as its masks, and beside them the softmax that it paints with.
    return entry("masks_vis" if hasattr(output, "masks_vis") else "masks")(module, output)


def _alpha(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        raise HostError(
            f"Expected the decoder's inner network to give (B * S, N, C) or (B * S, C, h, w), but got "
            f"{describe(output)}. {NAME_THEM}"
        )
    return output.select(-1 if output.ndim == 3 else 1, -1)


def _refuse_without_masks(host: nn.Module, attention: nn.Module, decoder: nn.Module) -> None:
    name = type(decoder).__name__
    if hasattr(decoder, "use_decoder_masks"):
        paths = {module: path for path, module in host.named_modules()}
        raise HostError(
            f"Expected {name} to draw object masks, but it predicts patches one after another; the `masks` it returns "
            "are those of the slot attention, or its cross-attention. To use the cross-attention, build it with "
            "use_decoder_masks=True and a transformer with return_attention_weights=True, and, for slot attention with "
            f"one head, name both maps: SSyncCallback(attention='softmax:{paths[attention]}', "
            f"masks='{paths[decoder]}:masks')."
        )
    if hasattr(decoder, "depth_positions"):
        raise HostError(
            f"Expected {name} to draw object masks with a softmax over slots, but it renders densities and detaches "
            "its masks. Use a decoder with an alpha channel."
        )


def _root(host: nn.Module) -> nn.Module:
    models = _child(host, "models")
    return host if models is None else models


def _decoder(host: nn.Module) -> Any:
    for name in _DECODERS:
        module = _inside(_child(_root(host), name), "decoder")
        if module is not None and (hasattr(module, "num_patches") or hasattr(module, "initial_conv_size")):
            return module
    return None


def _inside(module: nn.Module | None, name: str) -> Any:
    """The module with a child of that name, below wrappers that route inputs or go through time."""
    while module is not None and _child(module, name) is None:
        module = _child(module, "module")
    return module


def _child(module: nn.Module, name: str) -> nn.Module | None:
    # Not getattr: a ModuleDict has methods beside its children, and a host may compute attributes.
    return dict(module.named_children()).get(name)
