"""Spec of RandSF.Q, VQ-VFM-OCL and the models that share their modules."""

from typing import Any, ClassVar

from torch import Tensor, nn

from ssync_pl.adapters.base import register_adapter
from ssync_pl.adapters.calls import MapCall, entry, watch_softmax
from ssync_pl.adapters.capture import Capture, has_modules
from ssync_pl.adapters.slot_model import SlotModelAdapter
from ssync_pl.errors import HostError


@register_adapter
class RandSFQAdapter(SlotModelAdapter):
    """Hosts with ``encode_backbone``, ``aggregat`` and ``decode``, for videos and for images (T = 1), in plain PyTorch.

    The decoder's map is, with a broadcast MLP decoder, what its softmax is fed, as logits; else the object masks that
    it returns, as probabilities. Decoders without object masks are refused.

    Source: RandSF.Q (arXiv 2508.01345), VQ-VFM-OCL (arXiv 2502.20263), DINOSAUR (arXiv 2209.14860).
    """

    name: ClassVar[str] = "randsfq"
    modules = "encode_backbone aggregat.proj_q aggregat.proj_k decode"
    attention, decoder, features = "aggregat", "decode", "encode_backbone"

    def listen(self, host: Any, capture: Capture) -> None:
        watch_softmax(capture, "aggregat", host.aggregat)
        capture.watch("exist", host.aggregat, _slot_mask, inputs=True)
        backbone = getattr(host.decode, "backbone", None)
        broadcast = isinstance(backbone, nn.Module) and not isinstance(backbone, nn.TransformerDecoder)
        if broadcast and has_modules(host.decode, "posit_embed"):
            watch_softmax(capture, "decode", host.decode, axis=None)
        else:
            _refuse_without_masks(host)
            masks = entry("1")
            capture.watch("decode", host.decode, lambda module, args, out: MapCall(None, masks(module, out)))


def _slot_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return args[2] if len(args) > 2 else kwargs.get("smask")


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
