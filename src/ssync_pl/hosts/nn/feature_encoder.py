"""Frozen features of frames, computed or taken from a cache, and what slots attend to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.backbones import FrozenBackbone, Weights, load_backbone
from ssync_pl.hosts.nn.mlp import MLP
from ssync_pl.hosts.nn.position import PatchPosition

__all__ = ["FeatureEncoder", "build_feature_encoder"]


class FeatureEncoder(nn.Module):
    """Patch features of a frozen backbone, and their projection for slot attention.

    The backbone's leading `feature_dim` channels are the features that slots attend to and that hosts reconstruct;
    further channels, if there are any, serve the similarity loss (a ViT's keys).

    Args:
        backbone: the backbone, or None where features come from a cache.
        feature_dim: channels D of the features.
        similarity_dim: channels K behind them; 0 where the features themselves serve the similarity loss.
        grid: rows and columns of the patches.
        slot_dim: channels C after the projection.
        hidden: hidden size of the projection, a normalised two-layer MLP; 0 for no projection, with C = D.
        position: scale of a learned position embedding that is added inside the projection, before its ReLU; 0 for
            none, without a parameter.

    Attributes:
        frame_mean: per-channel mean that frames are normalised with; None is the backbone's own.
        frame_std: the same for the standard deviation.

    Raises:
        ConfigError: The backbone has other channels, or a size is out of range.

    Example:
        >>> encoder = FeatureEncoder(None, feature_dim=8, similarity_dim=0, grid=(2, 3), slot_dim=16, hidden=16)
        >>> {name: tuple(value.shape) for name, value in encoder(torch.randn(4, 6, 8)).items()}
        {'features': (4, 6, 16), 'backbone_features': (4, 6, 8), 'similarity_features': (4, 6, 8)}
    """

    def __init__(
        self,
        backbone: FrozenBackbone | None,
        feature_dim: int,
        similarity_dim: int,
        grid: tuple[int, int],
        slot_dim: int,
        hidden: int,
        position: float = 0.0,
    ) -> None:
        super().__init__()
        if feature_dim < 1 or similarity_dim < 0 or hidden < 0 or len(grid) != 2 or min(grid) < 1:
            raise ConfigError(
                "Expected `feature_dim` to be at least 1, `similarity_dim` and `encoder_hidden` to be at least 0, and "
                f"`grid` to be rows and columns, but got {feature_dim}, {similarity_dim}, {hidden} and {grid}."
            )
        if position < 0 or (position > 0 and hidden == 0):
            raise ConfigError(
                "Expected argument `encoder_position` to be at least 0, and above 0 only with `encoder_hidden` above "
                f"0, inside which positions are added, but got {position} and {hidden}. Try 0.5 and 128."
            )
        if backbone is not None and backbone.dim != feature_dim + similarity_dim:
            raise ConfigError(
                f"Expected `feature_dim` and `similarity_dim` to add up to the {backbone.dim} channels of backbone "
                f"{backbone.name} ({backbone.layer}), but got {feature_dim} and {similarity_dim}. Leave them out."
            )
        self.feature_dim = feature_dim
        self.similarity_dim = similarity_dim
        self.grid = (int(grid[0]), int(grid[1]))
        self.output_dim = slot_dim if hidden else feature_dim
        self.frame_mean: Sequence[float] | None = None
        self.frame_std: Sequence[float] | None = None
        self.backbone = backbone
        self.output_transform = MLP(feature_dim, [hidden], slot_dim, layer_norm=True) if hidden else None
        self.position = PatchPosition(self.grid, hidden, position) if position else None

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Encode frames, or project features that are there already.

        Args:
            inputs: frames `(M, 3, H, W)`, normalised; or the backbone's features `(M, N, D + K)`.

        Returns:
            `features` `(M, N, C)`; without gradient `backbone_features` `(M, N, D)` and `similarity_features`
            `(M, N, K)`, where K = D when the features serve both ends.

        Raises:
            ShapeError: The patches are not on the grid, or the channels are others.
            ConfigError: Frames came and there is no backbone.
        """
        raw = inputs.detach() if inputs.ndim == 3 else self._extract(inputs)
        if raw.shape[1] != math.prod(self.grid):
            raise ShapeError(
                f"Expected features of {self.grid[0]} x {self.grid[1]} patches, but got {raw.shape[1]} patches. Set "
                "`grid` of the model to the rows and columns of the features."
            )
        if raw.shape[2] != self.feature_dim + self.similarity_dim:
            raise ShapeError(
                f"Expected features of {self.feature_dim} + {self.similarity_dim} channels (`feature_dim` + "
                f"`similarity_dim`), but got {raw.shape[2]}. Set them to those of the cached features."
            )
        main = raw[..., : self.feature_dim]
        return {
            "features": self._project(main),
            "backbone_features": main,
            "similarity_features": raw[..., self.feature_dim :] if self.similarity_dim else main,
        }

    def _project(self, features: Tensor) -> Tensor:
        if self.output_transform is None:
            return features
        shift = None if self.position is None else self.position()
        return torch.as_tensor(self.output_transform(features, shift))

    def _extract(self, frames: Tensor) -> Tensor:
        if self.backbone is None:
            raise ConfigError(
                "Expected cached `features` in the batch, as this model has no backbone, but got frames. Set "
                "`features` in the data module, or name a `backbone`."
            )
        features, grid = self.backbone(frames, self.frame_mean, self.frame_std)
        if tuple(grid) != self.grid:
            raise ShapeError(
                f"Expected frames that backbone {self.backbone.name} cuts into {self.grid[0]} x {self.grid[1]} patches "
                f"(`grid`), but {frames.shape[-2]} x {frames.shape[-1]} pixels give {grid[0]} x {grid[1]}. Set `grid` "
                f"of the model to [{grid[0]}, {grid[1]}], or change `image_size` of the data module."
            )
        return torch.as_tensor(features)


def build_feature_encoder(
    *,
    backbone: str | None,
    layer: str | None,
    similarity_layer: str | None,
    weights: Weights,
    checkpoint: str | None,
    feature_dim: int | None,
    similarity_dim: int | None,
    grid: tuple[int, int],
    slot_dim: int,
    hidden: int | None,
    position: float = 0.0,
) -> FeatureEncoder:
    """Build an encoder from a host's options.

    Args:
        backbone: name for `load_backbone`, or None where features come from a cache.
        layer: layer of the features.
        similarity_layer: further layer for the similarity loss; None takes the features.
        weights: weights of the backbone.
        checkpoint: file of weights instead.
        feature_dim: channels of cached features; None takes the backbone's.
        similarity_dim: further channels of cached features.
        grid: rows and columns of the patches.
        slot_dim: size of a slot.
        hidden: hidden size of the projection; None for twice the features' channels, 0 for none.
        position: scale of the position embedding inside the projection; 0 for none.

    Returns:
        The encoder.

    Raises:
        ConfigError: Options contradict each other, or the backbone cannot be built.

    Example:
        >>> encoder = build_feature_encoder(backbone=None, layer=None, similarity_layer=None, weights="pretrained",
        ...     checkpoint=None, feature_dim=8, similarity_dim=None, grid=(2, 3), slot_dim=16, hidden=None)
        >>> encoder.output_transform.layers[1].weight.shape
        torch.Size([16, 8])
    """
    network: FrozenBackbone | None = None
    if backbone is not None:
        if similarity_layer is not None and layer is None:
            raise ConfigError(
                f"Expected argument `layer` to be set beside similarity_layer={similarity_layer!r}, but got None. "
                "Name both, for example vit_block12 and vit_block_keys12."
            )
        if feature_dim is not None or similarity_dim is not None:
            raise ConfigError(
                f"Expected arguments `feature_dim` and `similarity_dim` only without a backbone, but got "
                f"{feature_dim} and {similarity_dim} beside backbone={backbone!r}. Leave them out."
            )
        layers = layer if similarity_layer is None else f"{layer}+{similarity_layer}"
        # A file and the name of weights exclude each other.
        network = load_backbone(backbone, layers, None if checkpoint is not None else weights, checkpoint)
        sizes = network.layer_dims
        count = len(sizes) if similarity_layer is None or layer is None else len(layer.split("+"))
        feature_dim, similarity_dim = sum(sizes[:count]), sum(sizes[count:])
    elif feature_dim is None:
        raise ConfigError(
            "Expected argument `feature_dim` to be the channels of the cached features when there is no backbone, but "
            "got None. `recipe` of the cache says it, or name a `backbone`."
        )
    elif layer is not None or similarity_layer is not None or checkpoint is not None:
        raise ConfigError(
            "Expected arguments `layer`, `similarity_layer` and `backbone_checkpoint` only with a backbone, but got "
            f"{layer!r}, {similarity_layer!r} and {checkpoint!r}. A cache is made of layers already: say "
            "`similarity_dim` where it holds further channels."
        )
    hidden = 2 * feature_dim if hidden is None else hidden
    return FeatureEncoder(network, feature_dim, similarity_dim or 0, grid, slot_dim, hidden, position)
