"""Multi-layer perceptrons with the parameter names of the VideoSAUR family."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """Linear layers with ReLU between them; biases start at zero.

    Args:
        input_dim: channels in.
        hidden: channels of each hidden layer.
        output_dim: channels out.
        layer_norm: normalise the input.
        residual: add the input to the output; both need the same channels.
        activate_output: put a ReLU behind the last layer too.

    Example:
        >>> mlp = MLP(4, [8], 2, layer_norm=True)
        >>> mlp(torch.randn(3, 5, 4)).shape
        torch.Size([3, 5, 2])
        >>> [name for name, _ in mlp.named_parameters()][:3]
        ['layers.0.weight', 'layers.0.bias', 'layers.1.weight']
    """

    def __init__(
        self,
        input_dim: int,
        hidden: Sequence[int],
        output_dim: int,
        *,
        layer_norm: bool = False,
        residual: bool = False,
        activate_output: bool = False,
    ) -> None:
        super().__init__()
        self.residual = residual
        layers: list[nn.Module] = [nn.LayerNorm(input_dim)] if layer_norm else []
        widths = [input_dim, *hidden, output_dim]
        for index, (width, following) in enumerate(pairwise(widths)):
            linear = nn.Linear(width, following)
            nn.init.zeros_(linear.bias)
            layers.append(linear)
            if index < len(hidden) or activate_output:
                layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor, shift: Tensor | None = None) -> Tensor:
        """Transform the last axis.

        Args:
            inputs: `(..., input_dim)`.
            shift: added behind the first linear layer, before its ReLU; broadcasts to `(..., hidden[0])`.

        Returns:
            `(..., output_dim)`.
        """
        if shift is None:
            outputs = torch.as_tensor(self.layers(inputs))
        else:
            outputs = inputs
            for layer in self.layers:
                outputs = layer(outputs)
                if shift is not None and isinstance(layer, nn.Linear):
                    outputs, shift = outputs + shift, None
        return inputs + outputs if self.residual else outputs
