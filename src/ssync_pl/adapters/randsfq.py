"""Adapter of RandSF.Q, VQ-VFM-OCL and the models that share their modules."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.adapters.base import HostAdapter, register_adapter, stack_frames
from ssync_pl.adapters.capture import Capture, submodule
from ssync_pl.adapters.projections import Projection, StartOfCall, require_projections, softmax_gap, take_projection
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps

__all__ = ["RandSFQAdapter"]


@register_adapter
class RandSFQAdapter(HostAdapter):
    """Hosts with ``encode_backbone``, ``aggregat`` and ``decode``, for videos and for images, in plain PyTorch.

    ``aggregat`` runs once a frame, returns slots and attention, and projects with ``proj_k`` once and ``proj_q`` in
    each iteration; its logits are computed again from the last of these. A mask of slots that it gets becomes
    ``slot_valid``, so its logits of minus infinity never enter a loss. The decoder's map is, with a broadcast MLP
    decoder, the last channel of its ``backbone`` as logits; with a slot mixer or a transformer decoder over random
    orders of patches, the object masks that it returns beside the reconstruction: its attention over slots, averaged
    over heads, as probabilities. Decoders without object masks are refused. The grid is that of the backbone's feature
    map. Image models give T = 1.

    Example:
        >>> RandSFQAdapter().match(nn.Identity())
        False

    Source: RandSF.Q (arXiv 2508.01345), VQ-VFM-OCL (arXiv 2502.20263), DINOSAUR (arXiv 2209.14860).
    """

    name: ClassVar[str] = "randsfq"

    def match(self, host: nn.Module) -> bool:
        """Whether the host has the family's modules.

        Args:
            host: The model that is trained.

        Returns:
            True by structure; names of classes do not matter.

        Example:
            >>> RandSFQAdapter().match(nn.Linear(1, 1))
            False
        """
        aggregat = getattr(host, "aggregat", None)
        return (
            _has(host, "encode_backbone", "decode")
            and isinstance(aggregat, nn.Module)
            and _has(aggregat, "proj_q", "proj_k")
        )

    def attach(self, host: nn.Module) -> Capture:
        """Listen to the backbone, the slot attention with its projections, and the decoder.

        Args:
            host: The model that is trained.

        Returns:
            A closed capture.

        Raises:
            HostError: The host lacks these modules, or its decoder has no object masks.

        Example:
            >>> RandSFQAdapter().attach(nn.Identity())
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected the host to have a module at 'aggregat', but 'Identity' has no child \
'aggregat'. Its children: none.
        """
        aggregat, decode = submodule(host, "aggregat"), submodule(host, "decode")
        broadcast = _is_broadcast(decode)
        if not broadcast:
            _refuse_without_masks(host, decode)
        capture = Capture()
        capture.watch("encode_backbone", submodule(host, "encode_backbone"), _grid)
        capture.watch("proj_k", submodule(aggregat, "proj_k"), StartOfCall(capture, ("proj_k", "proj_q")))
        capture.watch("proj_q", submodule(aggregat, "proj_q"), take_projection)
        capture.watch_input("slot mask", aggregat, _slot_mask)
        capture.watch("aggregat", aggregat, _Attention(capture))
        if broadcast:
            capture.watch("decode.backbone", submodule(decode, "backbone"), _last_channel)
        capture.watch("decode", decode, _Decoded(capture, "decode.backbone" if broadcast else None))
        return capture

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        """Stack the frames of the slot attention, and unfold those of the decoder.

        Args:
            capture: Filled by one training step.
            batch: Not needed.

        Returns:
            Maps ``(B, T, S, N)``, attached to the graph.

        Raises:
            HostError: The decoder did not run on the frames of the slot attention, or slots differ between frames.

        Example:
            >>> capture = Capture()
            >>> capture.watch("aggregat", nn.Identity())
            >>> RandSFQAdapter().collect(capture)
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected 'aggregat' to run inside the training step, but it did not.
        """
        calls: list[_Map] = capture["aggregat"]
        logits = stack_frames([call.logits for call in calls if call.logits is not None], "aggregat")
        batch_size, frames, slots, patches = logits.shape
        decoded: _Map = capture.only("decode")
        if decoded.masks.shape != (batch_size * frames, slots, patches):
            raise HostError(
                f"Expected the decoder to return masks of shape {(batch_size * frames, slots, patches)}, (B * T, S, N) "
                f"of the slot attention's frames, but got {tuple(decoded.masks.shape)}. Name the modules yourself: "
                "SSyncCallback(attention=..., masks=...)."
            )
        name, value = ("mask_probs", decoded.masks) if decoded.logits is None else ("mask_logits", decoded.logits)
        return SSyncMaps(
            attention_logits=logits,
            **{name: value.unflatten(0, (batch_size, frames))},
            grid=capture.only("encode_backbone"),
            slot_valid=_slot_valid(capture["slot mask"], batch_size, slots, logits.device),
        )

    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        """Compare with the attention and the masks that the host returned, and slots between frames.

        Args:
            capture: Filled by one training step.
            maps: What `collect` made of it.

        Raises:
            HostError: A softmax over slots of the logits is not what the host returned, or the slots that exist
                change from frame to frame.

        Example:
            >>> verify = RandSFQAdapter().verify  # called in the first step
        """
        slot_masks = capture["slot mask"]
        if any((mask is None) != (slot_masks[0] is None) for mask in slot_masks) or (
            slot_masks[0] is not None and any(not torch.equal(mask, slot_masks[0]) for mask in slot_masks)
        ):
            raise HostError(
                "Expected one set of valid slots for all frames of a clip, but 'aggregat' got masks that differ "
                "between frames. Labels are compared over time: keep a slot for the whole clip."
            )
        for name in ("aggregat", "decode"):
            calls: list[_Map] = capture[name]
            given = [(call.logits, call.masks) for call in calls if call.logits is not None]
            pairs = [(_without_invalid(logits, maps.slot_valid), masks) for logits, masks in given]
            gap, tolerance = softmax_gap(pairs, 1) if pairs else (0.0, 0.0)
            if not gap <= tolerance:
                raise HostError(
                    f"Expected the masks that '{name}' returns to be the softmax over slots of its logits, but they "
                    f"differ by up to {gap:.3g} (tolerance {tolerance:.1g}). This host changes its maps on the way: "
                    "name what to use, as in SSyncCallback(attention='aggregat:1', masks='decode:1')."
                )


class _Map(NamedTuple):
    """One call of slot attention or decoder: logits, where there are any, and the host's own map, both (B, S, N)."""

    logits: Tensor | None
    masks: Tensor


class _Attention:
    """Logits of one call: the last query, scaled, with the key, in the order and precision of the host."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> _Map:
        require_projections(self.capture, module, "proj_q", "proj_k")
        query: Projection = self.capture["proj_q"][-1]
        key: Projection = self.capture["proj_k"][-1]
        with query.precision():
            scaled = query.value * query.value.shape[-1] ** -0.5
            logits = torch.einsum("bsd,bnd->bsn", scaled, key.value)
        return _Map(logits, _second(module, output))


class _Decoded:
    """The decoder's masks, with the alpha of a broadcast decoder, which folds the slots into the batch."""

    def __init__(self, capture: Capture, alpha: str | None) -> None:
        self.capture = capture
        self.alpha = alpha

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> _Map:
        masks = _second(module, output)
        if self.alpha is None:
            return _Map(None, masks)
        alpha: Tensor = self.capture.only(self.alpha)
        if alpha.numel() != masks.numel():
            raise HostError(
                f"Expected the decoder's backbone to give one alpha for each of its masks, {tuple(masks.shape)}, but "
                f"got {tuple(alpha.shape)}. Name the modules yourself: SSyncCallback(attention=..., masks=...)."
            )
        return _Map(alpha.reshape(masks.shape), masks)


def _slot_valid(slot_masks: list[Tensor | None], batch: int, slots: int, device: torch.device) -> Tensor | None:
    given = [mask for mask in slot_masks if mask is not None]
    if not given:
        return None
    return torch.stack(given).all(0).to(device).expand(batch, slots)


def _without_invalid(logits: Tensor, slot_valid: Tensor | None) -> Tensor:
    if slot_valid is None:
        return logits
    frames = logits.shape[0] // slot_valid.shape[0]
    return logits.masked_fill(~slot_valid.repeat_interleave(frames, 0)[:, :, None], float("-inf"))


def _slot_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return args[2] if len(args) > 2 else kwargs.get("smask")


def _grid(module: nn.Module, args: tuple[Any, ...], output: Any) -> tuple[int, int]:
    if not isinstance(output, Tensor) or output.ndim != 4:
        kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise HostError(f"Expected 'encode_backbone' to return a feature map (B * T, C, H, W), but got {kind}.")
    return int(output.shape[-2]), int(output.shape[-1])


def _last_channel(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    return output[..., -1]


def _second(module: nn.Module, output: Any) -> Tensor:
    second = output[1] if isinstance(output, (tuple, list)) and len(output) == 2 else None
    if not isinstance(second, Tensor) or second.ndim != 3:
        got = type(output).__name__ if not isinstance(second, Tensor) else f"a second entry {tuple(second.shape)}"
        raise HostError(
            f"Expected {type(module).__name__} to return two tensors, the second of shape (B, S, N), but got {got}. "
            "Name the modules yourself: SSyncCallback(attention=..., masks=...)."
        )
    return second


def _is_broadcast(decode: nn.Module) -> bool:
    backbone = getattr(decode, "backbone", None)
    sequential = isinstance(backbone, nn.Module) and not isinstance(backbone, nn.TransformerDecoder)
    return sequential and _has(decode, "posit_embed")


def _refuse_without_masks(host: nn.Module, decode: nn.Module) -> None:
    if _has(decode, "noise_sched"):
        kind, attention = "is a diffusion model", "its denoiser"
    elif hasattr(decode, "bos"):
        kind, attention = "predicts patches one after the other", "its last block (need_weights=True)"
    else:
        return
    raise HostError(
        f"Expected the decoder of {type(host).__name__} to return object masks, but {type(decode).__name__} {kind}, "
        f"and has none. In their place you can use the cross-attention on the slots of {attention}: add an nn.Identity "
        "to the host, call it in the forward pass with that softmax over slots, averaged over heads, as (B, T, S, N) "
        "on the grid of the slot attention, and name both: attach(model, attention='aggregat:1', masks='...')."
    )


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)
