"""SlotContrast's loss: a slot resembles its own past more than any other slot's."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.method.labels import compute_dtype

__all__ = ["slot_contrast_loss"]


def slot_contrast_loss(
    slots: Tensor, *, temperature: float = 0.1, across_batch: bool = True, valid: Tensor | None = None
) -> Tensor:
    """Cross-entropy of finding each slot of frame t + 1 among the slots of frame t, by cosine similarity.

    Args:
        slots: `(B, T, S, D)` of T >= 2 frames. Gradient flows to both frames.
        temperature: divides the cosine similarities.
        across_batch: look among the slots of all clips of the batch (as published), not only of the own clip.
        valid: bool `(B, T)`, frames that count; None counts all. Frames that do not count are neither asked for nor
            looked among.

    Returns:
        0-dim mean over slots, clips and pairs of frames; 0 when no pair counts.

    Raises:
        ShapeError: `slots` is not 4-D, or has a single frame.
        ConfigError: `temperature` is not above 0.

    Example:
        >>> still = torch.eye(3).expand(1, 2, 3, 3)
        >>> swapped = torch.stack([torch.eye(3), torch.eye(3)[[1, 2, 0]]]).unsqueeze(0)
        >>> round(slot_contrast_loss(still).item(), 4), round(slot_contrast_loss(swapped).item(), 4)
        (0.0001, 10.0001)

    Source: SlotContrast (arXiv 2412.14295), section 3, the slot-slot contrastive loss.
    """
    if slots.ndim != 4 or slots.shape[1] < 2:
        raise ShapeError(
            f"Expected argument `slots` to be (B, T, S, D) with T >= 2, but got {tuple(slots.shape)}. Raise "
            "`clip_length`: the loss compares neighbouring frames."
        )
    if temperature <= 0:
        raise ConfigError(f"Expected argument `temperature` to be above 0, but got {temperature}. Use 0.1.")
    count = slots.shape[2]
    groups = "1 t (b s)" if across_batch else "b t s"
    # Similarities are divided by a small number: half precision would show.
    with torch.autocast(slots.device.type, enabled=False):
        vectors = rearrange(F.normalize(slots.to(compute_dtype(slots.dtype)), dim=-1), f"b t s d -> {groups} d")
        logits = torch.einsum("btid,btjd->btij", vectors[:, :-1], vectors[:, 1:]) / temperature
    own = torch.diagonal(logits, dim1=-2, dim2=-1)
    if valid is None:
        return (logits.logsumexp(dim=-2) - own).mean()
    pairs = repeat(valid[:, :-1] & valid[:, 1:], f"b t -> {groups}", s=count)
    # A slot stays beside itself, so that no column is empty; columns that do not count get weight 0 below.
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    among = logits.masked_fill(~(pairs.unsqueeze(-1) | itself), -torch.inf)
    weights = pairs.to(logits.dtype)
    return ((among.logsumexp(dim=-2) - own) * weights).sum() / weights.sum().clamp(min=1.0)
