"""Adapter of the SAVi in SOLD."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.adapters.agreement import check_softmax
from ssync_pl.adapters.base import HostAdapter, maps_on_common_grid, register_adapter, stack_frames
from ssync_pl.adapters.capture import Capture
from ssync_pl.adapters.slots_only import (
    SlotCall,
    check_updates,
    fold_frames,
    has_modules,
    map_size,
    watch_slot_attention,
)
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps

__all__ = ["SoldAdapter"]

_MODULES = (
    "encoder.encoder",
    "initializer",
    "predictor",
    "corrector.to_q",
    "corrector.to_k",
    "corrector.to_v",
    "corrector.gru",
    "decoder.encoder",
    "decoder.positional_embedding",
)


@register_adapter
class SoldAdapter(HostAdapter):
    """The autoencoder ``SAVi`` of SOLD, in the LightningModule that trains it.

    The corrector runs once a frame, with more iterations in the first, and keeps attention that was normalised over
    patches; this adapter takes the logits before, last query · key · ``scale``. The decoder draws all frames at once;
    its alpha is the last of the four channels of its convolutions. The grid is that of the encoder's feature map.

    Note:
        SOLD's second stage, which learns dynamics, rewards and a policy, uses manual optimization: it calls backward
        itself, several times a step, and `SSyncCallback` refuses it. Train the autoencoder with SSync in the first
        stage.

    Example:
        >>> SoldAdapter().match(nn.Identity())
        False

    Source: SOLD (arXiv 2410.08822), SAVi (arXiv 2111.12594).
    """

    name: ClassVar[str] = "sold"

    def match(self, host: nn.Module) -> bool:
        """Whether the host is this autoencoder.

        Args:
            host: The model that is trained.

        Returns:
            True by structure; names of classes do not matter.

        Example:
            >>> SoldAdapter().match(nn.Linear(1, 1))
            False
        """
        return has_modules(host, *_MODULES) and hasattr(host.corrector, "scale") and hasattr(host.corrector, "epsilon")

    def attach(self, host: nn.Module) -> Capture:
        """Listen to the encoder, the corrector with its projections, and the decoder.

        Args:
            host: The model that is trained.

        Returns:
            A closed capture.

        Raises:
            HostError: The host has no such modules.

        Example:
            >>> SoldAdapter().attach(nn.Identity())  # doctest: +ELLIPSIS
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected Identity to have encoder.encoder, initializer, predictor, ...
        """
        if not self.match(host):
            raise HostError(
                f"Expected {type(host).__name__} to have {', '.join(_MODULES)} and `scale` and `epsilon` on its "
                "corrector, but it does not. Name the modules yourself: SSyncCallback(attention=..., masks=...)."
            )
        model: Any = host
        capture = Capture()
        capture.watch("encoder.encoder", model.encoder.encoder, map_size)
        watch_slot_attention(capture, "corrector", model.corrector, ("to_q", "to_k", "to_v"), _logits, _weigh)
        capture.watch("decoder.encoder", model.decoder.encoder, _alpha)
        capture.watch("decoder", model.decoder, _Masks(capture))
        return capture

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        """Stack the frames and bring both maps to one grid.

        Args:
            capture: Filled by one training step.
            batch: Not needed.

        Returns:
            Maps ``(B, T, S, N)``, attached to the graph.

        Raises:
            HostError: The decoder did not run once on the corrector's frames, or the two grids do not divide each
                other.

        Example:
            >>> capture = Capture()
            >>> capture.watch("corrector", nn.Identity())
            >>> SoldAdapter().collect(capture)
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected 'corrector' to run inside the training step, but it did not.
        """
        attention = stack_frames([call.logits for call in capture["corrector"]], "corrector")
        decoded: _Decoded = capture.only("decoder")
        masks = fold_frames(decoded.logits, attention, "decoder")
        return maps_on_common_grid(attention, capture["encoder.encoder"][0], masks)

    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        """Compare with the update that the corrector made and with the masks that the decoder returned.

        Args:
            capture: Filled by one training step.
            maps: What `collect` made of it; not needed.

        Raises:
            HostError: They do not follow from the logits.

        Example:
            >>> verify = SoldAdapter().verify  # called in the first step
        """
        calls: list[SlotCall] = capture["corrector"]
        check_updates(calls, "corrector")
        decoded: _Decoded = capture.only("decoder")
        check_softmax(decoded.logits.reshape(decoded.masks.shape), decoded.masks, 1, "masks that the decoder returns")


class _Decoded(NamedTuple):
    """Alpha ``(B * T * S, h, w)`` and the host's own masks ``(B * T, S, 1, h, w)``."""

    logits: Tensor
    masks: Tensor


class _Masks:
    """The decoder's masks beside the alpha that its convolutions gave in the same call."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> _Decoded:
        masks = output[1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
        alpha: Tensor = self.capture["decoder.encoder"][-1]
        if not isinstance(masks, Tensor) or masks.numel() != alpha.numel():
            raise HostError(
                f"Expected {type(module).__name__} to return colours and masks (B * T, S, 1, h, w), but got "
                f"{type(output).__name__}. Name the modules yourself: SSyncCallback(attention=..., masks=...)."
            )
        return _Decoded(alpha, masks)


def _alpha(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output[:, -1]


def _logits(module: Any, query: Tensor, key: Tensor) -> Tensor:
    return torch.einsum("bsd,bnd->bsn", query, key) * module.scale


def _weigh(module: Any, logits: Tensor) -> Tensor:
    weights = logits.softmax(1) + module.epsilon
    return weights / weights.sum(-1, keepdim=True)
