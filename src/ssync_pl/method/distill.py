"""The loss of one direction: a student map against hard labels on selected patches."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["LossKind", "brier_per_patch", "cross_entropy_per_patch", "mean_over_ranks", "selected_mean"]

LossKind = Literal["brier", "ce"]


def brier_per_patch(probs: Tensor, labels: Tensor) -> Tensor:
    """Squared distance between probabilities and a one-hot label, summed over slots.

    Args:
        probs: ``(B, T, S, N)`` probabilities of the student. Gradient flows.
        labels: ``(B, T, N)`` int64 labels of the teacher.

    Returns:
        ``(B, T, N)`` in [0, 2].

    Example:
        >>> brier_per_patch(torch.tensor([[[[0.5], [0.5]]]]), torch.tensor([[[0]]]))
        tensor([[[0.5000]]])

    Source: SSync (arXiv 2606.15527), the distillation losses; "MSE on probabilities" in the reference.
    """
    slots = torch.arange(probs.shape[2], device=probs.device)[:, None]
    return (probs - (labels.unsqueeze(2) == slots).to(probs.dtype)).square().sum(dim=2)


def cross_entropy_per_patch(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Negative log-probability of the label; an alternative of ours, used by no published configuration.

    Args:
        log_probs: ``(B, T, S, N)`` log-probabilities of the student. Gradient flows.
        labels: ``(B, T, N)`` int64 labels of the teacher.

    Returns:
        ``(B, T, N)`` in [0, 1e4]: bounded, so that a slot a host rules out in one patch cannot make the mean infinite.

    Example:
        >>> cross_entropy_per_patch(torch.tensor([[[[0.5], [0.5]]]]).log(), torch.tensor([[[0]]]))
        tensor([[[0.6931]]])
    """
    return -log_probs.gather(2, labels.unsqueeze(2)).squeeze(2).clamp_min(-1e4)


def selected_mean(per_patch: Tensor, selected: Tensor, entries: Tensor) -> Tensor:
    """Sum over the selected patches divided by the number of entries; 0 with zero gradient when there are none.

    Args:
        per_patch: ``(B, T, N)`` losses.
        selected: ``(B, T, N)`` bool.
        entries: 0-dim count that the mean runs over.

    Returns:
        0-dim mean.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0]]])
        >>> selected_mean(x, torch.zeros_like(x, dtype=torch.bool), torch.tensor(0.0))
        tensor(0.)
    """
    # A product and not a choice: NaN in a host's map has to surface in the loss, never to be hidden by the selection.
    # Counts averaged over ranks can lie between 0 and 1, so that clamping them to 1 would shrink the loss.
    return (per_patch * selected).sum() / torch.where(entries > 0, entries, 1.0)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Average a tensor over the processes of a distributed training; alone, it is returned as it is.

    Args:
        value: Any shape, the same on every rank. No gradient flows through the average.

    Returns:
        The mean, on the tensor's device.

    Example:
        >>> mean_over_ranks(torch.tensor(2.0))
        tensor(2.)
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
