"""Temporal binding: slots of neighbouring frames inform the slots of the frame between them."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, ShapeError

__all__ = ["TemporalBinder", "frame_windows"]


def frame_windows(values: Tensor, radius: int) -> Tensor:
    """Window of neighbours around every frame of a clip; frames outside of the clip are zeros.

    Args:
        values: `(B, T, ...)`.
        radius: neighbours on either side.

    Returns:
        `(B, T, 2 * radius + 1, ...)`.

    Example:
        >>> frame_windows(torch.tensor([[1, 2, 3]]), 1).tolist()
        [[[0, 1, 2], [1, 2, 3], [2, 3, 0]]]
    """
    outside = values.new_zeros(values.shape[0], radius, *values.shape[2:])
    padded = torch.cat([outside, values, outside], dim=1)
    return padded.unfold(1, 2 * radius + 1, 1).movedim(-1, 2)


class TemporalBinder(nn.Module):
    """A transformer over the frames of a window, for each slot index by itself, read at the centre.

    Blocks are PyTorch's: normalisation after each residual sum, ReLU, hidden size four times the slot's.

    Args:
        slot_dim: D.
        window: frames of a window, odd.
        blocks: number of blocks.
        heads: attention heads; must divide D.
        dropout: in each block, in [0, 1).

    Raises:
        ConfigError: `window` is even, or `heads` does not divide `slot_dim`.

    Example:
        >>> binder = TemporalBinder(16, window=3, blocks=1, heads=2)
        >>> windows = torch.randn(2, 4, 3, 5, 16)
        >>> binder(windows, torch.ones(2, 4, 3, dtype=torch.bool)).shape
        torch.Size([2, 4, 5, 16])

    Source: Aydemir et al. 2023 (arXiv 2310.06907), section 3.2.
    """

    def __init__(
        self, slot_dim: int = 128, window: int = 5, blocks: int = 3, heads: int = 8, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if window < 1 or window % 2 == 0:
            raise ConfigError(f"Expected argument `window` to be odd and at least 1, but got {window}. Use 5 or 3.")
        if blocks < 1:
            raise ConfigError(f"Expected argument `blocks` to be at least 1, but got {blocks}. Use 3.")
        if heads < 1 or slot_dim % heads:
            raise ConfigError(f"Expected argument `heads` to divide the slot size {slot_dim}, but got {heads}. Use 8.")
        self.window = window
        self.place = nn.Parameter(0.02 * torch.randn(window, 1, slot_dim))
        block = nn.TransformerEncoderLayer(slot_dim, heads, 4 * slot_dim, dropout, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, blocks, enable_nested_tensor=False)

    def forward(self, slots: Tensor, valid: Tensor) -> Tensor:
        """Bind windows.

        Args:
            slots: `(B, P, F, S, D)`, P windows of F frames.
            valid: bool `(B, P, F)`, frames that exist; the centre counts as one in any case.

        Returns:
            `(B, P, S, D)`, slots of the frames in the centre.

        Raises:
            ShapeError: the inputs do not fit.
        """
        if slots.ndim != 5 or slots.shape[2] != self.window or valid.shape != slots.shape[:3]:
            raise ShapeError(
                f"Expected arguments `slots` and `valid` to be (B, P, {self.window}, S, D) and (B, P, {self.window}), "
                f"but got {tuple(slots.shape)} and {tuple(valid.shape)}."
            )
        centre = self.window // 2
        here = torch.arange(self.window, device=valid.device) == centre
        hidden = ~(valid | here)  # attention over nothing would be NaN
        hidden = hidden.unsqueeze(2).expand(-1, -1, slots.shape[3], -1).flatten(0, 2)
        flat = rearrange(slots + self.place, "b p f s d -> (b p s) f d")
        bound = self.blocks(flat, src_key_padding_mask=hidden)[:, centre]
        return rearrange(bound, "(b p s) d -> b p s d", b=slots.shape[0], p=slots.shape[1])
