"""Frozen features of frames, computed or taken from a cache, and what slots attend to."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, ShapeError, require
from ssync_pl.hosts.nn.backbones import FrozenBackbone, Weights, load_backbone
from ssync_pl.hosts.nn.layers import MLP, PatchPosition, fourier_code, unit_grid


class FeatureEncoder(nn.Module):
    """Patch features of a frozen backbone, and their projection for slot attention.

    The leading `feature_dim` channels are the features that slots attend to and that hosts reconstruct; further
    channels, if there are any, serve the similarity loss (a ViT's keys). Arguments are those of `FeatureHost`; the
    projection to `slot_dim` channels is a normalised two-layer MLP with the hidden size `encoder_hidden`.
    """

    def __init__(
        self,
        *,
        backbone: str | None,
        layer: str | None,
        similarity_layer: str | None = None,
        weights: Weights = "pretrained",
        checkpoint: str | None = None,
        renormalize: bool = True,
        feature_dim: int | None = None,
        similarity_dim: int | None = None,
        grid: tuple[int, int],
        slot_dim: int,
        hidden: int | None = None,
        position: float = 0.0,
        bands: int = 0,
        decay: float = 0.0,
    ) -> None:
        super().__init__()
        network: FrozenBackbone | None = None
        if backbone is not None:
            cached = feature_dim is not None or similarity_dim is not None
            expected = "`feature_dim` and `similarity_dim` only without a backbone"
            require(not cached, expected, feature_dim, similarity_dim)
            named = similarity_layer is None or layer is not None
            require(named, "argument `layer` to be named where `similarity_layer` is", similarity_layer)
            layers = layer if similarity_layer is None else f"{layer}+{similarity_layer}"
            # A file and the name of weights exclude each other.
            network = load_backbone(backbone, layers, None if checkpoint is not None else weights, checkpoint)
            sizes = network.layer_dims
            count = len(sizes) if similarity_layer is None or layer is None else len(layer.split("+"))
            feature_dim, similarity_dim = sum(sizes[:count]), sum(sizes[count:])
        else:
            of_backbone = (layer, similarity_layer, checkpoint)
            expected = "`layer`, `similarity_layer` and `backbone_checkpoint` only with a backbone"
            require(all(option is None for option in of_backbone), expected, *of_backbone)
        if feature_dim is None:
            raise ConfigError("Expected argument `feature_dim` or `backbone`, but got neither. Name one of them.")
        hidden = 2 * feature_dim if hidden is None else hidden
        similarity_dim = similarity_dim or 0
        require(len(grid) == 2 and min(grid) >= 1, "argument `grid` to be rows and columns", grid)
        sizes = (feature_dim, similarity_dim, hidden)
        fits = feature_dim >= 1 and min(sizes) >= 0
        require(fits, "`feature_dim` from 1, `similarity_dim` and `encoder_hidden` from 0", *sizes)
        expected = "argument `encoder_position` to be at least 0, and above 0 only with `encoder_hidden` above 0"
        require(position == 0 or (position > 0 and hidden > 0), expected, position, hidden, advice="Try 0.5 and 128.")
        self.feature_dim = feature_dim
        self.similarity_dim = similarity_dim
        self.grid = (int(grid[0]), int(grid[1]))
        self.output_dim = slot_dim if hidden else feature_dim
        self.frame_mean: Sequence[float] | None = None
        self.frame_std: Sequence[float] | None = None
        self.backbone, self.renormalize = network, renormalize
        self.output_transform = MLP(feature_dim, [hidden], slot_dim, layer_norm=True) if hidden else None
        # Times sqrt(3), rows and columns have about variance 1.
        code = fourier_code(self.grid, bands, decay) if bands else unit_grid(self.grid) * math.sqrt(3.0)
        self.position = PatchPosition(code, hidden, position) if position else None

    def take_normalization(self, data: object) -> None:
        """Take over how a data module normalises frames (`mean` and `std`), if it says so."""
        mean, std = getattr(data, "mean", None), getattr(data, "std", None)
        known = self.renormalize and mean is not None and std is not None
        self.frame_mean, self.frame_std = (mean, std) if known else (None, None)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Encode frames, or project features that are there already."""
        raw = inputs.detach() if inputs.ndim == 3 else self._extract(inputs)
        channels = self.feature_dim + self.similarity_dim
        if raw.shape[1:] != (math.prod(self.grid), channels):
            raise ShapeError(
                f"Expected features of {self.grid[0]} x {self.grid[1]} patches (`grid`) and {channels} channels "
                f"(`feature_dim` + `similarity_dim`), but got {raw.shape[1]} patches and {raw.shape[2]} channels."
            )
        projected = main = raw[..., : self.feature_dim]
        if self.output_transform is not None:
            layers = self.output_transform.layers
            hidden = layers[:2](main)
            projected = layers[2:](hidden if self.position is None else hidden + self.position())
        similarity = raw[..., self.feature_dim :] if self.similarity_dim else main
        return {"features": projected, "backbone_features": main, "similarity_features": similarity}

    def _extract(self, frames: Tensor) -> Tensor:
        if self.backbone is None:
            raise ConfigError("Expected cached `features` in the batch without a `backbone`, but got frames. Name one.")
        features, grid = self.backbone(frames, self.frame_mean, self.frame_std)
        if tuple(grid) != self.grid:
            raise ShapeError(
                f"Expected {self.grid[0]} x {self.grid[1]} patches (`grid`) of backbone {self.backbone.name}, but "
                f"{frames.shape[-2]} x {frames.shape[-1]} pixels give {grid[0]} x {grid[1]}. Set `grid` of the model "
                f"to [{grid[0]}, {grid[1]}], or change `image_size`."
            )
        return torch.as_tensor(features)
