"""Initial slots of a clip: random or learned."""

import math

import torch
from torch import Tensor, nn

from ssync_pl.errors import require


class GaussianSlots(nn.Module):
    """Draws every slot from one learned Gaussian, in training and in evaluation (Locatello et al. 2020)."""

    def __init__(self, num_slots: int, slot_dim: int, initial_std: float = 1.0) -> None:
        super().__init__()
        require(initial_std > 0, "the initial spread of the slots to be above 0", initial_std, advice="Use 1.")
        self.num_slots = num_slots
        self.mean = nn.Parameter(torch.zeros(1, 1, slot_dim))
        self.log_std = nn.Parameter(torch.full((1, 1, slot_dim), math.log(initial_std)))

    def forward(self, batch_size: int) -> Tensor:
        """Draw slots `(B, S, D)` for a number of clips."""
        mean = self.mean.expand(batch_size, self.num_slots, -1)
        return mean + self.log_std.exp() * torch.randn_like(mean)


class LearnedSlots(nn.Module):
    """One learned vector per slot, the same for every clip."""

    def __init__(self, num_slots: int, slot_dim: int, initial_std: float = 1.0) -> None:
        super().__init__()
        require(initial_std > 0, "the initial spread of the slots to be above 0", initial_std, advice="Use 1.")
        self.slots = nn.Parameter(torch.randn(1, num_slots, slot_dim) * initial_std)

    def forward(self, batch_size: int) -> Tensor:
        """Repeat the slots, to `(B, S, D)`, for a number of clips."""
        return self.slots.expand(batch_size, -1, -1)
