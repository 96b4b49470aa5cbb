"""Adapter of Genera1Z's SAVi, a plain PyTorch model."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.adapters.agreement import check_close
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

__all__ = ["Genera1zSaviAdapter"]

_MODULES = (
    "encoder.backbone",
    "processor.initialize",
    "processor.correct.proj_q",
    "processor.correct.proj_k",
    "processor.correct.proj_v",
    "processor.correct.gru",
    "processor.predict",
    "decoder.backbone",
    "decoder.readout",
)
_EPSILON = 1e-8  # In the host a default argument of a function, which no hook can read.


@register_adapter
class Genera1zSaviAdapter(HostAdapter):
    """``Savi`` of Genera1Z's SAVi-PyTorch, alone or inside its ``ModelHelper``.

    ``processor.correct`` runs once a frame and returns slots only; its logits are the last query, divided by the square
    root of its size, · key. The decoder draws all frames at once; its alpha is the fourth channel of ``readout``. The
    grid is that of the encoder's feature map.

    Note:
        Slots start from the boxes of the first frame, and boxes of zeros fill up the list: their slots are equal to the
        background's up to rounding, and which of them wins a patch means nothing. Keep merging on, which joins slots
        that cover the same patches, and give a lower `merge_threshold` where they stay apart.

    Example:
        >>> Genera1zSaviAdapter().match(nn.Identity())
        False

    Source: https://github.com/Genera1Z/SAVi-PyTorch, SAVi (arXiv 2111.12594).
    """

    name: ClassVar[str] = "genera1z-savi"

    def match(self, host: nn.Module) -> bool:
        """Whether the host is this model.

        Args:
            host: The model that is trained.

        Returns:
            True by structure; names of classes do not matter.

        Example:
            >>> Genera1zSaviAdapter().match(nn.Linear(1, 1))
            False
        """
        return has_modules(host, *_MODULES)

    def attach(self, host: nn.Module) -> Capture:
        """Listen to the encoder, the slot attention with its projections, the decoder's last layer, and the model.

        Args:
            host: The model that is trained.

        Returns:
            A closed capture.

        Raises:
            HostError: The host has no such modules.

        Example:
            >>> Genera1zSaviAdapter().attach(nn.Identity())  # doctest: +ELLIPSIS
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected Identity to have encoder.backbone, processor.initialize, ...
        """
        if not self.match(host):
            raise HostError(
                f"Expected {type(host).__name__} to have {', '.join(_MODULES)}, but it does not. Name the modules "
                "yourself: attach(attention=..., masks=...) or SSyncCallback(attention=..., masks=...)."
            )
        model: Any = host
        correct, path = model.processor.correct, "processor.correct"
        capture = Capture()
        capture.watch("encoder.backbone", model.encoder.backbone, map_size)
        watch_slot_attention(capture, path, correct, ("proj_q", "proj_k", "proj_v"), _logits, _weigh)
        capture.watch("output", model, _reconstruction)
        capture.watch("decoder.readout", model.decoder.readout, Announce(capture, "output", _readout))
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
            >>> capture.watch("processor.correct", nn.Identity())
            >>> Genera1zSaviAdapter().collect(capture)
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected 'processor.correct' to run inside the training step, but it did not.
        """
        attention = stack_frames([call.logits for call in capture["processor.correct"]], "processor.correct")
        drawn: _Drawn = capture.only("decoder.readout")
        masks = fold_frames(drawn.alpha, attention, "decoder.readout")
        return maps_on_common_grid(attention, capture.only("encoder.backbone"), masks)

    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        """Compare with the updates of the slots and with the reconstruction, where the model itself was called.

        Args:
            capture: Filled by one training step.
            maps: What `collect` made of it; not needed.

        Raises:
            HostError: They do not follow from the logits.

        Example:
            >>> verify = Genera1zSaviAdapter().verify  # called in the first step
        """
        calls: list[SlotCall] = capture["processor.correct"]
        check_updates(calls, "processor.correct")
        own = capture["output"][-1]
        if own is None:
            return
        drawn: _Drawn = capture.only("decoder.readout")
        slots = calls[0].logits.shape[1]
        colours, alpha = (part.detach().float().unflatten(0, (-1, slots)) for part in drawn)
        mine = (alpha.softmax(1)[:, :, None] * colours).sum(1)
        check_close(
            mine.reshape(own.shape),
            own,
            "reconstruction",
            "the sum of what the slots draw, weighted by the softmax over slots of the fourth channel of "
            "decoder.readout",
            scale=float(colours.abs().max()),
        )


class _Drawn(NamedTuple):
    """What the decoder's last layer gives: colours ``(B * T * S, 3, h, w)`` and alpha ``(B * T * S, h, w)``."""

    colours: Tensor
    alpha: Tensor


def _readout(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> _Drawn:
    if output.shape[1] != 4:
        raise HostError(
            f"Expected decoder.readout to give 4 channels, three colours and alpha, but got {output.shape[1]}. Name "
            "the modules yourself: attach(attention=..., masks=...)."
        )
    return _Drawn(output[:, :3], output[:, 3])


def _reconstruction(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, (tuple, list)) and output else None
    return first if isinstance(first, Tensor) and first.ndim == 5 else None


def _logits(module: Any, query: Tensor, key: Tensor) -> Tensor:
    return torch.einsum("bsd,bnd->bsn", query / query.shape[-1] ** 0.5, key)


def _weigh(module: Any, logits: Tensor) -> Tensor:
    weights = logits.softmax(1)
    return weights / (weights.sum(2, keepdim=True) + _EPSILON)
