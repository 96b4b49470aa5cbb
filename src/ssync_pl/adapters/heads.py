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

from ssync_pl.errors import ShapeError
from ssync_pl.method.labels import compute_dtype

__all__ = ["HeadMaps", "joint_heads", "separate_heads"]


class HeadMaps(NamedTuple):
    """What several heads say together: the two attention fields of `SSyncMaps`.

    Args:
        logits: Without the axis of heads. Beside ``probs`` they serve merging only.
        probs: The same shape, probabilities over slots; None where the softmax of ``logits`` is exact.

    Example:
        >>> HeadMaps(torch.zeros(1, 2, 4), None).probs is None
        True
    """

    logits: Tensor
    probs: Tensor | None


def joint_heads(logits: Tensor, heads_dim: int) -> Tensor:
    """Merge heads that share one softmax over slots and heads.

    Args:
        logits: Attention logits with axes of slots, heads and patches, such as ``(B, S, heads, N)``. Minus infinity
            marks slots that do not exist.
        heads_dim: Axis of the heads.

    Returns:
        The logits without that axis, ``(B, S, N)``: their softmax over slots is the host's attention summed over
        heads. One head: as they are. Several: float32 at least, and minus infinity, with no gradient, where all heads
        have it.

    Raises:
        ShapeError: There is no such axis, or it is empty.

    Example:
        >>> logits = torch.tensor([[[1.0], [2.0]], [[0.0], [-1.0]]])  # (S, heads, N)
        >>> together = logits.flatten(0, 1).softmax(0).view(2, 2, 1).sum(1)
        >>> torch.allclose(joint_heads(logits, 1).softmax(0), together)
        True
    """
    heads_dim = _axis(logits, heads_dim)
    if logits.shape[heads_dim] == 1:
        return logits.squeeze(heads_dim)
    logits = logits.to(compute_dtype(logits.dtype))
    absent = logits.isneginf()
    # The gradient of a logsumexp of minus infinities is NaN; finite stand-ins keep it at zero.
    merged = logits.masked_fill(absent, torch.finfo(logits.dtype).min).logsumexp(heads_dim)
    return merged.masked_fill(absent.all(heads_dim), float("-inf"))


def separate_heads(logits: Tensor, heads_dim: int, slots_dim: int) -> HeadMaps:
    """Merge heads that have a softmax over slots each.

    Args:
        logits: Attention logits with axes of slots, heads and patches, such as ``(B, heads, S, N)``.
        heads_dim: Axis of the heads.
        slots_dim: Axis of the slots, counted with the heads in place.

    Returns:
        Mean over heads of the probabilities, for the loss, and of the logits, for merging; float32 at least. One head:
        the logits as they are, and no probabilities.

    Raises:
        ShapeError: There are no such axes, they are the same, or the heads are empty.

    Example:
        >>> logits = torch.tensor([[[0.0], [0.0]], [[9.0], [9.0]]])  # (heads, S, N): each head is undecided
        >>> separate_heads(logits, 0, 1).probs.flatten()
        tensor([0.5000, 0.5000])
        >>> separate_heads(logits[:1], 0, 1)
        HeadMaps(logits=tensor([[0.],
                [0.]]), probs=None)
    """
    heads_dim, slots_dim = _axis(logits, heads_dim), _axis(logits, slots_dim)
    if heads_dim == slots_dim:
        raise ShapeError(
            f"Expected arguments `heads_dim` and `slots_dim` to be two axes, but both are axis {heads_dim}. "
            "Name the axis of the heads and that of the slots."
        )
    if logits.shape[heads_dim] == 1:
        return HeadMaps(logits.squeeze(heads_dim), None)
    logits = logits.to(compute_dtype(logits.dtype))
    return HeadMaps(logits.mean(heads_dim), logits.softmax(slots_dim).mean(heads_dim))


def _axis(logits: Tensor, dim: int) -> int:
    if not -logits.ndim <= dim < logits.ndim:
        raise ShapeError(
            f"Expected an axis of logits of shape {tuple(logits.shape)}, but got axis {dim}. "
            "Pass logits with an axis of heads, before the softmax."
        )
    if logits.shape[dim] == 0:
        raise ShapeError(f"Expected at least one entry on axis {dim}, but got logits of shape {tuple(logits.shape)}.")
    return dim % logits.ndim
