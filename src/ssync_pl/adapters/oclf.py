"""Adapter of the object-centric learning framework (OCLF): DINOSAUR, slot attention and SAVi built with it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssync_pl.adapters.base import (
    HostAdapter,
    frame_size,
    maps_on_common_grid,
    register_adapter,
    resolve_grid,
    stack_frames,
)
from ssync_pl.adapters.capture import Capture
from ssync_pl.adapters.oclf_calls import (
    NAME_THEM,
    AttentionCall,
    AttentionListener,
    MaskCall,
    MaskListener,
    last_channel,
)
from ssync_pl.adapters.projections import StartOfCall, softmax_gap, take_projection
from ssync_pl.errors import ConfigError, HostError
from ssync_pl.method.maps import SSyncMaps

__all__ = ["OclfAdapter"]

_DECODERS = ("object_decoder", "decoder")
_SLOT_ATTENTION = ("to_q", "to_k", "to_v", "n_heads", "dims_per_head", "scale")


@register_adapter
class OclfAdapter(HostAdapter):
    """Hosts with ``models.perceptual_grouping[.module].slot_attention`` and ``models.object_decoder`` (or ``decoder``).

    Slot attention projects with ``to_k`` once and ``to_q`` in each iteration, takes one softmax over slots and heads,
    and returns the mean over heads, which sums to 1 / heads. The logits are the last query · key · ``scale``, computed
    again from the host's own projections; heads are merged by `joint_heads`, which is exact. It runs once for images
    (T = 1) and once a frame where the host wraps it to go through time. Slots that the host masks do not exist: both
    maps are normalised over the others. A slot masked in one frame counts as masked in the clip.

    Decoders: patches and pixels whose inner ``decoder`` ends in an alpha channel (patch, spatial broadcast, optical
    flow, amodal), run once on the clip or once a frame. Refused are decoders without object masks of their own:
    autoregressive ones, and those that render densities.

    Args:
        grid: ``(H, W)`` patches of the slot attention. None takes it from the size of the batch's frames and the patch
            size of the feature extractor, or a square.

    Raises:
        ConfigError: ``grid`` is not two positive integers.

    Example:
        >>> OclfAdapter(grid=(14, 14)).match(nn.Identity())
        False

    Source: DINOSAUR (arXiv 2209.14860), SAVi (arXiv 2111.12594).
    """

    name: ClassVar[str] = "oclf"
    drops_slots: ClassVar[bool] = False
    """Whether slot attention decides which slots to keep, with a score network."""
    mask_tolerance: ClassVar[float] = 0.0
    """How far the decoder's own masks may be from the softmax of its logits, beyond rounding."""

    def __init__(self, grid: tuple[int, int] | None = None) -> None:
        if grid is not None and (len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid)):
            raise ConfigError(f"Expected argument `grid` to be (H, W), two positive integers, but got {grid!r}.")
        self.grid = grid

    def match(self, host: nn.Module) -> bool:
        """Whether the host has the framework's slot attention and a decoder.

        Args:
            host: The model that is trained, or its ``models``.

        Returns:
            True by structure; names of classes do not matter. Decoders that `attach` refuses match too, so that it can
            say why.

        Example:
            >>> OclfAdapter().match(nn.Linear(1, 1))
            False
        """
        return self._slot_attention(host) is not None and _decoder(host) is not None

    def attach(self, host: nn.Module) -> Capture:
        """Listen to slot attention, its two projections, the decoder and its inner network.

        Args:
            host: The model that is trained, or its ``models``.

        Returns:
            A closed capture.

        Raises:
            HostError: The host has no such modules, or its decoder has no object masks of its own.

        Example:
            >>> OclfAdapter().attach(nn.Identity())  # doctest: +ELLIPSIS
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected Identity to have slot attention at 'models.perceptual_grouping...
        """
        attention, decoder = self._slot_attention(host), _decoder(host)
        if attention is None or decoder is None:
            score = ", `single_gumbel_score_network`" if self.drops_slots else ""
            raise HostError(
                f"Expected {type(host).__name__} to have slot attention at 'models.perceptual_grouping.slot_attention' "
                f"(with `to_q`, `to_k`, `n_heads`, `scale`{score}) and a decoder with a `decoder` of its own at "
                f"'models.object_decoder' or 'models.decoder', but it does not. {NAME_THEM}"
            )
        _refuse_without_masks(host, attention, decoder)
        capture = Capture()
        capture.watch("to_k", attention.to_k, StartOfCall(capture, ("to_k", "to_q")))
        capture.watch("to_q", attention.to_q, take_projection)
        capture.watch("slot_attention", attention, self._listener(capture, decoder, _patch_size(_root(host))))
        capture.watch("decoder.decoder", decoder.decoder, last_channel)
        capture.watch("decoder", decoder, MaskListener(capture))
        return capture

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        """Stack the frames and bring both maps to one grid.

        Args:
            capture: Filled by one training step.
            batch: The batch of that step, a dict with ``image`` ``(B, 3, H, W)`` or ``(B, T, 3, H, W)``.

        Returns:
            Maps ``(B, T, S, N)``, attached to the graph.

        Raises:
            HostError: The decoder did not run on the slots of the slot attention, or the grid is not known.

        Example:
            >>> capture = Capture()
            >>> capture.watch("slot_attention", nn.Identity())
            >>> OclfAdapter().collect(capture)
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected 'slot_attention' to run inside the training step, but it did not.
        """
        calls: list[AttentionCall] = capture["slot_attention"]
        attention = stack_frames([call.logits for call in calls], "slot_attention")
        masks, pixels = _clip(capture["decoder"], attention)
        patches = attention.shape[-1]
        size = (int(masks.shape[-2]), int(masks.shape[-1])) if pixels else None
        grid = resolve_grid(patches, self.grid, calls[0].patch_size, frame_size(batch) or size)
        if not pixels:
            masks = masks.unflatten(3, _finer_grid(grid, masks.shape[-1]))
        return _join(attention, grid, masks, _present(calls))

    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        """Compare with what the host's slot attention and decoder returned.

        Args:
            capture: Filled by one training step.
            maps: What `collect` made of it.

        Raises:
            HostError: A softmax over slots of the logits is not what the host returned.

        Example:
            >>> verify = OclfAdapter().verify  # called by `SSyncCallback` in the first step
        """
        calls: list[AttentionCall] = capture["slot_attention"]
        _refuse_gap("slot attention", *softmax_gap([(call.logits, call.attention) for call in calls], 1))
        decoded: list[MaskCall] = capture["decoder"]
        for call in decoded:
            gap, tolerance = softmax_gap([self._comparable(call, maps)], call.slot_axis)
            _refuse_gap("decoder", gap, max(tolerance, self.mask_tolerance))

    def _slot_attention(self, host: nn.Module) -> Any:
        grouping = _inside(_child(_root(host), "perceptual_grouping"), "slot_attention")
        module = None if grouping is None else grouping.slot_attention
        if module is None or not all(hasattr(module, name) for name in _SLOT_ATTENTION):
            return None
        return module if (_child(module, "single_gumbel_score_network") is not None) == self.drops_slots else None

    def _listener(self, capture: Capture, decoder: nn.Module, patch_size: tuple[int, int] | None) -> AttentionListener:
        return AttentionListener(capture, patch_size)

    def _comparable(self, call: MaskCall, maps: SSyncMaps) -> tuple[Tensor, Tensor]:
        """Logits and the host's masks where their softmax must be the same."""
        return call.logits, call.masks


def _clip(decoded: list[MaskCall], attention: Tensor) -> tuple[Tensor, bool]:
    """Alpha as ``(B, T, S, N)`` or ``(B, T, S, h, w)``."""
    batch, frames, slots, _ = attention.shape
    if not decoded:
        raise HostError("Expected 'decoder' to run inside the training step, but it did not.")
    pixels = decoded[0].pixels
    logits = decoded[0].logits if len(decoded) == 1 else stack_frames([call.logits for call in decoded], "decoder")
    if logits.ndim == (4 if pixels else 3):
        logits = logits.unsqueeze(1)
    if tuple(logits.shape[:3]) != (batch, frames, slots):
        raise HostError(
            f"Expected the decoder to draw the {batch} x {frames} x {slots} slots (B, T, S) that the slot attention "
            f"gave, but it drew {' x '.join(map(str, logits.shape[:3]))} in {len(decoded)} call(s). Either may run "
            "more than once on a frame: write a HostAdapter that picks the calls."
        )
    return logits, pixels


def _present(calls: list[AttentionCall]) -> Tensor | None:
    found = [call.present for call in calls if call.present is not None]
    return torch.stack(found).all(0) if found else None


def _join(attention: Tensor, grid: tuple[int, int], masks: Tensor, present: Tensor | None) -> SSyncMaps:
    if present is None:
        return maps_on_common_grid(attention, grid, masks)
    # Where no slot is left there is nothing to learn from, and a softmax over nothing is NaN.
    some = present.any(1, keepdim=True)
    if tuple(masks.shape[-2:]) != grid:
        # Blocks are averaged as probabilities: absent slots must have none.
        absent = (some & ~present)[:, None, :, None]
        attention = attention.masked_fill(absent, float("-inf"))
        masks = masks.masked_fill(absent[..., None], float("-inf"))
    maps = maps_on_common_grid(attention, grid, masks)
    batch, frames, _, patches = maps.shape
    return replace(maps, slot_valid=present, patch_valid=some[:, None].expand(batch, frames, patches))


def _finer_grid(grid: tuple[int, int], patches: int) -> tuple[int, int]:
    """Grid of a decoder with another number of patches than the attention, of the same proportions."""
    ratio = math.sqrt(patches / (grid[0] * grid[1]))
    finer = (round(grid[0] * ratio), round(grid[1] * ratio))
    if finer[0] * finer[1] != patches:
        raise HostError(
            f"Expected the decoder's {patches} patches to have the proportions of the attention's grid {grid}, but "
            "they do not. Pass grid=(H, W) if that grid is wrong, else write a HostAdapter that resamples."
        )
    return finer


def _refuse_gap(name: str, gap: float, tolerance: float) -> None:
    if not gap <= tolerance:
        raise HostError(
            f"Expected the masks that the {name} returns to be the softmax over slots of its logits, but they differ "
            f"by up to {gap:.3g} (tolerance {tolerance:.1g}). This host changes its maps on the way. {NAME_THEM}"
        )


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


def _patch_size(root: nn.Module) -> tuple[int, int] | None:
    """Stride of the first convolution whose kernels do not overlap: the patch embedding of a ViT."""
    extractor = _child(root, "feature_extractor")
    for module in extractor.modules() if extractor is not None else ():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride and max(module.stride) > 1:
            return int(module.stride[0]), int(module.stride[1])
    return None


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
