"""Slot attention (Locatello et al. 2020), the corrector of video hosts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, ShapeError

__all__ = ["SlotAttention", "SlotAttentionOutput"]


class SlotAttentionOutput(NamedTuple):
    """What one call of `SlotAttention` returns.

    Args:
        slots: `(B, S, D)`, after the last iteration.
        logits: float32 `(B, S, N)`, query · key · scale of the last iteration, before the softmax over slots.

    Example:
        >>> SlotAttentionOutput(torch.zeros(1, 2, 3), torch.zeros(1, 2, 9)).logits.shape
        torch.Size([1, 2, 9])
    """

    slots: Tensor
    logits: Tensor


class SlotAttention(nn.Module):
    """Slots compete for patches by a softmax over slots and move by a GRU (Locatello et al. 2020, algorithm 1).

    Slots and features are normalised before they are projected (pre-norm). The softmax runs in float32, as half
    precision ties patches between slots.

    Args:
        slot_dim: size D of a slot; queries, keys and values have it too.
        feature_dim: channels of the features; `None` for `slot_dim`.
        iterations: default number of iterations of a call, at least 1.
        mlp_hidden: hidden size of the residual MLP after the GRU; 0 leaves the MLP out.
        eps: added to the attention before it is normalised over patches, so that an empty slot stays finite.
        sharpness: standard deviation of the initial query and key weights in units of `1 / sqrt(inputs)`; None keeps
            PyTorch's uniform initialisation, whose value is 0.58. A larger one lets slots differ from the start.

    Raises:
        ConfigError: `iterations`, `eps` or `sharpness` is out of range.

    Example:
        >>> attention = SlotAttention(slot_dim=16, feature_dim=8)
        >>> out = attention(torch.randn(2, 3, 16), torch.randn(2, 25, 8))
        >>> out.slots.shape, out.logits.shape
        (torch.Size([2, 3, 16]), torch.Size([2, 3, 25]))
    """

    def __init__(
        self,
        slot_dim: int,
        feature_dim: int | None = None,
        iterations: int = 1,
        mlp_hidden: int = 256,
        eps: float = 1e-8,
        sharpness: float | None = None,
    ) -> None:
        super().__init__()
        _check_iterations(iterations)
        if eps <= 0:
            raise ConfigError(f"Expected argument `eps` to be above 0, but got {eps}. Use 1e-8.")
        if sharpness is not None and sharpness <= 0:
            raise ConfigError(f"Expected argument `sharpness` to be None or above 0, but got {sharpness}. Try 2.")
        feature_dim = slot_dim if feature_dim is None else feature_dim
        self.iterations = iterations
        self.eps = eps
        self.scale = slot_dim**-0.5
        self.norm_features = nn.LayerNorm(feature_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)
        self.to_q = nn.Linear(slot_dim, slot_dim, bias=False)
        self.to_k = nn.Linear(feature_dim, slot_dim, bias=False)
        self.to_v = nn.Linear(feature_dim, slot_dim, bias=False)
        if sharpness is not None:
            for layer in (self.to_q, self.to_k):
                nn.init.normal_(layer.weight, std=sharpness * layer.in_features**-0.5)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        self.mlp: nn.Module | None = None
        if mlp_hidden > 0:
            self.mlp = nn.Sequential(
                nn.LayerNorm(slot_dim), nn.Linear(slot_dim, mlp_hidden), nn.ReLU(), nn.Linear(mlp_hidden, slot_dim)
            )

    def forward(self, slots: Tensor, features: Tensor, iterations: int | None = None) -> SlotAttentionOutput:
        """Bind slots to the patches of one frame.

        Args:
            slots: `(B, S, D)`, the state to correct.
            features: `(B, N, C)`.
            iterations: overrides the number given at construction.

        Returns:
            Corrected slots and the logits of the last iteration.

        Raises:
            ShapeError: the inputs are not 3-D or have different batch sizes.
        """
        if slots.ndim != 3 or features.ndim != 3 or slots.shape[0] != features.shape[0]:
            raise ShapeError(
                "Expected arguments `slots` and `features` to be (B, S, D) and (B, N, C) with one B, "
                f"but got {tuple(slots.shape)} and {tuple(features.shape)}. Flatten the grid and call once a frame."
            )
        count = self.iterations if iterations is None else iterations
        _check_iterations(count)
        features = self.norm_features(features)
        key, value = self.to_k(features), self.to_v(features)
        logits = slots.new_zeros(())
        for _ in range(count):
            query = self.to_q(self.norm_slots(slots))
            logits = (torch.einsum("bsd,bnd->bsn", query, key) * self.scale).float()
            weights = logits.softmax(dim=1) + self.eps
            weights = weights / weights.sum(dim=-1, keepdim=True)
            updates = torch.einsum("bsn,bnd->bsd", weights.to(value.dtype), value)
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            if self.mlp is not None:
                slots = slots + self.mlp(slots)
        return SlotAttentionOutput(slots, logits)


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ConfigError(f"Expected argument `iterations` to be at least 1, but got {iterations}. Use 1 to 3.")
