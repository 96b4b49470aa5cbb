"""Weight initialisation of convolution stacks."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["init_fan_in_"]


@torch.no_grad()
def init_fan_in_(stack: nn.Module) -> None:
    """Scale every layer of a stack so that activations keep their variance from input to output.

    Weights become Gaussian with standard deviation `sqrt(2 / fan)`, the last layer's `sqrt(1 / fan)` as no ReLU
    follows it; biases become zero (He et al. 2015). PyTorch's default shrinks the signal from layer to layer, and
    then the position embedding, added at the end, drowns the image.

    Args:
        stack: module that holds `Conv2d`, `ConvTranspose2d` or `Linear` layers in the order of the signal.

    Example:
        >>> layer = nn.Linear(400, 400)
        >>> init_fan_in_(layer)
        >>> round(layer.weight.std().item(), 2), layer.bias.abs().max().item()
        (0.05, 0.0)
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
