"""Adapter of AdaSlot: slot attention of the OCLF family that drops slots, image by image."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssync_pl.adapters.base import register_adapter
from ssync_pl.adapters.capture import Capture
from ssync_pl.adapters.oclf import OclfAdapter
from ssync_pl.adapters.oclf_calls import NAME_THEM, AttentionListener, MaskCall
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps

__all__ = ["AdaSlotAdapter"]


@register_adapter
class AdaSlotAdapter(OclfAdapter):
    """Hosts of `OclfAdapter` whose slot attention has a ``single_gumbel_score_network``.

    It returns a fourth value, the decision ``(B, S)`` which slots to keep. The decoder multiplies the softmax of all
    slots with it, so that dropped slots are zero and the rest may sum to less than 1. Here dropped slots do not exist,
    and both maps are normalised over those that were kept; an image that keeps none is left out. SSync gives no
    gradient to the decision itself: it moves the maps, the host's own losses move the number of slots. Where the
    decoder ignores the decision (``mask_type="none"``), so does this adapter.

    Args:
        grid: ``(H, W)`` patches of the slot attention, as in `OclfAdapter`.

    Raises:
        ConfigError: ``grid`` is not two positive integers.

    Example:
        >>> AdaSlotAdapter().match(nn.Identity())
        False

    Source: AdaSlot (arXiv 2406.09196).
    """

    name: ClassVar[str] = "adaslot"
    drops_slots: ClassVar[bool] = True
    # A straight-through decision is 1 only up to its rounding, which half precision and a penalty of 1e5 make visible.
    mask_tolerance: ClassVar[float] = 1e-2

    def _listener(self, capture: Capture, decoder: nn.Module, patch_size: tuple[int, int] | None) -> AttentionListener:
        ignored = getattr(decoder, "mask_type", None) == "none"
        return (AttentionListener if ignored else _KeptSlots)(capture, patch_size)

    def _comparable(self, call: MaskCall, maps: SSyncMaps) -> tuple[Tensor, Tensor]:
        if maps.slot_valid is None:
            return call.logits, call.masks
        batch, slots = maps.slot_valid.shape
        after = call.logits.ndim - call.slot_axis - 1
        kept = maps.slot_valid.view(batch, *[1] * (call.slot_axis - 1), slots, *[1] * after)
        with torch.no_grad():
            some = kept.any(call.slot_axis, keepdim=True)
            total = call.masks.sum(call.slot_axis, keepdim=True)
            # An image without slots has nothing to compare: both sides become uniform.
            logits = call.logits.masked_fill(~kept, float("-inf")).masked_fill(~some, 0.0)
            masks = torch.where(some, call.masks / total, 1 / slots)
        return logits, masks


class _KeptSlots(AttentionListener):
    """Adds the decision which slots to keep."""

    def present(self, module: Any, args: tuple[Any, ...], output: Any) -> Tensor:
        kept = output[3] if len(output) > 3 else None
        if not isinstance(kept, Tensor) or kept.ndim != 2:
            raise HostError(
                f"Expected {type(module).__name__} to return slots, attention, probabilities and decisions (B, S), but "
                f"got {len(output)} values. {NAME_THEM}"
            )
        kept = kept.detach() > 0.5
        unmasked = super().present(module, args, output)
        return kept if unmasked is None else kept & unmasked
