"""Adapter of the VideoSAUR family: VideoSAUR, SlotContrast and the forks that keep their modules."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
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
from ssync_pl.adapters.projections import Projection, StartOfCall, require_projections, softmax_gap, take_projection
from ssync_pl.errors import ConfigError, HostError
from ssync_pl.method.maps import SSyncMaps

__all__ = ["VideosaurAdapter"]

_CORRECTORS = ("processor.module.corrector", "processor.corrector")
_DECODERS = ("decoder.module", "decoder")
_OWN_LOSSES = ("loss_grp2deccls", "loss_dec2grpcls")


@register_adapter
class VideosaurAdapter(HostAdapter):
    """Hosts with ``processor[.module].corrector`` and ``decoder[.module]``, for videos and for images.

    These are VideoSAUR with its SAVi, SAVi++ and DINOSAUR configurations, SlotContrast, SRL, SlotCurri, and SSync's own
    code, whose two losses should be off then: a warning says so.

    The corrector runs once a frame and projects with ``to_k`` once and ``to_q`` in each iteration; its logits are the
    last query · key · ``scale``, computed again from the host's own projections (or read, where a fork returns them as
    ``dots``). Decoders: an ``mlp`` whose last channel is alpha; a slot mixer with ``to_q``, ``to_k`` and ``scale``; a
    spatial broadcast decoder whose ``output_transform`` ends in alpha; any whose ``returns_logits`` is true, which
    returns its mask logits as ``dots``. Image models give T = 1.

    Args:
        grid: ``(H, W)`` patches of the slot attention. None takes the host's own ``grid`` where it states one, or it
            follows from the size of the batch's frames and the patch size of the encoder, or is a square.

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
        _warn_of_own_losses(host)
        capture = Capture()
        capture.watch("to_k", corrector.to_k, StartOfCall(capture, ("to_k", "to_q")))
        capture.watch("to_q", corrector.to_q, take_projection)
        attention = _Product(capture, "bsd,bnd->bsn", "to_q", "to_k", _patch_size(host), grid=_stated_grid(host))
        capture.watch("corrector", corrector, attention)
        if _projects(decoder):
            capture.watch("decoder.to_k", decoder.to_k, take_projection)
            capture.watch("decoder.to_q", decoder.to_q, take_projection)
            product = _Product(capture, "bnd,bsd->bns", "decoder.to_q", "decoder.to_k", transpose=True)
            capture.watch("decoder", decoder, product)
        elif getattr(decoder, "returns_logits", False):
            # Such a decoder may compute its layers in an order of its own, without calling its `mlp`.
            capture.watch("decoder", decoder, _Returned())
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
        stated = self.grid or calls[0].grid
        grid = resolve_grid(patches, stated, calls[0].patch_size, frame_size(batch) or pixels)
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
            gap, tolerance = softmax_gap([(call.logits, call.masks) for call in calls], 1)
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
    grid: tuple[int, int] | None = None


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
        grid: tuple[int, int] | None = None,
    ) -> None:
        self.capture = capture
        self.equation = equation
        self.query = query
        self.key = key
        self.patch_size = patch_size
        self.transpose = transpose
        self.grid = grid

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> _Map:
        masks = _masks(module, output)
        logits = output.get("dots")
        if not isinstance(logits, Tensor):
            logits = self._recompute(module)
            logits = logits.transpose(1, 2) if self.transpose else logits
        grid = self.grid if self.grid is not None and self.grid[0] * self.grid[1] == logits.shape[-1] else None
        return _Map(_like(logits, masks, module), masks, self.patch_size, grid)

    def _recompute(self, module: Any) -> Tensor:
        require_projections(self.capture, module, self.query, self.key)
        query: Projection = self.capture[self.query][-1]
        key: Projection = self.capture[self.key][-1]
        with query.precision():
            return torch.einsum(self.equation, query.value, key.value) * module.scale


class _Returned:
    """Logits that a decoder returns as ``dots`` beside its masks."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> _Map:
        masks = _masks(module, output)
        logits = output.get("dots")
        if not isinstance(logits, Tensor):
            raise HostError(
                f"Expected {type(module).__name__} to return a dict with a tensor 'dots', as its "
                f"`returns_logits` says, but got keys {', '.join(map(str, output))}."
            )
        return _Map(_like(logits, masks, module), masks)


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


def _warn_of_own_losses(host: nn.Module) -> None:
    losses = getattr(host, "loss_fns", None)
    found = [name for name in _OWN_LOSSES if isinstance(losses, nn.ModuleDict) and name in losses]
    if found:
        warnings.warn(
            f"{type(host).__name__} has SSync's losses itself ({', '.join(found)}), so they would count twice. Give "
            "them weight 0 in the host's `loss_weights`.",
            stacklevel=2,
        )


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


def _stated_grid(host: nn.Module) -> tuple[int, int] | None:
    """The grid that a host states itself: cached features come without frames that it could follow from."""
    grid = getattr(host, "grid", None)
    if isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(side, int) for side in grid):
        return grid[0], grid[1]
    return None


def _patch_size(host: nn.Module) -> tuple[int, int] | None:
    """Stride of the first convolution of the encoder whose kernels do not overlap: the patch embedding of a ViT."""
    encoder = _find(host, "encoder")
    for module in encoder.modules() if encoder is not None else ():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride and max(module.stride) > 1:
            return int(module.stride[0]), int(module.stride[1])
    return None
