"""Whether slot attention's map and the decoder's know the same slots."""

import torch
from torch import Tensor

from ssync_pl.method.labels import slot_areas


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
    shares = [slot_areas(labels, num_slots, valid) / valid.sum((1, 2))[:, None] for labels in (encoder, decoder)]
    chance = (shares[0] * shares[1]).sum(1).nanmean()
    agreed = ((encoder == decoder) & valid).sum() / valid.sum()
    return (agreed - chance) / (1 - chance).clamp_min(1e-6)
