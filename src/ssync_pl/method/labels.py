"""Hard labels and probabilities over slots, with slots and patches that may not exist."""

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the precision of labels, merging and losses: float32 for halves, whose logits often tie."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def mask_slots(logits: Tensor, slot_valid: Tensor | None) -> Tensor:
    """Gives slots that do not exist, by (B, S) bool, a logit of minus infinity in (B, T, S, N)."""
    return logits if slot_valid is None else logits.masked_fill(~slot_valid[:, None, :, None], float("-inf"))


def slot_logits(
    logits: Tensor | None,
    probs: Tensor | None,
    temperature: float = 1.0,
    slot_valid: Tensor | None = None,
    patch_valid: Tensor | None = None,
) -> Tensor:
    """Returns what a softmax turns into `slot_probabilities`, also for the logarithm of these."""
    if probs is not None:
        # A floor keeps the gradient of the logarithm finite where a slot has probability 0.
        logits = probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
    if logits is None:
        raise ValueError("Expected argument `logits` or `probs` to be given, but got neither. Pass one of them.")
    logits = mask_slots(logits, slot_valid)
    if patch_valid is not None:
        # After the slots: a padded video may have neither, and a softmax over minus infinity alone is NaN.
        logits = logits.masked_fill(~patch_valid[:, :, None, :], 0.0)
    return logits if temperature == 1.0 else logits / temperature


def slot_probabilities(
    logits: Tensor | None,
    probs: Tensor | None = None,
    temperature: float = 1.0,
    slot_valid: Tensor | None = None,
    patch_valid: Tensor | None = None,
) -> Tensor:
    """Computes the softmax over slots at a temperature, from logits or from probabilities.

    Args:
        logits: ``(B, T, S, N)`` logits; read only when ``probs`` is None.
        probs: ``(B, T, S, N)`` probabilities over slots. At temperature 1 with all slots valid they are used as they
            are; at another one they become ``p ** (1 / temperature)``, normalised.
        temperature: Divides the logits, above 0; 1 in every published configuration.
        slot_valid: ``(B, S)`` bool; slots that do not exist get probability 0 and the rest sums to 1.
        patch_valid: ``(B, T, N)`` bool; patches without a map become uniform, so that no NaN enters a sum.

    Returns:
        ``(B, T, S, N)`` probabilities.

    Source: SSync (arXiv 2606.15527), the maps P and Q.
    """
    if probs is not None and temperature == 1.0 and slot_valid is None:
        return probs if patch_valid is None else probs.masked_fill(~patch_valid[:, :, None, :], 1.0 / probs.shape[2])
    return slot_logits(logits, probs, temperature, slot_valid, patch_valid).softmax(2)


def hard_labels(probs: Tensor) -> Tensor:
    """Returns the slot that wins each patch; ties go to the lowest slot index.

    Args:
        probs: ``(B, T, S, N)`` probabilities or logits over slots.

    Returns:
        ``(B, T, N)`` int64 labels in [0, S).

    Source: SSync (arXiv 2606.15527), the labels E and D.
    """
    # max(dim) documents that it returns the first maximum, and is many times faster than argmax over a middle axis.
    return probs.detach().max(dim=2).indices


def slot_areas(labels: Tensor, num_slots: int, patch_valid: Tensor | None = None) -> Tensor:
    """Counts the patches that each slot wins in a clip: (B, S) from labels (B, T, N) where (B, T, N) is valid."""
    flat = labels.flatten(1)
    counted = torch.ones_like(flat) if patch_valid is None else patch_valid.flatten(1).to(flat.dtype)
    return torch.zeros(flat.shape[0], num_slots, dtype=flat.dtype, device=flat.device).scatter_add_(1, flat, counted)
