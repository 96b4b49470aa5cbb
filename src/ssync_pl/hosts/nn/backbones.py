"""Frozen image backbones: patch features that hosts attend to and reconstruct, but never train."""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, ShapeError

__all__ = ["BackboneOutput", "FrozenBackbone", "Weights", "load_backbone", "weights_fingerprint"]

Weights = Literal["pretrained", "none"]
"""`pretrained` are the published weights, `none` random ones from a fixed seed."""


_Self = TypeVar("_Self", bound="FrozenBackbone")


class BackboneOutput(NamedTuple):
    """Features of a batch of frames.

    Attributes:
        features: (M, N, D) with M frames, N = h*w patches row by row.
        grid: h and w.

    Example:
        >>> BackboneOutput(torch.zeros(2, 6, 8), (2, 3)).grid
        (2, 3)
    """

    features: Tensor
    grid: tuple[int, int]


class FrozenBackbone(nn.Module, ABC):
    """Base of all backbones: always in evaluation mode, never with a gradient, with a normalisation of its own.

    A subclass gives `extract` and `grid_for`. Its weights stay out of `state_dict`, since they can be had again and
    would be most of a checkpoint; only their fingerprint is saved, and loading refuses another one. A `state_dict`
    that does hold them (`model.*`, as in files of the VideoSAUR family) is loaded into the backbone.

    Args:
        model: The network; it is frozen in place.
        name: Name of the architecture.
        layer: Name of the layer, or of several joined by `+`, whose features come out.
        dim: D, size of a feature.
        mean: Per-channel mean that frames in [0, 1] are normalised with.
        std: Per-channel standard deviation that frames in [0, 1] are normalised with.

    Example:
        >>> class Means(FrozenBackbone):
        ...     def grid_for(self, height, width):
        ...         return height // 4, width // 4
        ...
        ...     def extract(self, frames):
        ...         return self.model(frames).flatten(2).mT
        >>> backbone = Means(nn.AvgPool2d(4), name="means", layer="pool", dim=3, mean=[0.5] * 3, std=[0.5] * 3)
        >>> features, grid = backbone.train()(torch.zeros(2, 5, 3, 8, 12))
        >>> features.shape, grid, backbone.training
        (torch.Size([10, 6, 3]), (2, 3), False)
    """

    def __init__(
        self, model: nn.Module, *, name: str, layer: str, dim: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        for argument, values in (("mean", mean), ("std", std)):
            if len(values) != 3 or (argument == "std" and min(values) <= 0):
                raise ConfigError(f"Expected argument `{argument}` to be three numbers, std above 0, but got {values}.")
        self.model = model.requires_grad_(False)
        self.name = name
        self.layer = layer
        self.dim = dim
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        # Taken now, since a later change of precision changes the bytes but not the origin of the weights.
        self.fingerprint = weights_fingerprint(model)
        self._reloaded = False
        self.register_load_state_dict_post_hook(_after_loading)
        self.train()

    @abstractmethod
    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        """Grid of the patches for a size of frames.

        Args:
            height: Height of the frames in pixels.
            width: Width of the frames in pixels.

        Returns:
            Rows and columns.

        Raises:
            ConfigError: Frames of this size cannot be used.
        """

    @abstractmethod
    def extract(self, frames: Tensor) -> Tensor:
        """Compute features.

        Args:
            frames: (M, 3, H, W), normalised with this backbone's `mean` and `std`.

        Returns:
            (M, N, D), N in the order of `grid_for`'s rows.
        """

    @torch.no_grad()
    def forward(
        self, frames: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> BackboneOutput:
        """Compute the features of frames or clips.

        Args:
            frames: (M, 3, H, W) or (B, T, 3, H, W) float.
            mean: Mean that the frames were normalised with; `None` takes this backbone's. Other frames are
                normalised again.
            std: The same for the standard deviation.

        Returns:
            Features (M, N, D), M = B*T for clips, and the grid.

        Raises:
            ShapeError: The frames are no float RGB, or `extract` does not fit `grid_for`.
            ConfigError: Frames of this size cannot be used.
        """
        if frames.ndim not in (4, 5) or frames.shape[-3] != 3 or not frames.is_floating_point():
            raise ShapeError(
                "Expected argument `frames` to be normalised float frames (M, 3, H, W) or (B, T, 3, H, W), but got "
                f"shape {tuple(frames.shape)}, dtype {frames.dtype}."
            )
        flat = frames.flatten(0, -4) if frames.ndim == 5 else frames
        if mean is not None or std is not None:
            flat = self.renormalize(flat, self.mean if mean is None else mean, self.std if std is None else std)
        grid = self.grid_for(int(flat.shape[-2]), int(flat.shape[-1]))
        features = self.extract(flat)
        if features.shape != (len(flat), math.prod(grid), self.dim):
            raise ShapeError(
                f"Expected backbone {self.name} to give features {(len(flat), math.prod(grid), self.dim)} for the grid "
                f"{grid}, but got {tuple(features.shape)}. `extract` and `grid_for` disagree."
            )
        return BackboneOutput(features, grid)

    @property
    def layer_dims(self) -> tuple[int, ...]:
        """Channels of each layer of `layer`, in the order in which they come out; they add up to `dim`."""
        count = self.layer.count("+") + 1
        return (self.dim // count,) * count if self.dim % count == 0 else (self.dim,)

    def renormalize(self, frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Bring frames that were normalised otherwise to this backbone's normalisation.

        Args:
            frames: (..., 3, H, W) float.
            mean: Mean that they were normalised with.
            std: Standard deviation that they were normalised with.

        Returns:
            (..., 3, H, W); `frames` itself where nothing is to be done.
        """
        if self._same(mean, std):
            return frames
        scale = [theirs / ours for theirs, ours in zip(std, self.std, strict=True)]
        shift = [(theirs - ours) / unit for theirs, ours, unit in zip(mean, self.mean, self.std, strict=True)]
        return frames * frames.new_tensor(scale).view(3, 1, 1) + frames.new_tensor(shift).view(3, 1, 1)

    def require_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Refuse frames that are normalised otherwise, for callers that do not pass `mean` and `std` to `forward`.

        Args:
            mean: Mean that frames are normalised with.
            std: Standard deviation that they are normalised with.

        Raises:
            ConfigError: They differ from this backbone's.
        """
        if not self._same(mean, std):
            raise ConfigError(
                f"Expected frames normalised for backbone {self.name} (mean={list(self.mean)}, std={list(self.std)}), "
                f"but got mean={list(mean)}, std={list(std)}. Set these `mean` and `std` in the data module."
            )

    def train(self: _Self, mode: bool = True) -> _Self:
        """Stay in evaluation mode.

        Args:
            mode: Has no effect on a frozen network; hosts pass it to all of their parts.

        Returns:
            The module.
        """
        return super().train(False)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the fingerprint of the weights instead of the weights.

        Args:
            *args: Older, positional form of the other arguments, which PyTorch has given up.
            destination: Dict to fill; `None` makes one.
            prefix: Start of the name.
            keep_vars: Has no effect: nothing here carries a gradient.

        Returns:
            The dict, with one entry, `<prefix>fingerprint`: the digest as (32,) uint8.
        """
        destination = OrderedDict() if destination is None else destination
        destination[f"{prefix}fingerprint"] = torch.tensor(list(bytes.fromhex(self.fingerprint)), dtype=torch.uint8)
        return destination

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        saved = state_dict.pop(f"{prefix}fingerprint", None)
        self._reloaded = any(name.startswith(f"{prefix}model.") for name in state_dict)
        if not self._reloaded:
            # The weights at hand take the place of those that were not saved.
            state_dict.update(self.model.state_dict(prefix=f"{prefix}model."))
            if saved is None:
                missing.append(f"{prefix}fingerprint")
            elif (found := bytes(saved.tolist()).hex()) != self.fingerprint:
                errors.append(
                    f"Expected the weights of backbone {self.name} ({self.layer}) that the checkpoint was trained with "
                    f"(sha256 {found[:12]}…), but got others ({self.fingerprint[:12]}…). Build the same backbone."
                )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _same(self, mean: Sequence[float], std: Sequence[float]) -> bool:
        pairs = zip((*self.mean, *self.std), (*mean, *std), strict=True)
        return all(math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-7) for ours, theirs in pairs)


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a network's weights: names, shapes, types and bytes, sorted by name.

    Args:
        model: The network, on any device.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> weights_fingerprint(a) == weights_fingerprint(b)
        False
        >>> _ = b.load_state_dict(a.state_dict())
        >>> weights_fingerprint(a) == weights_fingerprint(b)
        True
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_backbone(
    name: str,
    layer: str | None = None,
    weights: Weights | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> FrozenBackbone:
    """Build a backbone by name.

    Args:
        name: `efficientnet_lite0` (packaged ImageNet weights, no network) or a model of timm, for example
            `vit_small_patch14_dinov2.lvd142m`.
        layer: Which features. ViTs: `vit_block<k>` (k from 1; default the last), `vit_output` (after the final norm),
            `vit_block_keys<k>` (keys of the block's attention). Convolutional nets: names of stages, for example
            `layer3`. Several are joined by `+` and concatenated, in this order; stages are brought to the finest grid
            among them (bilinear).
        weights: `pretrained` (default; timm's need the network once), or `none` for random weights from a fixed seed.
        checkpoint: File of weights instead: PyTorch (read with `weights_only=True`) or safetensors.

    Returns:
        The frozen backbone on CPU.

    Raises:
        ConfigError: The model, the layer or the file is unknown or does not fit, a package is missing, or the weights
            cannot be downloaded.

    Example:
        >>> load_backbone("efficientnet_lite0", weights="some")
        Traceback (most recent call last):
        ssync_pl.errors.ConfigError: Expected argument `weights` to be pretrained or none, but got 'some'.
    """
    if weights not in (None, "pretrained", "none"):
        raise ConfigError(f"Expected argument `weights` to be pretrained or none, but got {weights!r}.")
    if weights is not None and checkpoint is not None:
        raise ConfigError(
            f"Expected one of the arguments `weights` and `checkpoint`, but got {weights!r} and {str(checkpoint)!r}."
        )
    from ssync_pl.hosts.nn import timm_backbones

    if name == "efficientnet_lite0":
        return timm_backbones.efficientnet_lite0(layer, weights or "pretrained", checkpoint)
    return timm_backbones.timm_backbone(name, layer, weights or "pretrained", checkpoint)


def _after_loading(module: nn.Module, incompatible: Any) -> None:
    if isinstance(module, FrozenBackbone) and module._reloaded:
        module.fingerprint = weights_fingerprint(module.model)
        module._reloaded = False
