"""Slot attention with several heads: one map over slots out of the logits of all heads.

The rule follows from what the host's softmax normalises.

* One softmax over slots and heads together (OCLF, AdaSlot): the attention of a slot is its sum over heads, and that is
  the softmax over slots of the logsumexp over heads, ``sum_h exp(l_sh) / Z = exp(logsumexp_h l_sh) / Z``. The merged
  logits are exact, for the loss and for merging. Use `joint_heads`.
* One softmax over slots in each head (SAVi, slot attention with ``heads``): the attention of a slot is its mean over
  heads. No raw logits have this softmax: that of the logsumexp weighs each head by its own normaliser ``Z_h``, so a
  head whose logits are larger by a constant, which its softmax ignores, would take over the map. The loss needs the
  mean of the probabilities; merging compares each slot's logits with their own mean over the clip, where the mean over
  heads ignores such constants as the host does. Use `separate_heads`.

With one head both are the host's logits, to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssync_pl.method.labels import compute_dtype


class SlotMap(NamedTuple):
    """One side's map: logits, probabilities, or both; beside probabilities, logits serve merging only."""

    logits: Tensor | None
    probs: Tensor | None = None


def joint_heads(logits: Tensor, heads_dim: int) -> Tensor:
    """Merges heads, at ``heads_dim``, that share one softmax over slots and heads, as in ``(B, S, heads, N)``.

    Returns logits without that axis, float32 at least where there are several heads; minus infinity marks absent slots.
    """
    if logits.shape[heads_dim] == 1:
        return logits.squeeze(heads_dim)
    logits = logits.to(compute_dtype(logits.dtype))
    absent = logits.isneginf()
    # The gradient of a logsumexp of minus infinities is NaN; finite stand-ins keep it at zero.
    merged = logits.masked_fill(absent, torch.finfo(logits.dtype).min).logsumexp(heads_dim)
    return merged.masked_fill(absent.all(heads_dim), float("-inf"))


def separate_heads(logits: Tensor, heads_dim: int, slots_dim: int) -> SlotMap:
    """Merges heads, at ``heads_dim``, that have a softmax over slots each, as in ``(B, heads, S, N)``.

    Returns means over heads of the logits and of the probabilities, float32 at least; of one head, its logits alone.
    """
    if logits.shape[heads_dim] == 1:
        return SlotMap(logits.squeeze(heads_dim))
    logits = logits.to(compute_dtype(logits.dtype))
    return SlotMap(logits.mean(heads_dim), logits.softmax(slots_dim).mean(heads_dim))
