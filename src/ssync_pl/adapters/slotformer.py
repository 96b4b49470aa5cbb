"""Adapter of SlotFormer's StoSAVi, the SAVi that its slots come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssync_pl.adapters.agreement import check_softmax
from ssync_pl.adapters.base import HostAdapter, maps_on_common_grid, register_adapter, stack_frames
from ssync_pl.adapters.capture import Capture
from ssync_pl.adapters.slots_only import (
    Announce,
    SlotCall,
    check_updates,
    fold_frames,
    has_modules,
    map_size,
    watch_slot_attention,
)
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps

__all__ = ["SlotFormerAdapter"]

_MODULES = (
    "encoder",
    "encoder_pos_embedding",
    "slot_attention.project_q",
    "slot_attention.project_k",
    "slot_attention.project_v",
    "slot_attention.gru",
    "decoder",
    "decoder_pos_embedding",
)


@register_adapter
class SlotFormerAdapter(HostAdapter):
    """``StoSAVi`` of SlotFormer, with sampled or fixed kernels.

    ``slot_attention`` runs once a frame, returns slots only, and softmaxes ``attn_scale`` · key · query ``(B, N, S)``
    over its last axis; the logits are those of the last iteration, turned to ``(B, S, N)``. The decoder draws all
    frames and slots at once; its alpha is the last of four channels. The grid is that of the encoder's feature map, and
    finer masks, as of frames of 128 pixels, are averaged to it.

    The host's kernels are sampled around each slot before the first iteration; this adapter draws no random numbers, so
    a training without SSync's weight is the same to the bit.

    Note:
        SlotFormer's trainer calls the model or, with ``nerv`` before 0.4, its ``loss_function``, which goes past hooks
        on the model itself. Both work. The rollout models of its second stage have no slot attention and cannot be
        used; its STEVE has no object masks and is refused.

    Example:
        >>> SlotFormerAdapter().match(nn.Identity())
        False

    Source: SlotFormer (arXiv 2210.05861), SAVi (arXiv 2111.12594).
    """

    name: ClassVar[str] = "slotformer"

    def match(self, host: nn.Module) -> bool:
        """Whether the host is this model.

        Args:
            host: The model that is trained.

        Returns:
            True by structure; names of classes do not matter.

        Example:
            >>> SlotFormerAdapter().match(nn.Linear(1, 1))
            False
        """
        return (
            has_modules(host, *_MODULES)
            and hasattr(host.slot_attention, "attn_scale")
            and hasattr(host.slot_attention, "eps")
        )

    def attach(self, host: nn.Module) -> Capture:
        """Listen to the encoder, the slot attention with its projections, the decoder, and the model.

        Args:
            host: The model that is trained.

        Returns:
            A closed capture.

        Raises:
            HostError: The host has no such modules.

        Example:
            >>> SlotFormerAdapter().attach(nn.Identity())  # doctest: +ELLIPSIS
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected Identity to have encoder, encoder_pos_embedding, slot_attention...
        """
        if not self.match(host):
            raise HostError(
                f"Expected {type(host).__name__} to have {', '.join(_MODULES)} and `attn_scale` and `eps` on its slot "
                "attention, but it does not. Name the modules yourself: attach(attention=..., masks=...) or "
                "SSyncCallback(attention=..., masks=...)."
            )
        model: Any = host
        names = ("project_q", "project_k", "project_v")
        capture = Capture()
        capture.watch("encoder", model.encoder, map_size)
        watch_slot_attention(capture, "slot_attention", model.slot_attention, names, _logits, _weigh)
        capture.watch("output", model, _own_masks)
        capture.watch("decoder", model.decoder, Announce(capture, "output", _alpha))
        return capture

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        """Stack the frames and bring both maps to one grid.

        Args:
            capture: Filled by one training step.
            batch: Not needed.

        Returns:
            Maps ``(B, T, S, N)``, attached to the graph.

        Raises:
            HostError: The decoder did not run once on the frames of the slot attention, or the two grids do not divide
                each other.

        Example:
            >>> capture = Capture()
            >>> capture.watch("slot_attention", nn.Identity())
            >>> SlotFormerAdapter().collect(capture)
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected 'slot_attention' to run inside the training step, but it did not.
        """
        attention = stack_frames([call.logits for call in capture["slot_attention"]], "slot_attention")
        masks = fold_frames(capture.only("decoder"), attention, "decoder")
        return maps_on_common_grid(attention, capture.only("encoder"), masks)

    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        """Compare with the updates of the slots and with the masks that the model returned, where it was called.

        Args:
            capture: Filled by one training step.
            maps: What `collect` made of it; not needed.

        Raises:
            HostError: They do not follow from the logits.

        Example:
            >>> verify = SlotFormerAdapter().verify  # called in the first step
        """
        calls: list[SlotCall] = capture["slot_attention"]
        check_updates(calls, "slot_attention")
        own = capture["output"][-1]
        if own is not None:
            check_softmax(capture.only("decoder").reshape(own.shape), own, 2, "'post_masks' that the model returns")


def _alpha(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output[:, -1]


def _own_masks(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    masks = output.get("post_masks") if isinstance(output, Mapping) else None
    return masks if isinstance(masks, Tensor) and masks.ndim == 6 else None


def _logits(module: Any, query: Tensor, key: Tensor) -> Tensor:
    return (module.attn_scale * torch.einsum("bnd,bsd->bns", key, query)).transpose(1, 2)


def _weigh(module: Any, logits: Tensor) -> Tensor:
    weights = logits.softmax(1) + module.eps
    return weights / weights.sum(2, keepdim=True)
