"""Frame encoders: pixels to patch features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from einops import rearrange
from torch import Tensor, nn

from ssync_pl.errors import ConfigError
from ssync_pl.hosts.nn.position import SoftPositionEmbedding
from ssync_pl.hosts.nn.weights import init_fan_in_

__all__ = ["ConvEncoder", "EncoderOutput"]


class EncoderOutput(NamedTuple):
    """What an encoder returns.

    Args:
        features: `(B, N, C)`, patches in row order.
        grid: `(H, W)` with `H * W = N`.

    Example:
        >>> import torch
        >>> EncoderOutput(torch.zeros(1, 6, 8), (2, 3)).grid
        (2, 3)
    """

    features: Tensor
    grid: tuple[int, int]


class ConvEncoder(nn.Module):
    """Convolutions, a soft position embedding and an MLP a patch (SAVi, Kipf et al. 2022, appendix A.4).

    Args:
        channels: output channels of each convolution.
        strides: stride of each convolution, as many as `channels`.
        feature_dim: channels of the features that leave the MLP.
        kernel_size: odd size of every kernel.
        mlp_hidden: hidden size of the MLP.
        position_scale: factor on the position embedding.
        init: `"default"` for PyTorch's initialisation of the convolutions, `"fan_in"` for `init_fan_in_`, with which
            small hosts learn objects instead of fixed regions.
        in_channels: channels of a frame.

    Raises:
        ConfigError: the lists differ in length or are empty, or the kernel is even.

    Example:
        >>> import torch
        >>> encoder = ConvEncoder(channels=[8, 8], strides=[2, 1], feature_dim=16)
        >>> out = encoder(torch.randn(2, 3, 16, 16))
        >>> out.features.shape, out.grid
        (torch.Size([2, 64, 16]), (8, 8))
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 32, 32, 32),
        strides: Sequence[int] = (1, 1, 1, 1),
        feature_dim: int = 32,
        kernel_size: int = 5,
        mlp_hidden: int = 64,
        position_scale: float = 1.0,
        init: Literal["default", "fan_in"] = "default",
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_stack("encoder", channels, strides, kernel_size, init)
        layers: list[nn.Module] = []
        previous = in_channels
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

    def forward(self, frames: Tensor) -> EncoderOutput:
        """Encode frames.

        Args:
            frames: `(B, 3, H, W)`, normalised.

        Returns:
            Patch features and their grid.
        """
        maps = self.position(self.convolutions(frames))
        return EncoderOutput(self.mlp(rearrange(maps, "b c h w -> b (h w) c")), (maps.shape[-2], maps.shape[-1]))


def check_stack(name: str, channels: Sequence[int], strides: Sequence[int], kernel_size: int, init: str) -> None:
    """Refuse a convolution stack that cannot be built.

    Args:
        name: prefix of the arguments in messages.
        channels: output channels a layer.
        strides: stride a layer.
        kernel_size: size of every kernel.
        init: name of the initialisation.

    Raises:
        ConfigError: the lists differ in length or are empty, the kernel is even, or `init` is unknown.

    Example:
        >>> check_stack("encoder", [8, 8], [1, 2], 5, "fan_in")
    """
    if len(channels) == 0 or len(channels) != len(strides) or min(*channels, *strides) < 1:
        raise ConfigError(
            f"Expected arguments `{name}_channels` and `{name}_strides` to be two equally long lists of positive "
            f"integers, but got {list(channels)} and {list(strides)}. Give one entry a layer to each."
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ConfigError(f"Expected argument `{name}_kernel` to be odd, but got {kernel_size}. Use 3 or 5.")
    if init not in ("default", "fan_in"):
        raise ConfigError(f"Expected argument `init` to be 'default' or 'fan_in', but got {init!r}. Choose one.")
