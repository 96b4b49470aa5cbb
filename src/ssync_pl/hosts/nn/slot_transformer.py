"""Transformer of slots: predictor from frame to frame, and allocator of the slot mixer."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ssync_pl.errors import require
from ssync_pl.hosts.nn.layers import has_hooks


class _Attention(nn.Module):
    """Multi-head attention with one joint projection."""

    def __init__(self, dim: int, heads: int, published: bool) -> None:
        super().__init__()
        self.heads = heads
        # The published code divides the queries by 1 / sqrt(d) where others multiply: its weights need this scale.
        self.scale = math.sqrt(dim // heads) if published else None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        if published:
            for part in (*self.qkv.weight.data.chunk(3), self.out_proj.weight):
                nn.init.xavier_uniform_(part)
            nn.init.zeros_(self.qkv.bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(self, inputs: Tensor, memory: Tensor | None) -> Tensor:
        if memory is None:
            query, key, value = self.qkv(inputs).chunk(3, dim=-1)
        elif has_hooks(self.qkv):
            dim = inputs.shape[-1]
            query = self.qkv(inputs)[..., :dim]
            key, value = self.qkv(memory)[..., dim:].chunk(2, dim=-1)
        else:
            dim = inputs.shape[-1]
            query = F.linear(inputs, self.qkv.weight[:dim], self.qkv.bias[:dim])
            key, value = F.linear(memory, self.qkv.weight[dim:], self.qkv.bias[dim:]).chunk(2, dim=-1)
        query, key, value = (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return torch.as_tensor(self.out_proj(rearrange(mixed, "b h n d -> b n (h d)")))


class SlotTransformerBlock(nn.Module):
    """Attention to the inputs themselves or to a memory, then an MLP, each residual and with its input normalised."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int, published: bool = True) -> None:
        super().__init__()
        require(heads >= 1 and dim % heads == 0, f"the attention heads to divide the slot size {dim}", heads)
        self.self_attn = _Attention(dim, heads, published)
        self.linear1 = nn.Linear(dim, mlp_hidden)
        self.linear2 = nn.Linear(mlp_hidden, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, inputs: Tensor, memory: Tensor | None = None) -> Tensor:
        """Mix and transform inputs `(B, N, D)`, which attend to a memory `(B, M, D)` or to themselves."""
        inputs = inputs + self.self_attn(self.norm1(inputs), memory)
        return inputs + self.linear2(self.linear1(self.norm2(inputs)).relu())


class SlotTransformer(nn.Module):
    """A stack of `SlotTransformerBlock`."""

    def __init__(
        self, dim: int, blocks: int, heads: int, mlp_hidden: int | None = None, published: bool = True
    ) -> None:
        super().__init__()
        require(blocks >= 0, "the number of transformer blocks to be at least 0", blocks)
        width = 4 * dim if mlp_hidden is None else mlp_hidden
        self.blocks = nn.ModuleList(SlotTransformerBlock(dim, heads, width, published) for _ in range(blocks))

    def forward(self, inputs: Tensor, memory: Tensor | None = None) -> Tensor:
        """Run the blocks one after the other on `(B, N, D)`; every block attends to `memory`, if there is one."""
        for block in self.blocks:
            inputs = block(inputs, memory)
        return inputs
