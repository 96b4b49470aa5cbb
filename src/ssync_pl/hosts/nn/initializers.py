"""Initial slots of a clip: random, learned, or from hints about the first frame."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ssync_pl.errors import require, require_shape


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


class ConditionedSlots(nn.Module):
    """An MLP turns one hint per slot (box or centre in the first frame) into the slot (SAVi, section 2.2).

    Slots without a hint start from a learned vector of their own: equal starts would stay equal for ever.
    """

    def __init__(self, num_slots: int, slot_dim: int, hint_dim: int, hidden: int = 256) -> None:
        super().__init__()
        self.hint_dim = hint_dim
        self.num_slots = num_slots
        self.empty = nn.Parameter(torch.randn(1, num_slots, slot_dim))
        self.mlp = nn.Sequential(nn.Linear(hint_dim, hidden), nn.ReLU(), nn.Linear(hidden, slot_dim))

    def forward(self, hints: Tensor) -> Tensor:
        """Turn hints `(B, S, hint_dim)` in [0, 1] into slots; a row with a negative entry is a slot without a hint."""
        fits = hints.ndim == 3 and hints.shape[1:] == (self.num_slots, self.hint_dim)
        expected = f"argument `conditioning` to be (B, {self.num_slots}, {self.hint_dim})"
        require_shape(fits, expected, hints, advice="Fill rows of slots without an object with -1.")
        known = (hints >= 0).all(dim=-1, keepdim=True)
        return torch.where(known, self.mlp(hints.to(self.empty.dtype)), self.empty)


def first_frame_hints(
    segmentations: Tensor, num_slots: int, kind: Literal["boxes", "centres"] = "boxes", *, has_background: bool = True
) -> Tensor:
    """Boxes or centres of the objects in the first frame, at most one per slot.

    Objects that are not in the first frame are skipped; the others keep their order, and those beyond `num_slots`
    are dropped.
    """
    require_shape(segmentations.ndim == 5, "argument `segmentations` to be (B, T, C, H, W)", segmentations)
    masks = segmentations[:, 0, int(has_background) :].bool()
    top, bottom = _extent(masks.any(dim=-1))
    left, right = _extent(masks.any(dim=-2))
    if kind == "boxes":
        hints = torch.stack([top, left, bottom, right], dim=-1)
    else:
        hints = torch.stack([(top + bottom) / 2, (left + right) / 2], dim=-1)
    absent = ~masks.flatten(2).any(dim=-1)
    hints = hints.masked_fill(absent.unsqueeze(-1), -1.0)
    # Rows of -1 at the end make the gather possible when there are fewer channels than slots.
    padding = max(0, num_slots - masks.shape[1])
    hints = nn.functional.pad(hints, (0, 0, 0, padding), value=-1.0)
    absent = nn.functional.pad(absent, (0, padding), value=True)
    order = absent.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_slots]
    return hints.gather(1, order.unsqueeze(-1).expand(-1, -1, hints.shape[-1]))


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True along the last axis, as fractions of its length."""
    length = occupied.shape[-1]
    first = occupied.float().argmax(dim=-1)
    last = length - occupied.flip(-1).float().argmax(dim=-1)
    return first / length, last / length
