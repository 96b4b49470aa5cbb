"""Predictors: slots of one frame to the first guess for the next."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ssync_pl.errors import ConfigError

__all__ = ["TransformerBlock", "TransformerPredictor"]


class TransformerBlock(nn.Module):
    """Self-attention among slots, then an MLP, each residual and with the normalisation first.

    Args:
        dim: size of a slot.
        heads: attention heads; must divide `dim`.
        mlp_hidden: hidden size of the MLP.

    Raises:
        ConfigError: `heads` does not divide `dim`.

    Example:
        >>> TransformerBlock(16, heads=4, mlp_hidden=32)(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, heads: int = 4, mlp_hidden: int = 256) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ConfigError(
                f"Expected argument `heads` to divide the slot size {dim}, but got {heads}. Use 1, 2 or 4 heads."
            )
        self.heads = heads
        self.norm_attention = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, mlp_hidden), nn.ReLU(), nn.Linear(mlp_hidden, dim))

    def forward(self, slots: Tensor) -> Tensor:
        """Let slots interact.

        Args:
            slots: `(B, S, D)`.

        Returns:
            `(B, S, D)`.
        """
        qkv = rearrange(self.to_qkv(self.norm_attention(slots)), "b s (i h d) -> i b h s d", i=3, h=self.heads)
        mixed = scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        slots = slots + self.output(rearrange(mixed, "b h s d -> b s (h d)"))
        return slots + self.mlp(slots)


class TransformerPredictor(nn.Module):
    """A stack of `TransformerBlock`: how slots move from frame to frame (SAVi, Kipf et al. 2022, section 2.3).

    Args:
        dim: size of a slot.
        blocks: number of blocks; 0 passes slots on unchanged.
        heads: attention heads.
        mlp_hidden: hidden size of the MLPs.

    Raises:
        ConfigError: `blocks` is negative or `heads` does not divide `dim`.

    Example:
        >>> TransformerPredictor(16, blocks=1)(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, blocks: int = 1, heads: int = 4, mlp_hidden: int = 256) -> None:
        super().__init__()
        if blocks < 0:
            raise ConfigError(f"Expected argument `blocks` to be at least 0, but got {blocks}. Use 0 for none.")
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads, mlp_hidden) for _ in range(blocks)))

    def forward(self, slots: Tensor) -> Tensor:
        """Predict the next frame's slots.

        Args:
            slots: `(B, S, D)`.

        Returns:
            `(B, S, D)`.
        """
        return torch.as_tensor(self.blocks(slots))
