"""Adapter of the VideoSAUR family: VideoSAUR, SlotContrast and the forks that keep their modules."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

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
from ssync_pl.adapters.capture import Capture, submodule
from ssync_pl.errors import ConfigError, HostError
from ssync_pl.maps import SSyncMaps

__all__ = ["VideosaurAdapter"]

_CORRECTORS = ("processor.module.corrector", "processor.corrector")
_DECODERS = ("decoder.module", "decoder")


@register_adapter
class VideosaurAdapter(HostAdapter):
    """Hosts with ``processor[.module].corrector`` and ``decoder[.module]``, for videos and for images.

    The corrector runs once a frame and projects with ``to_k`` once and ``to_q`` in each iteration; its logits are the
    last query · key · ``scale``, computed again from the host's own projections (or read, where a fork returns them as
    ``dots``). Decoders: an ``mlp`` whose last channel is alpha; a slot mixer with ``to_q``, ``to_k`` and ``scale``; a
    spatial broadcast decoder whose ``output_transform`` ends in alpha. Image models give T = 1.

    Args:
        grid: ``(H, W)`` patches of the slot attention. None takes it from the size of the batch's frames and the patch
            size of the encoder, or a square.

    Raises:
        ConfigError: ``grid`` is not two positive integers.

    Example:
        >>> VideosaurAdapter(grid=(24, 36)).match(nn.Identity())
        False

    Source: VideoSAUR (arXiv 2306.04829), SlotContrast (arXiv 2412.14295).
    """

    name: ClassVar[str] = "videosaur"

    def __init__(self, grid: tuple[int, int] | None = None) -> None:
        if grid is not None and (len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid)):
            raise ConfigError(f"Expected argument `grid` to be (H, W), two positive integers, but got {grid!r}.")
        self.grid = grid

    def match(self, host: nn.Module) -> bool:
        """Whether the host has the family's corrector and one of its decoders.

        Args:
            host: The model that is trained.

        Returns:
            True by structure; names of classes do not matter.

        Example:
            >>> VideosaurAdapter().match(nn.Linear(1, 1))
            False
        """
        return _corrector(host) is not None and _decoder(host) is not None

    def attach(self, host: nn.Module) -> Capture:
        """Listen to the corrector, its two projections, and the decoder.

        Args:
            host: The model that is trained.

        Returns:
            A closed capture.

        Raises:
            HostError: The host has no such modules.

        Example:
            >>> VideosaurAdapter().attach(nn.Identity())  # doctest: +ELLIPSIS
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected Identity to have a corrector with `to_q`, `to_k` and `scale` at ...
        """
        corrector, decoder = _corrector(host), _decoder(host)
        if corrector is None or decoder is None:
            raise HostError(
                f"Expected {type(host).__name__} to have a corrector with `to_q`, `to_k` and `scale` at "
                f"{' or '.join(map(repr, _CORRECTORS))} and a decoder with object masks at "
                f"{' or '.join(map(repr, _DECODERS))}, but it does not. Name the modules yourself: "
                "SSyncCallback(attention=..., masks=...)."
            )
        capture = Capture()
        capture.watch("to_k", corrector.to_k, _StartOfCall(capture, ("to_k", "to_q")))
        capture.watch("to_q", corrector.to_q, _projection)
        capture.watch("corrector", corrector, _Product(capture, "bsd,bnd->bsn", "to_q", "to_k", _patch_size(host)))
        if _projects(decoder):
            capture.watch("decoder.to_k", decoder.to_k, _projection)
            capture.watch("decoder.to_q", decoder.to_q, _projection)
            product = _Product(capture, "bnd,bsd->bns", "decoder.to_q", "decoder.to_k", transpose=True)
            capture.watch("decoder", decoder, product)
        else:
            path, channel = ("mlp", -1) if _has(decoder, "mlp") else ("output_transform", -3)
            capture.watch(f"decoder.{path}", submodule(decoder, path), _LastChannel(channel))
            capture.watch("decoder", decoder, _Alpha(capture, f"decoder.{path}"))
        return capture

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        """Stack the frames and bring both maps to one grid.

        Args:
            capture: Filled by one training step.
            batch: The batch of that step, a dict with ``video`` ``(B, T, 3, H, W)`` or ``image`` ``(B, 3, H, W)``.

        Returns:
            Maps ``(B, T, S, N)``, attached to the graph.

        Raises:
            HostError: The decoder did not run on the frames of the corrector, or the grid is not known.

        Example:
            >>> capture = Capture()
            >>> capture.watch("corrector", nn.Identity())
            >>> VideosaurAdapter().collect(capture)
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected 'corrector' to run inside the training step, but it did not.
        """
        calls: list[_Map] = capture["corrector"]
        attention = stack_frames([call.logits for call in calls], "corrector")
        batch_size, frames, _, patches = attention.shape
        decoded: _Map = capture.only("decoder")
        if decoded.logits.shape[0] != batch_size * frames:
            raise HostError(
                f"Expected the decoder to run once on the {batch_size} x {frames} frames that the corrector saw, but "
                f"it ran on {decoded.logits.shape[0]}. The corrector may run more than once a frame: write a "
                "HostAdapter that picks the calls."
            )
        masks = decoded.logits.unflatten(0, (batch_size, frames))
        pixels = (int(masks.shape[-2]), int(masks.shape[-1])) if masks.ndim == 5 else None
        grid = resolve_grid(patches, self.grid, calls[0].patch_size, frame_size(batch) or pixels)
        if pixels is not None:
            return maps_on_common_grid(attention, grid, masks)
        return SSyncMaps(attention_logits=attention, mask_logits=masks, grid=grid)

    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        """Compare with the masks that the host's corrector and decoder returned.

        Args:
            capture: Filled by one training step.
            maps: What `collect` made of it; not needed.

        Raises:
            HostError: A softmax over slots of the logits is not what the host returned.

        Example:
            >>> verify = VideosaurAdapter().verify  # called by `SSyncCallback` in the first step
        """
        for name in ("corrector", "decoder"):
            calls: list[_Map] = capture[name]
            with torch.no_grad():
                gaps = [(call.logits.double().softmax(1) - call.masks.double()).abs().max() for call in calls]
                gap = float(torch.stack(gaps).max())
            tolerance = max(1e-5, *(4 * torch.finfo(call.masks.dtype).eps for call in calls))
            if not gap <= tolerance:
                raise HostError(
                    f"Expected the masks that the {name} returns to be the softmax over slots of its logits, but they "
                    f"differ by up to {gap:.3g} (tolerance {tolerance:.1g}). This host changes its maps on the way: "
                    "name what to use, as in SSyncCallback(attention='processor.module.corrector:masks', "
                    "masks='decoder:masks')."
                )


class _Map(NamedTuple):
    """One call of corrector or decoder: logits and the host's own masks, slots on axis 1 of both."""

    logits: Tensor
    masks: Tensor
    patch_size: tuple[int, int] | None = None


class _Projection(NamedTuple):
    """Output of a projection and the autocast it ran under; a host may switch autocast inside its modules."""

    value: Tensor
    autocast: tuple[bool, torch.dtype] | None

    def precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        enabled, dtype = self.autocast
        return torch.autocast(self.value.device.type, dtype=dtype, enabled=enabled)


def _projection(module: nn.Module, args: tuple[Any, ...], output: Any) -> _Projection:
    device = output.device.type
    if not torch.amp.is_autocast_available(device):
        return _Projection(output, None)
    return _Projection(output, (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))


class _StartOfCall:
    """Forgets the previous call's projections when a new call begins, so that no query outlives its frame."""

    def __init__(self, capture: Capture, keys: tuple[str, ...]) -> None:
        self.capture = capture
        self.keys = keys

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> _Projection:
        for key in self.keys:
            self.capture[key].clear()
        return _projection(module, args, output)


class _Product:
    """Logits of one call: the last query with the key, times the scale, in the order and precision of the host."""

    def __init__(
        self,
        capture: Capture,
        equation: str,
        query: str,
        key: str,
        patch_size: tuple[int, int] | None = None,
        transpose: bool = False,
    ) -> None:
        self.capture = capture
        self.equation = equation
        self.query = query
        self.key = key
        self.patch_size = patch_size
        self.transpose = transpose

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> _Map:
        masks = _masks(module, output)
        logits = output.get("dots")
        if not isinstance(logits, Tensor):
            logits = self._recompute(module)
            logits = logits.transpose(1, 2) if self.transpose else logits
        return _Map(_like(logits, masks, module), masks, self.patch_size)

    def _recompute(self, module: Any) -> Tensor:
        for name in (self.query, self.key):
            if not self.capture[name]:
                raise HostError(
                    f"Expected {type(module).__name__} to call its '{name}' in each of its calls, but it did not. Name "
                    "the modules yourself: SSyncCallback(attention=..., masks=...)."
                )
        query: _Projection = self.capture[self.query][-1]
        key: _Projection = self.capture[self.key][-1]
        with query.precision():
            return torch.einsum(self.equation, query.value, key.value) * module.scale


class _LastChannel:
    """Alpha beside the reconstruction: the last channel, which is the last axis or the one before height and width."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        return output.select(self.axis, -1)


class _Alpha:
    """Alpha logits of a decoder that computes one map for each slot."""

    def __init__(self, capture: Capture, key: str) -> None:
        self.capture = capture
        self.key = key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> _Map:
        masks = _masks(module, output)
        alpha = self.capture.only(self.key)
        # A broadcast decoder folds the slots into the batch.
        if masks.ndim == 4 and alpha.ndim == 3 and alpha.shape[0] == masks.shape[0] * masks.shape[1]:
            alpha = alpha.unflatten(0, masks.shape[:2])
        return _Map(_like(alpha, masks, module), masks)


def _masks(module: nn.Module, output: Any) -> Tensor:
    masks = output.get("masks") if isinstance(output, Mapping) else None
    if not isinstance(masks, Tensor):
        kind = f"keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else type(output).__name__
        raise HostError(
            f"Expected {type(module).__name__} to return a dict with a tensor 'masks', but got {kind}. Name the "
            "modules yourself: SSyncCallback(attention=..., masks=...)."
        )
    return masks


def _like(logits: Tensor, masks: Tensor, module: nn.Module) -> Tensor:
    if logits.shape != masks.shape:
        raise HostError(
            f"Expected the logits of {type(module).__name__} to have the shape of its masks, {tuple(masks.shape)}, "
            f"but got {tuple(logits.shape)}. Name the modules yourself: SSyncCallback(attention=..., masks=...)."
        )
    return logits


def _corrector(host: nn.Module) -> Any:
    for path in _CORRECTORS:
        module = _find(host, path)
        if module is not None and _projects(module):
            return module
    return None


def _decoder(host: nn.Module) -> Any:
    for path in _DECODERS:
        module = _find(host, path)
        if module is None:
            continue
        if _projects(module) or _has(module, "mlp") or (_has(module, "backbone") and _has(module, "output_transform")):
            return module
    return None


def _projects(module: nn.Module) -> bool:
    """A corrector and a slot mixer are alike: both compare what two projections give."""
    return _has(module, "to_q") and _has(module, "to_k") and hasattr(module, "scale")


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


def _find(host: nn.Module, path: str) -> nn.Module | None:
    try:
        return submodule(host, path)
    except HostError:
        return None


def _patch_size(host: nn.Module) -> tuple[int, int] | None:
    """Stride of the first convolution of the encoder whose kernels do not overlap: the patch embedding of a ViT."""
    encoder = _find(host, "encoder")
    for module in encoder.modules() if encoder is not None else ():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride and max(module.stride) > 1:
            return int(module.stride[0]), int(module.stride[1])
    return None
