"""SAVi's encoder and decoder: frames to patch features, and slots to frames and object masks."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ssync_pl.errors import choose, require, require_shape
from ssync_pl.hosts.nn.layers import PatchFeatures, SoftPositionEmbedding, init_fan_in_


class ConvEncoder(nn.Module):
    """Convolutions, a soft position embedding and an MLP per patch (SAVi, Kipf et al. 2022, appendix A.4).

    Arguments are those of `SAVi` that start with `encoder_`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        feature_dim: int = 32,
        kernel_size: int = 5,
        mlp_hidden: int = 64,
        position_scale: float = 1.0,
        init: Literal["default", "fan_in"] = "default",
    ) -> None:
        super().__init__()
        _check_stack("encoder", channels, strides, kernel_size, init)
        layers: list[nn.Module] = []
        previous = 3
        for width, stride in zip(channels, strides, strict=True):
            layers += [nn.Conv2d(previous, width, kernel_size, stride, kernel_size // 2), nn.ReLU()]
            previous = width
        # The position is added to signed features, so the last layer has no ReLU.
        self.convolutions = nn.Sequential(*layers[:-1])
        if init == "fan_in":
            init_fan_in_(self.convolutions)
        self.position = SoftPositionEmbedding(previous, position_scale)
        self.mlp = nn.Sequential(
            nn.LayerNorm(previous), nn.Linear(previous, mlp_hidden), nn.ReLU(), nn.Linear(mlp_hidden, feature_dim)
        )

    def forward(self, frames: Tensor) -> PatchFeatures:
        """Encode normalised frames `(B, 3, H, W)`."""
        maps = self.position(self.convolutions(frames))
        return PatchFeatures(self.mlp(rearrange(maps, "b c h w -> b (h w) c")), (maps.shape[-2], maps.shape[-1]))


class DecoderOutput(NamedTuple):
    """What is mixed by the masks, and the masks' logits in at least float32.

    Of pixels: `(B, T, 3, h, w)` and `(B, T, S, h, w)`; of features: `(B, T, N, C)` and `(B, T, S, N)`.
    """

    reconstruction: Tensor
    mask_logits: Tensor


class SpatialBroadcastDecoder(nn.Module):
    """Copies each slot over a small grid and grows it to a picture and a mask (Watters et al. 2019; SAVi A.4).

    Arguments are those of `SAVi` that start with `decoder_`.
    """

    def __init__(
        self,
        slot_dim: int,
        channels: Sequence[int],
        strides: Sequence[int],
        broadcast_size: tuple[int, int] = (8, 8),
        kernel_size: int = 5,
        init: Literal["default", "fan_in"] = "default",
        position_std: float = 1.0,
    ) -> None:
        super().__init__()
        _check_stack("decoder", channels, strides, kernel_size, init)
        grid = len(broadcast_size) == 2 and min(broadcast_size) >= 1
        require(grid, "argument `decoder_broadcast` to be two positive integers", broadcast_size, advice="Use [8, 8].")
        require(position_std >= 0, "argument `decoder_position_std` to be at least 0", position_std)
        self.broadcast_size = (broadcast_size[0], broadcast_size[1])
        growth = math.prod(strides)
        self.size = (broadcast_size[0] * growth, broadcast_size[1] * growth)
        self.position = SoftPositionEmbedding(slot_dim)
        layers: list[nn.Module] = []
        previous = slot_dim
        for width, stride in zip(channels, strides, strict=True):
            # This padding makes the output exactly `stride` times the input.
            layer = nn.ConvTranspose2d(previous, width, kernel_size, stride, kernel_size // 2, stride - 1)
            layers += [layer, nn.ReLU()]
            previous = width
        layers.append(nn.Conv2d(previous, 4, 1))
        self.layers = nn.Sequential(*layers)
        if init == "fan_in":
            init_fan_in_(self.layers)
            # Coordinates span [0, 1] only: with the default weights, slots look alike at every place for long.
            nn.init.normal_(self.position.projection.weight, std=position_std)

    def forward(self, slots: Tensor) -> DecoderOutput:
        """Decode the slots `(B, T, S, D)` of all frames at once."""
        require_shape(slots.ndim == 4, "argument `slots` to be (B, T, S, D)", slots, advice="Use T = 1 for images.")
        copies = slots.flatten(0, 2)[:, :, None, None].expand(-1, -1, *self.broadcast_size)
        maps = self.layers(self.position(copies))
        maps = rearrange(maps, "(b t s) c h w -> b t s c h w", b=slots.shape[0], t=slots.shape[1])
        pictures, mask_logits = maps[:, :, :, :-1], maps[:, :, :, -1].float()
        masks = mask_logits.softmax(dim=2).to(pictures.dtype)
        return DecoderOutput(torch.einsum("btschw,btshw->btchw", pictures, masks), mask_logits)


def _check_stack(name: str, channels: Sequence[int], strides: Sequence[int], kernel_size: int, init: str) -> None:
    expected = f"arguments `{name}_channels` and `{name}_strides` to be equally long lists of positive integers"
    fits = 0 < len(channels) == len(strides) and min(*channels, *strides) >= 1
    require(fits, expected, list(channels), list(strides), advice="Give one entry per layer to each.")
    require(kernel_size % 2 == 1, f"argument `{name}_kernel` to be odd", kernel_size, advice="Use 3 or 5.")
    choose("init", init, "default", "fan_in")
