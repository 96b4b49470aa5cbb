"""Slot merging by agglomerative clustering, in tensor code of fixed shapes (Aydemir et al. 2023, section 3.3)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssync_pl.errors import require


class MergedSlots(NamedTuple):
    """Slots `(B, P, S, D)`, means of their members or 0; members bool `(B, P, S, S)`, where slot j went into slot i."""

    slots: Tensor
    members: Tensor

    @property
    def valid(self) -> Tensor:
        """Bool `(B, P, S)`: slots with members."""
        return self.members.any(dim=-1)

    def merge_attention(self, attention: Tensor) -> Tensor:
        """Attention `(B, P, S, N)` summed over members and normalised over tokens; uniform where there are none."""
        total = torch.einsum("bpij,bpjn->bpin", self.members.to(attention.dtype), attention) + 1e-8
        return total / total.sum(dim=-1, keepdim=True)


def cosine_distances(slots: Tensor) -> Tensor:
    """One minus the cosine of every two slots `(..., S, D)`, as float32 `(..., S, S)` in [0, 2]."""
    with torch.autocast(slots.device.type, enabled=False):
        unit = F.normalize(slots.float(), dim=-1)
        return 1.0 - unit @ unit.transpose(-1, -2)


def agglomerate(distances: Tensor, threshold: float) -> Tensor:
    """Agglomerative clustering: the two closest clusters become one until none are closer than the threshold.

    The distance of two clusters is the largest between their members (complete linkage).

    S - 1 rounds of a masked minimum for the whole batch at once: no loop over samples, and the device is never waited
    for. Where distances tie, the pair with the lowest indices comes first.
    """
    count = distances.shape[-1]
    flat = distances.detach().float().reshape(-1, count, count)
    index = torch.arange(count, device=flat.device)
    labels = index.expand(len(flat), -1)
    alive = torch.ones_like(flat[:, 0], dtype=torch.bool)
    upper = index.unsqueeze(1) < index
    for _ in range(count - 1):
        pairs = upper & alive.unsqueeze(1) & alive.unsqueeze(2)
        closest = flat.masked_fill(~pairs, float("inf")).flatten(1).min(dim=1)
        first = torch.div(closest.indices, count, rounding_mode="floor").unsqueeze(1)
        second = (closest.indices % count).unsqueeze(1)
        merges = (closest.values < threshold).unsqueeze(1)
        rows = [flat.gather(1, place.unsqueeze(2).expand(-1, -1, count)).squeeze(1) for place in (first, second)]
        joined = torch.maximum(*rows)
        is_first, is_second = (index == first) & merges, (index == second) & merges
        flat = torch.where(is_first.unsqueeze(2), joined.unsqueeze(1), flat)
        flat = torch.where(is_first.unsqueeze(1), joined.unsqueeze(2), flat)
        alive = alive & ~is_second
        labels = torch.where((labels == second) & merges, first, labels)
    return labels.reshape(distances.shape[:-1])


class SlotMerger(nn.Module):
    """Replaces slots that are alike by their mean, so that an object that fell into pieces is one slot again.

    Arguments are those of `SOLV` that start with `merge_`.

    Source: Aydemir et al. 2023 (arXiv 2310.06907), section 3.3; linkage and the least number as in its public code.
    """

    def __init__(self, threshold: float | None = 0.12, min_slots: int = 3) -> None:
        super().__init__()
        require(threshold is None or 0.0 <= threshold <= 2.0, "`merge_threshold` to be None or in [0, 2]", threshold)
        require(min_slots >= 1, "argument `merge_min_slots` to be at least 1", min_slots)
        self.threshold = threshold
        self.min_slots = min_slots

    def forward(self, slots: Tensor, wanted: Tensor | None = None) -> MergedSlots:
        """Merge slots `(B, P, S, D)` of each frame for itself, where `wanted` `(B, P)` says so; None for all."""
        index = torch.arange(slots.shape[2], device=slots.device)
        labels = index.expand(slots.shape[:3])
        if self.threshold is not None:
            merged = agglomerate(cosine_distances(slots.detach()), self.threshold)
            # Each cluster goes by its lowest index, so that these are as many as clusters.
            keep = (merged == index).sum(dim=-1) >= self.min_slots
            keep = keep if wanted is None else keep & wanted
            labels = torch.where(keep.unsqueeze(-1), merged, labels)
        members = labels.unsqueeze(2) == index.unsqueeze(1)
        share = members.to(slots.dtype)
        share = share / share.sum(dim=-1, keepdim=True).clamp_min(1.0)
        return MergedSlots(share @ slots, members)
