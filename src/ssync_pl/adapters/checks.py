"""Whether the maps that were heard can teach each other."""

import torch
from torch import Tensor

from ssync_pl.errors import HostError
from ssync_pl.method.labels import slot_areas
from ssync_pl.method.maps import SSyncMaps


def kappa(encoder: Tensor, decoder: Tensor, num_slots: int, patch_valid: Tensor | None = None) -> Tensor:
    """Computes Cohen's kappa of the slots that win in two maps: the agreement of their labels beyond chance.

    Args:
        encoder: ``(B, T, N)`` labels of slot attention's map, before merging.
        decoder: ``(B, T, N)`` labels of the decoder's.
        num_slots: Number of slots, S.
        patch_valid: ``(B, T, N)``, False where a patch is not looked at.

    Returns:
        A 0-dim tensor in [-1, 1]: 1 where all labels agree, 0 for what chance gives and where one slot wins everything,
        NaN without a patch.

    Source: Cohen, A coefficient of agreement for nominal scales (1960).
    """
    valid = torch.ones_like(encoder, dtype=torch.bool) if patch_valid is None else patch_valid
    # In float32 whatever the default is, which a Trainer in bfloat16 changes.
    patches = valid.sum((1, 2)).float()
    areas = [slot_areas(labels, num_slots, valid).float() for labels in (encoder, decoder)]
    chance = ((areas[0] * areas[1]).sum(1) / patches.clamp_min(1)).sum() / patches.sum()
    agreed = ((encoder == decoder) & valid).sum().float() / patches.sum()
    return (agreed - chance) / (1 - chance).clamp_min(1e-6)


def check_first(maps: SSyncMaps, host: str, boundary_weight: float, interior_weight: float) -> None:
    """Refuses maps with NaN, sums other than 1 or no gradient; only in the first step, since it reads the device."""
    sides = (
        ("decoder masks", maps.masks, boundary_weight),
        ("slot attention", maps.attention, interior_weight),
    )
    for name, value, weight in sides:
        if weight > 0 and torch.is_grad_enabled() and not value.requires_grad:
            raise HostError(
                f"Expected the {name} of {host} to carry gradient, but it does not. It was detached, computed under "
                "no_grad, or captured inside reentrant activation checkpointing (use "
                "checkpoint(..., use_reentrant=False))."
            )
    maps.check_values()
