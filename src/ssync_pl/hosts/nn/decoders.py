"""Decoders: slots to frames and object masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.encoders import check_stack
from ssync_pl.hosts.nn.position import SoftPositionEmbedding
from ssync_pl.hosts.nn.weights import init_fan_in_

__all__ = ["DecoderOutput", "SpatialBroadcastDecoder"]


class DecoderOutput(NamedTuple):
    """What a decoder returns.

    Args:
        reconstruction: `(B, T, C, h, w)`, the slots' pictures mixed by the masks.
        mask_logits: float32 `(B, T, S, h, w)`, before the softmax over slots.

    Example:
        >>> DecoderOutput(torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 5, 4, 4)).mask_logits.shape
        torch.Size([1, 2, 5, 4, 4])
    """

    reconstruction: Tensor
    mask_logits: Tensor


class SpatialBroadcastDecoder(nn.Module):
    """Copies each slot over a small grid and grows it to a picture and a mask (Watters et al. 2019; SAVi A.4).

    Args:
        slot_dim: size D of a slot.
        channels: output channels of each transposed convolution.
        strides: stride of each transposed convolution; the output has `broadcast_size * prod(strides)` pixels a side.
        broadcast_size: `(h, w)` of the grid that slots are copied to.
        kernel_size: odd size of every kernel.
        out_channels: channels of the reconstruction.
        init: `"default"` or `"fan_in"`, as in `ConvEncoder`; the latter also draws the position embedding's weights
            from a Gaussian.
        position_std: standard deviation of that Gaussian; `init="default"` does not draw from it.

    Raises:
        ConfigError: the lists differ in length or are empty, the kernel is even, or the grid is empty.

    Example:
        >>> decoder = SpatialBroadcastDecoder(16, channels=[8], strides=[2], broadcast_size=(4, 4))
        >>> out = decoder(torch.randn(2, 3, 5, 16))
        >>> out.reconstruction.shape, out.mask_logits.shape
        (torch.Size([2, 3, 3, 8, 8]), torch.Size([2, 3, 5, 8, 8]))
    """

    rows_taps: Tensor
    columns_taps: Tensor

    def __init__(
        self,
        slot_dim: int,
        channels: Sequence[int] = (64, 64, 64, 64),
        strides: Sequence[int] = (2, 2, 2, 1),
        broadcast_size: tuple[int, int] = (8, 8),
        kernel_size: int = 5,
        out_channels: int = 3,
        init: Literal["default", "fan_in"] = "default",
        position_std: float = 1.0,
    ) -> None:
        super().__init__()
        check_stack("decoder", channels, strides, kernel_size, init)
        if position_std < 0:
            raise ConfigError(f"Expected argument `position_std` to be at least 0, but got {position_std}. Use 1.")
        if len(broadcast_size) != 2 or min(broadcast_size) < 1:
            raise ConfigError(
                f"Expected argument `broadcast_size` to be two positive integers, but got {broadcast_size}. Use [8, 8]."
            )
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
        layers.append(nn.Conv2d(previous, out_channels + 1, 1))
        self.layers = nn.Sequential(*layers)
        if init == "fan_in":
            init_fan_in_(self.layers)
            # Coordinates span [0, 1] only: with the default weights, slots look alike at every place for long.
            nn.init.normal_(self.position.projection.weight, std=position_std)
        for axis, length in zip(("rows", "columns"), self.broadcast_size, strict=True):
            self.register_buffer(f"{axis}_taps", _taps(length, strides[0], kernel_size), persistent=False)

    def forward(self, slots: Tensor) -> DecoderOutput:
        """Decode the slots of all frames at once.

        Args:
            slots: `(B, T, S, D)`.

        Returns:
            Reconstruction and mask logits at `self.size`.

        Raises:
            ShapeError: `slots` is not 4-D.
        """
        if slots.ndim != 4:
            raise ShapeError(
                f"Expected argument `slots` to be (B, T, S, D), but got {tuple(slots.shape)}. Use T = 1 for images."
            )
        maps = self.layers[1:](self._first_layer(slots.flatten(0, 2)))
        maps = rearrange(maps, "(b t s) c h w -> b t s c h w", b=slots.shape[0], t=slots.shape[1])
        pictures, mask_logits = maps[:, :, :, :-1], maps[:, :, :, -1].float()
        masks = mask_logits.softmax(dim=2).to(pictures.dtype)
        return DecoderOutput(torch.einsum("btschw,btshw->btchw", pictures, masks), mask_logits)

    def _first_layer(self, slots: Tensor) -> Tensor:
        """Convolve the broadcast slots `(M, D)` to `(M, C, H, W)`.

        The layer is linear, and a slot is the same everywhere: its share is one matrix an output pixel, the sum of the
        kernel taps that fall inside the grid, and the position's share is the same for every slot. Same result, with a
        multiple fewer operations than convolving every copy.
        """
        layer = self.layers[0]
        taps = torch.einsum("dckl,yk,xl->dcyx", layer.weight, self.rows_taps, self.columns_taps)
        place = layer(self.position(slots.new_zeros(1, slots.shape[-1], *self.broadcast_size)))
        return (slots @ taps.flatten(1)).unflatten(1, taps.shape[1:]) + place


def _taps(length: int, stride: int, kernel_size: int) -> Tensor:
    """Float `(length * stride, kernel_size)`: 1 where a tap of the transposed convolution meets the grid."""
    reach = torch.arange(length * stride).unsqueeze(1) + kernel_size // 2 - torch.arange(kernel_size)
    source = torch.div(reach, stride, rounding_mode="floor")
    return ((reach % stride == 0) & (source >= 0) & (source < length)).float()
