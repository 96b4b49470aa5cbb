"""Small layers that encoders, slot attention and decoders share: MLP, position embeddings, initial weights."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ssync_pl.errors import require


class PatchFeatures(NamedTuple):
    """Features `(M, N, D)` of M frames, N = h * w patches row by row, and their grid `(h, w)`."""

    features: Tensor
    grid: tuple[int, int]


class MLP(nn.Module):
    """Linear layers with ReLU between them, named as in the VideoSAUR family; biases start at zero."""

    def __init__(
        self,
        input_dim: int,
        hidden: Sequence[int],
        output_dim: int,
        *,
        layer_norm: bool = False,
        activate_output: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(input_dim)] if layer_norm else []
        for width, following in pairwise([input_dim, *hidden, output_dim]):
            linear = nn.Linear(width, following)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
        self.layers = nn.Sequential(*(layers if activate_output else layers[:-1]))

    def forward(self, inputs: Tensor) -> Tensor:
        """Transform the last axis."""
        return torch.as_tensor(self.layers(inputs))


def has_hooks(module: nn.Module) -> bool:
    """Whether a linear layer has hooks (pruning, weight norm): it has to be called, as its weight may be stale."""
    layers = (part for part in module.modules() if isinstance(part, nn.Linear))
    return any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)


class SoftPositionEmbedding(nn.Module):
    """Adds a learned linear map of the coordinates to a feature map (Locatello et al. 2020, appendix E.2).

    With `scale` below 1 the content of the image weighs more than the place, which keeps small hosts from settling on
    fixed regions.
    """

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        require(scale >= 0, "argument `position_scale` to be at least 0", scale, advice="Use 0 for none.")
        self.scale = scale
        self.projection = nn.Linear(4, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Add the embedding to a map `(B, C, H, W)`."""
        # Coordinates (y, x, 1 - y, 1 - x) in [0, 1]; one row or column sits at 0, as `linspace` puts it.
        axes = [torch.linspace(0.0, 1.0, size, device=features.device) for size in features.shape[-2:]]
        yx = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        embedding = self.projection(torch.cat([yx, 1.0 - yx], dim=-1).to(self.projection.weight.dtype))
        return features + self.scale * rearrange(embedding, "h w c -> c h w")


class PatchPosition(nn.Module):
    """A learned linear map of where each patch lies, without bias; it starts with variance `scale ** 2` per channel.

    With a `fourier_code` of the places, the mean of a slot's patches tells their shape.
    """

    coordinates: Tensor

    def __init__(self, coordinates: Tensor, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim, coordinates.shape[1]) * coordinates.shape[1] ** -0.5)
        self.register_buffer("coordinates", coordinates, persistent=False)

    def forward(self) -> Tensor:
        """Embed the places of the patches, row by row, to `(N, dim)`."""
        return self.scale * nn.functional.linear(self.coordinates, self.weight)


def unit_grid(grid: tuple[int, int]) -> Tensor:
    """Row and column of each cell `(h * w, 2)`, row by row, each from -1 to 1."""
    return torch.cartesian_prod(*(torch.linspace(-1.0, 1.0, size) for size in grid))


def random_windows(features: Tensor, grid: tuple[int, int], least: float) -> Tensor:
    """Show clips `(B, T, N, C)` through windows of `least` to 1 of the grid's sides, half of them mirrored."""
    draws = torch.rand(4, len(features), device=features.device)
    zoom = least + (1.0 - least) * draws[0]
    across = torch.where(draws[3] < 0.5, zoom, -zoom)
    shift = (1.0 - zoom) * (2.0 * draws[1:3] - 1.0)
    windows = torch.stack([across, 0 * zoom, shift[0], 0 * zoom, zoom, shift[1]], dim=1).view(-1, 2, 3)
    maps = rearrange(features, "b t (h w) c -> b (t c) h w", h=grid[0])
    places = nn.functional.affine_grid(windows, [*maps.shape], align_corners=False)
    seen = nn.functional.grid_sample(maps, places, padding_mode="border", align_corners=False)
    return rearrange(seen, "b (t c) h w -> b t (h w) c", t=features.shape[1])


def fourier_code(grid: tuple[int, int], bands: int, decay: float = 0.0) -> Tensor:
    """Cosines and sines `(N, K)` of plane waves over a grid, of mean square about 1.

    The shortest has `bands / 2` periods on the longer side. Each weighs 1 over its frequency to the power of `decay`.
    """
    require(bands >= 1, "argument `fourier_bands` to be at least 1", bands, advice="Use 6.")
    axes = [(torch.arange(size) + 0.5) / max(grid) for size in grid]
    half = torch.cartesian_prod(torch.arange(bands + 1), torch.arange(-bands, bands + 1))
    waves = half[(half.square().sum(1) <= bands**2) & ((half[:, 0] > 0) | (half[:, 1] > 0))].float()
    phases = math.pi * torch.cartesian_prod(*axes) @ waves.mT
    weights = nn.functional.normalize(waves.norm(dim=1) ** -decay, dim=0) * math.sqrt(2 * len(waves))
    return torch.cat([weights * phases.cos(), weights * phases.sin()], dim=-1)


@torch.no_grad()
def init_fan_in_(stack: nn.Module) -> None:
    """Scale every layer of a stack so that activations keep their variance from input to output.

    Weights become Gaussian, `sqrt(2 / fan)` wide, the last `sqrt(1 / fan)`, biases zero (He et al. 2015). PyTorch's
    default shrinks the signal, so that the position embedding at the end drowns the image.
    """
    layers = [m for m in stack.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    for index, layer in enumerate(layers):
        gain = 1.0 if index == len(layers) - 1 else 2.0
        nn.init.normal_(layer.weight, std=math.sqrt(gain / _fan(layer)))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _fan(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> float:
    if isinstance(layer, nn.Linear):
        return float(layer.in_features)
    fan = layer.in_channels * math.prod(layer.kernel_size) / layer.groups
    # With stride s an output pixel of a transposed convolution sees only k^2 / s^2 taps.
    return fan / math.prod(layer.stride) if isinstance(layer, nn.ConvTranspose2d) else fan
