"""The direct path with its passes over whole maps fused by `torch.compile`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ssync_pl.method.direct import Stages, run_block
from ssync_pl.method.parts import BlockOptions, BlockParts

__all__ = ["compiled_block"]


def compiled_block(
    attention_logits: Tensor,
    mask_logits: Tensor,
    grid: tuple[int, int],
    *,
    merge_threshold: float | None = 0.7,
    n_bd: int = 1,
    n_nbd: int = 1,
    n_noise: int = 1,
    sync_counts: bool = False,
) -> BlockParts:
    """`direct_block` with two of its steps compiled: labels from probabilities, and losses with gradients.

    Softmax, means and the graph of slots stay as they are, so that labels and regions equal those of the other paths to
    the bit. The first call with a shape compiles, for up to a minute, and needs a C++ compiler on CPUs.

    Args:
        attention_logits: ``(B, T, S, N)`` floating point, any strides.
        mask_logits: ``(B, T, S, N)``; where one side is float64, so must be the other.
        grid: ``(H, W)`` with ``H * W == N``.
        merge_threshold: Overlap above which slots are redundant, in [0, 1]; None switches merging off.
        n_bd: A boundary patch has at least this many differing neighbours.
        n_nbd: An interior patch has fewer differing neighbours than this.
        n_noise: A boundary patch has at least this many agreeing neighbours.
        sync_counts: Divide by the selected patches of all ranks.

    Returns:
        Losses, labels, regions and statistics.

    Example:
        >>> compiled_block.__name__  # compiles: compiled_block(dots, alpha, (24, 24)).boundary_loss.backward()
        'compiled_block'

    Source: SSync (arXiv 2606.15527), Sec. 3.
    """
    options = BlockOptions(grid, merge_threshold, (n_bd, n_nbd, n_noise), sync_counts)
    return run_block(attention_logits, mask_logits, options, _stages())


@functools.cache
def _stages() -> Stages:
    # Shapes of a training are few, and kernels for a fixed shape are the faster ones.
    labels = torch.compile(_first_of_largest, dynamic=False)
    scores = torch.compile(_scores_and_gradients, dynamic=False)

    def losses(
        probs: Tensor,
        scratch: Tensor,
        teachers: Tensor,
        weight: Tensor,
        share: Tensor,
        with_gradients: tuple[bool, bool],
    ) -> Tensor:
        return scores(probs, scratch, teachers, weight, share)

    return Stages(lambda probs, scratch: labels(probs), losses)


def _first_of_largest(probs: Tensor) -> Tensor:
    slots = probs.shape[3]
    index = torch.arange(slots, dtype=torch.int32, device=probs.device)[:, None]
    largest = probs == probs.amax(3, keepdim=True)
    return torch.where(largest, index, slots - 1).amin(3).long()


def _scores_and_gradients(probs: Tensor, scratch: Tensor, teachers: Tensor, weight: Tensor, share: Tensor) -> Tensor:
    index = torch.arange(probs.shape[3], dtype=torch.int32, device=probs.device)[:, None]
    labelled = teachers.int().unsqueeze(3) == index
    error = torch.where(labelled, probs - 1.0, probs)
    score = (error * error).sum(3, keepdim=True)
    at_label = torch.where(labelled, error, 0.0).sum(3, keepdim=True)
    scale = (weight * (2.0 * share).view(2, 1, 1, 1)).unsqueeze(3)
    scratch.copy_(torch.where(labelled, -probs * score, probs * (error - (score + at_label))) * scale)
    return (score.squeeze(3) * weight).flatten(1).sum(1) * share
