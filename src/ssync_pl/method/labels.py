"""Hard labels and probabilities over slots, with slots and patches that may not exist."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compute_dtype", "hard_labels", "mask_slots", "slot_areas", "slot_log_probabilities", "slot_probabilities"]

_HALF = (torch.float16, torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision in which labels, merging and losses are computed.

    Half-precision logits tie in about one patch of two hundred, so halves become float32; float64 stays.

    Args:
        dtype: Floating-point dtype of a host's map.

    Returns:
        ``torch.float32`` for halves, else ``dtype`` itself.

    Example:
        >>> compute_dtype(torch.bfloat16)
        torch.float32
    """
    return torch.float32 if dtype in _HALF else dtype


def mask_slots(logits: Tensor, slot_valid: Tensor | None) -> Tensor:
    """Give slots that do not exist a logit of minus infinity.

    Args:
        logits: ``(B, T, S, N)`` logits over slots.
        slot_valid: ``(B, S)`` bool, or None when all slots exist.

    Returns:
        ``(B, T, S, N)`` logits.

    Example:
        >>> mask_slots(torch.zeros(1, 1, 2, 1), torch.tensor([[True, False]])).flatten()
        tensor([0., -inf])
    """
    if slot_valid is None:
        return logits
    return logits.masked_fill(~slot_valid[:, None, :, None], float("-inf"))


def slot_probabilities(
    logits: Tensor | None = None,
    probs: Tensor | None = None,
    temperature: float = 1.0,
    slot_valid: Tensor | None = None,
    patch_valid: Tensor | None = None,
) -> Tensor:
    """Softmax over slots at a temperature, from logits or from probabilities.

    Args:
        logits: ``(B, T, S, N)`` logits; read only when ``probs`` is None.
        probs: ``(B, T, S, N)`` probabilities over slots. At temperature 1 they are used as they are; at another one
            they become ``p ** (1 / temperature)``, normalised, which is the softmax of their tempered logarithm.
        temperature: Above 0; 1 in every published configuration.
        slot_valid: ``(B, S)`` bool; slots that do not exist get probability 0 and the rest sums to 1.
        patch_valid: ``(B, T, N)`` bool; patches without a map become uniform, so that no NaN enters a sum.

    Returns:
        ``(B, T, S, N)`` probabilities.

    Raises:
        ValueError: Neither logits nor probabilities are given.

    Example:
        >>> slot_probabilities(torch.tensor([[[[0.0], [0.0]]]])).flatten()
        tensor([0.5000, 0.5000])

    Source: SSync (arXiv 2606.15527), the maps P and Q.
    """
    if probs is not None and temperature == 1.0 and slot_valid is None:
        if patch_valid is None:
            return probs
        return probs.masked_fill(~patch_valid[:, :, None, :], 1.0 / probs.shape[2])
    return torch.softmax(_student_logits(logits, probs, temperature, slot_valid, patch_valid), dim=2)


def slot_log_probabilities(
    logits: Tensor | None = None,
    probs: Tensor | None = None,
    temperature: float = 1.0,
    slot_valid: Tensor | None = None,
    patch_valid: Tensor | None = None,
) -> Tensor:
    """Logarithm of `slot_probabilities`, exact for confident maps.

    Args:
        logits: As in `slot_probabilities`.
        probs: As in `slot_probabilities`.
        temperature: As in `slot_probabilities`.
        slot_valid: As in `slot_probabilities`; slots that do not exist get minus infinity.
        patch_valid: As in `slot_probabilities`.

    Returns:
        ``(B, T, S, N)`` log-probabilities.

    Raises:
        ValueError: Neither logits nor probabilities are given.

    Example:
        >>> slot_log_probabilities(torch.tensor([[[[0.0], [0.0]]]])).flatten()
        tensor([-0.6931, -0.6931])
    """
    return torch.log_softmax(_student_logits(logits, probs, temperature, slot_valid, patch_valid), dim=2)


def _student_logits(
    logits: Tensor | None,
    probs: Tensor | None,
    temperature: float,
    slot_valid: Tensor | None,
    patch_valid: Tensor | None,
) -> Tensor:
    if probs is not None:
        # A floor keeps the gradient of the logarithm finite where a slot has probability 0.
        raw = probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
    elif logits is not None:
        raw = logits
    else:
        raise ValueError("Expected argument `logits` or `probs` to be given, but got neither. Pass one of them.")
    raw = mask_slots(raw, slot_valid)
    if patch_valid is not None:
        # After the slots: a padded video may have neither, and a softmax over minus infinity alone is NaN.
        raw = raw.masked_fill(~patch_valid[:, :, None, :], 0.0)
    return raw if temperature == 1.0 else raw / temperature


def hard_labels(probs: Tensor) -> Tensor:
    """The slot that wins each patch; ties go to the lowest slot index.

    Args:
        probs: ``(B, T, S, N)`` probabilities (or logits) over slots.

    Returns:
        ``(B, T, N)`` int64 labels in [0, S).

    Example:
        >>> hard_labels(torch.tensor([[[[0.2, 0.5], [0.8, 0.5]]]]))
        tensor([[[1, 0]]])

    Source: SSync (arXiv 2606.15527), the labels E and D.
    """
    # max(dim) documents that it returns the first maximum, and is many times faster than argmax over a middle axis.
    return probs.detach().max(dim=2).indices


def slot_areas(labels: Tensor, num_slots: int, patch_valid: Tensor | None = None) -> Tensor:
    """Number of patches that each slot wins in a clip.

    Args:
        labels: ``(B, T, N)`` int64 labels in [0, num_slots).
        num_slots: S.
        patch_valid: ``(B, T, N)`` bool; other patches are not counted.

    Returns:
        ``(B, S)`` int64 areas in patches.

    Example:
        >>> slot_areas(torch.tensor([[[1, 0, 1]]]), 3)
        tensor([[1, 2, 0]])
    """
    flat = labels.flatten(1)
    if patch_valid is None:
        ones = torch.ones_like(flat)
    else:
        ones = patch_valid.flatten(1).to(flat.dtype)
    return torch.zeros(flat.shape[0], num_slots, dtype=flat.dtype, device=flat.device).scatter_add_(1, flat, ones)
