"""Transitive pseudo-label merging: redundant slots share one label."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssync_pl.method.labels import compute_dtype

__all__ = [
    "MergeResult",
    "component_winners",
    "connected_components",
    "merge_slots",
    "relabel",
    "slot_coverage",
    "temporal_slot_iou",
]

# The reference adds this to each area, so that two slots that cover nothing have an overlap of 0, not 0 / 0.
_AREA_EPSILON = 1e-6
# Numbers of paths stay finite: 128 ** 128 < 2 ** 1023.
_MOST_IN_FLOAT64 = 128


class MergeResult(NamedTuple):
    """What merging found.

    Args:
        winners: ``(B, S)`` int64, for each slot the slot whose label it takes.
        merged_slots: ``(B,)`` int64, number of slots that take another slot's label.
        slot_iou: ``(B, S, S)`` temporal overlap of the slots' coverage, in [0, 1].

    Example:
        >>> MergeResult(torch.tensor([[0, 0]]), torch.tensor([1]), torch.ones(1, 2, 2)).merged_slots
        tensor([1])
    """

    winners: Tensor
    merged_slots: Tensor
    slot_iou: Tensor


def slot_coverage(logits: Tensor, slot_valid: Tensor | None = None, patch_valid: Tensor | None = None) -> Tensor:
    """Patches where a slot's logit is above that slot's mean over the whole clip.

    Args:
        logits: ``(B, T, S, N)`` raw attention logits. Log-probabilities are no substitute: the softmax removes a
            constant from every patch, and with it two thirds of what this comparison sees.
        slot_valid: ``(B, S)`` bool; other slots cover nothing.
        patch_valid: ``(B, T, N)`` bool; other patches neither count in the mean nor are covered.

    Returns:
        ``(B, T, S, N)`` bool.

    Example:
        >>> slot_coverage(torch.tensor([[[[0.0, 1.0, 5.0]]]])).flatten()
        tensor([False, False,  True])

    Source: SSync (arXiv 2606.15527), coverage masks of transitive merging.
    """
    logits = logits.detach()
    if patch_valid is None:
        threshold = logits.mean(dim=(1, 3), keepdim=True)
        covered = logits > threshold
    else:
        valid = patch_valid[:, :, None, :]
        count = valid.sum(dim=(1, 3), keepdim=True).clamp_min(1)
        threshold = logits.masked_fill(~valid, 0.0).sum(dim=(1, 3), keepdim=True) / count
        covered = (logits > threshold) & valid
    if slot_valid is not None:
        covered = covered & slot_valid[:, None, :, None]
    return covered


def temporal_slot_iou(coverage: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Intersection over union of every two slots' coverage, averaged over frames.

    Args:
        coverage: ``(B, T, S, N)`` bool, or 0 and 1 in ``dtype``.
        dtype: Precision of the result.

    Returns:
        ``(B, S, S)`` overlaps in [0, 1]; a frame in which both slots cover nothing counts as 0.

    Example:
        >>> temporal_slot_iou(torch.tensor([[[[True, True], [True, False]]]]))[0, 0, 1].round(decimals=3)
        tensor(0.5000)

    Source: SSync (arXiv 2606.15527), temporal consistency of transitive merging.
    """
    mask = coverage.to(dtype).flatten(0, 1)
    intersection = torch.bmm(mask, mask.mT).unflatten(0, coverage.shape[:2])
    area = intersection.diagonal(dim1=-2, dim2=-1) + _AREA_EPSILON
    union = area.unsqueeze(-1) + area.unsqueeze(-2) - intersection
    return (intersection / union).mean(dim=1)


def connected_components(adjacency: Tensor) -> Tensor:
    """Reachability in an undirected graph, by repeated squaring: log2(S) batched products, no loop over nodes.

    Args:
        adjacency: ``(B, S, S)`` bool, symmetric.

    Returns:
        ``(B, S, S)`` bool, True where two nodes lie in one component; the diagonal is True.

    Example:
        >>> chain = torch.tensor([[[0, 1, 0], [1, 0, 1], [0, 1, 0]]]).bool()
        >>> bool(connected_components(chain)[0, 0, 2])
        True
    """
    size = adjacency.shape[-1]
    # Numbers of paths of up to as many links; on CPUs they need not be cut to 1 on the way.
    uncut = size <= _MOST_IN_FLOAT64 and adjacency.device.type == "cpu"
    paths = adjacency.to(torch.float64 if uncut else torch.float32)
    paths.diagonal(dim1=1, dim2=2).fill_(1.0)
    for _ in range(max(size - 1, 1).bit_length()):
        paths = torch.bmm(paths, paths)
        if not uncut:
            paths = (paths > 0.5).to(paths.dtype)
    return paths > 0.5


def merge_slots(
    logits: Tensor,
    areas: Tensor,
    merge_threshold: float = 0.7,
    slot_valid: Tensor | None = None,
    patch_valid: Tensor | None = None,
) -> MergeResult:
    """Find redundant slots and the label that each of them takes.

    Slots whose coverage overlaps by more than the threshold are linked; every connected component takes the label of
    its slot with the largest area, the lowest index where areas tie.

    Args:
        logits: ``(B, T, S, N)`` raw attention logits.
        areas: ``(B, S)`` number of patches that each slot wins in the clip.
        merge_threshold: Overlap above which two slots are redundant, in [0, 1], strict. Published: 0.7 (MOVi-C),
            0.65 (MOVi-E), 0.6 (YT-VIS), 0.9 (COCO).
        slot_valid: ``(B, S)`` bool; other slots merge with nothing.
        patch_valid: ``(B, T, N)`` bool.

    Returns:
        Winners, number of merged slots and overlaps.

    Example:
        >>> logits = torch.tensor([[[[2.0, 2.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]]])
        >>> merge_slots(logits, torch.tensor([[2, 0, 2]])).winners
        tensor([[0, 0, 2]])

    Source: SSync (arXiv 2606.15527), transitive pseudo-label merging.
    """
    iou = temporal_slot_iou(slot_coverage(logits, slot_valid, patch_valid), compute_dtype(logits.dtype))
    winners = component_winners(iou, areas, merge_threshold)
    slots = torch.arange(winners.shape[1], device=winners.device)
    return MergeResult(winners, (winners != slots).sum(dim=1), iou)


def component_winners(slot_iou: Tensor, areas: Tensor, merge_threshold: float) -> Tensor:
    """For each slot the largest one that it is linked to, directly or over others.

    Args:
        slot_iou: ``(B, S, S)`` overlaps in [0, 1].
        areas: ``(B, S)`` number of patches that each slot wins in the clip.
        merge_threshold: Overlap above which two slots are linked, strict.

    Returns:
        ``(B, S)`` int64 slots; the lowest index where areas tie.

    Example:
        >>> overlap = torch.tensor([[[1.0, 0.8, 0.1], [0.8, 1.0, 0.1], [0.1, 0.1, 1.0]]])
        >>> component_winners(overlap, torch.tensor([[1, 3, 5]]), 0.7)
        tensor([[1, 1, 2]])

    Source: SSync (arXiv 2606.15527), transitive pseudo-label merging.
    """
    component = connected_components(slot_iou > merge_threshold)
    score = torch.where(component, areas.unsqueeze(1), -1)
    return score.max(dim=2).indices


def relabel(labels: Tensor, winners: Tensor) -> Tensor:
    """Replace each label by the winner of its component.

    Args:
        labels: ``(B, T, N)`` int64 labels.
        winners: ``(B, S)`` int64.

    Returns:
        ``(B, T, N)`` int64 labels.

    Example:
        >>> relabel(torch.tensor([[[0, 1, 2]]]), torch.tensor([[0, 0, 2]]))
        tensor([[[0, 0, 2]]])
    """
    return winners.gather(1, labels.flatten(1)).view_as(labels)
