"""Token drop: slots see a random part of the patches (Aydemir et al. 2023, section 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, ShapeError

__all__ = ["KeptTokens", "TokenDrop"]


class KeptTokens(NamedTuple):
    """What `TokenDrop` returns.

    Args:
        tokens: `(B, T, N', C)`.
        indices: int64 `(B, T, N')`, the place of each token among the N patches, ascending.

    Example:
        >>> KeptTokens(torch.zeros(1, 1, 2, 3), torch.tensor([[[0, 3]]])).indices.tolist()
        [[[0, 3]]]
    """

    tokens: Tensor
    indices: Tensor


class TokenDrop(nn.Module):
    """Keeps a random part of each frame's tokens in training, and all of them in evaluation.

    The number that is kept is fixed, so that shapes are; which ones differs from frame to frame.

    Args:
        ratio: share of the tokens that is dropped, in [0, 1).

    Raises:
        ConfigError: `ratio` is out of range.

    Example:
        >>> kept = TokenDrop(0.5)(torch.randn(2, 3, 8, 4))
        >>> kept.tokens.shape, kept.indices.shape
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 3, 4]))
        >>> TokenDrop(0.5).eval()(torch.randn(2, 3, 8, 4)).tokens.shape
        torch.Size([2, 3, 8, 4])
    """

    def __init__(self, ratio: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= ratio < 1.0:
            raise ConfigError(f"Expected argument `ratio` to be in [0, 1), but got {ratio}. Use 0.5, or 0 for none.")
        self.ratio = ratio

    def forward(self, tokens: Tensor) -> KeptTokens:
        """Drop tokens.

        Args:
            tokens: `(B, T, N, C)`.

        Returns:
            What is left, with its places.

        Raises:
            ShapeError: `tokens` is not 4-D.
        """
        if tokens.ndim != 4:
            raise ShapeError(f"Expected argument `tokens` to be (B, T, N, C), but got {tuple(tokens.shape)}.")
        videos, frames, patches, channels = tokens.shape
        if not self.training or self.ratio == 0.0:
            places = torch.arange(patches, device=tokens.device)
            return KeptTokens(tokens, places.expand(videos, frames, patches))
        keep = max(1, int(patches * (1.0 - self.ratio)))
        order = torch.rand(videos, frames, patches, device=tokens.device)
        indices = order.topk(keep, dim=-1).indices.sort(dim=-1).values
        return KeptTokens(tokens.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, channels)), indices)
