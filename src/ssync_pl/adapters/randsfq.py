"""Spec of Genera1Z's hosts, which share their modules: RandSF.Q, SmoothSA, ICC, xSSC, DIAS and VQ-VFM-OCL."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssync_pl.adapters.base import register_adapter
from ssync_pl.adapters.calls import MapCall, entry, watch_softmax
from ssync_pl.adapters.capture import Capture, has_modules
from ssync_pl.adapters.slot_model import SlotModelAdapter
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps


@register_adapter
class RandSFQAdapter(SlotModelAdapter):
    """Hosts with ``encode_backbone``, ``aggregat`` and ``decode``, for videos and for images (T = 1), in plain PyTorch.

    The decoder's map is, with a broadcast MLP decoder, what its softmax is fed, as logits; else the object masks that
    it returns, as probabilities. Decoders without object masks are refused.

    ICC goes through the clip again in reverse, by ``transit_inv``: the maps are those of the forward pass, which it is
    scored by. In training, xSSC's decoder draws some frames in the place of others, and says which: each of its masks
    meets the attention of the frame that it shows, and ``frame_index`` holds that frame. The token of time that takes
    part in its attention is left out, so that masks sum to 1 over slots.

    Source: RandSF.Q (arXiv 2508.01345), SmoothSA (arXiv 2508.05417), ICC (arXiv 2605.30211), xSSC (arXiv 2605.31508),
    DIAS (arXiv 2507.23755), VQ-VFM-OCL (arXiv 2502.20263), DINOSAUR (arXiv 2209.14860).
    """

    name: ClassVar[str] = "randsfq"
    modules = "encode_backbone aggregat.proj_q aggregat.proj_k decode"
    attention, decoder, features = "aggregat", "decode", "encode_backbone"

    def listen(self, host: Any, capture: Capture) -> None:
        watch_softmax(capture, "aggregat", host.aggregat)
        capture.watch("exist", host.aggregat, _slot_mask, inputs=True)
        capture.facts["reversed"] = has_modules(host, "transit_inv")
        backbone = getattr(host.decode, "backbone", None)
        broadcast = isinstance(backbone, nn.Module) and not isinstance(backbone, nn.TransformerDecoder)
        if broadcast and has_modules(host.decode, "posit_embed"):
            watch_softmax(capture, "decode", host.decode, axis=None)
            return
        _refuse_without_masks(host)
        capture.watch("decode", host.decode, _masks)
        if has_modules(host.decode, "te"):
            capture.watch("frames", host.decode, lambda module, args, output: entry("2")(module, output))

    def calls(self, capture: Capture) -> tuple[list[MapCall], list[MapCall]]:
        calls, drawn = super().calls(capture)
        return (calls[: (len(calls) + 1) // 2], drawn[:1]) if capture.facts["reversed"] else (calls, drawn)

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        maps, frames = super().collect(capture, batch), capture.last("frames")
        if frames is None:
            return maps
        logits = torch.as_tensor(maps.attention_logits)
        logits = logits.gather(1, frames[:, :, None, None].expand_as(logits))
        return replace(maps, attention_logits=logits, frame_index=frames)


def _slot_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return args[2] if len(args) > 2 else kwargs.get("smask")


def _masks(module: nn.Module, args: tuple[Any, ...], output: Any) -> MapCall:
    masks = entry("1")(module, output)
    if has_modules(module, "te"):  # its first token is no slot
        masks = masks / masks.sum(-2, keepdim=True).clamp_min(torch.finfo(masks.dtype).tiny)
    return MapCall(None, masks, axis=masks.ndim - 2)


def _refuse_without_masks(host: Any) -> None:
    if has_modules(host.decode, "noise_sched"):
        kind, attention = "is a diffusion model", "its denoiser"
    elif hasattr(host.decode, "bos"):
        kind, attention = "predicts patches one after the other", "its last block (need_weights=True)"
    else:
        return
    raise HostError(
        f"Expected the decoder of {type(host).__name__} to return object masks, but {type(host.decode).__name__} "
        f"{kind}. In their place you can call an nn.Identity with the attention over slots of {attention}, averaged "
        "over heads, as (B, T, S, N), and name both: attach(model, attention='aggregat:1', masks='...')."
    )
