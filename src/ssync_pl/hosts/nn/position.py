"""Position embeddings that are added to feature maps or patches."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from ssync_pl.errors import ConfigError

__all__ = ["PatchPosition", "SoftPositionEmbedding", "coordinate_grid"]


def coordinate_grid(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Coordinates of a feature map and their complements: top, left, bottom, right, each in [0, 1].

    Args:
        height: rows of the map, at least 1.
        width: columns of the map, at least 1.
        device: where to build it.

    Returns:
        Float tensor `(height, width, 4)`: `(y, x, 1 - y, 1 - x)`.

    Example:
        >>> coordinate_grid(2, 2)[0, 1].tolist()
        [0.0, 1.0, 1.0, 0.0]
    """
    # One row or column sits at 0, as `linspace` puts it.
    y = torch.linspace(0.0, 1.0, height, device=device)
    x = torch.linspace(0.0, 1.0, width, device=device)
    yx = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)
    return torch.cat([yx, 1.0 - yx], dim=-1)


class SoftPositionEmbedding(nn.Module):
    """Adds a learned linear map of the coordinates to a feature map (Locatello et al. 2020, appendix E.2).

    Args:
        dim: channels of the map.
        scale: factor on the embedding, at least 0. Below 1 the content of the image weighs more than the place,
            which keeps small hosts from settling on fixed regions.

    Raises:
        ConfigError: `scale` is negative.

    Example:
        >>> SoftPositionEmbedding(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        if scale < 0:
            raise ConfigError(f"Expected argument `scale` to be at least 0, but got {scale}. Use 0 to switch it off.")
        self.scale = scale
        self.projection = nn.Linear(4, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Add the embedding.

        Args:
            features: map `(B, C, H, W)`.

        Returns:
            Map of the same shape.
        """
        grid = coordinate_grid(features.shape[-2], features.shape[-1], device=features.device)
        embedding = self.projection(grid.to(self.projection.weight.dtype))
        return features + self.scale * rearrange(embedding, "h w c -> c h w")


class PatchPosition(nn.Module):
    """A learned linear map of where each patch lies, without bias.

    Rows and columns run over [-1, 1] times `sqrt(3)`, so that each has about variance 1, and the weights start
    Gaussian with variance 1 over the number of coordinates: the embedding starts with about variance `scale ** 2` a
    channel, whatever the grid.

    Args:
        grid: rows and columns of the patches.
        dim: channels of the embedding.
        scale: factor on the embedding, above 0.

    Raises:
        ConfigError: `scale` is not above 0.

    Example:
        >>> PatchPosition((2, 3), 16, scale=0.5)().shape
        torch.Size([6, 16])
    """

    coordinates: Tensor

    def __init__(self, grid: tuple[int, int], dim: int, scale: float = 1.0) -> None:
        super().__init__()
        if scale <= 0:
            raise ConfigError(f"Expected argument `scale` to be above 0, but got {scale}. Use 0.5.")
        axes = [torch.linspace(-1.0, 1.0, size) for size in grid]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1) * math.sqrt(3.0)
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim, coordinates.shape[-1]) * coordinates.shape[-1] ** -0.5)
        self.register_buffer("coordinates", coordinates, persistent=False)

    def forward(self) -> Tensor:
        """Embed the places of the patches.

        Returns:
            `(N, dim)`, patches row by row.
        """
        return self.scale * nn.functional.linear(self.coordinates, self.weight)
