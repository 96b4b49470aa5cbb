"""Transitive pseudo-label merging: redundant slots share one label."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ssync_pl.method.labels import compute_dtype, hard_labels, slot_areas, slot_logits
from ssync_pl.method.maps import SSyncMaps

MergeRule = Literal["coverage", "soft_iou"]

# The reference adds this to each area, so that two slots that cover nothing have an overlap of 0, not 0 / 0.
_AREA_EPSILON = 1e-6


class MergeResult(NamedTuple):
    """What merging found."""

    winners: Tensor  # (B, S) int64, for each slot the slot whose label it takes
    merged_slots: Tensor  # (B,) int64, number of slots that take another slot's label
    slot_iou: Tensor | None  # (B, S, S) temporal overlap of the slots' coverage, in [0, 1]; None where none was asked


def merge_slots(
    logits: Tensor,
    areas: Tensor,
    merge_threshold: float = 0.7,
    slot_valid: Tensor | None = None,
    patch_valid: Tensor | None = None,
) -> MergeResult:
    """Finds redundant slots and the label that each of them takes.

    Slots whose coverage overlaps by more than the threshold are linked; every connected component takes the label of
    its slot with the largest area, the lowest index where areas tie.

    Args:
        logits: ``(B, T, S, N)`` raw attention logits.
        areas: ``(B, S)`` number of patches that each slot wins in the clip.
        merge_threshold: Overlap above which two slots are redundant, in [0, 1], strict. Published: 0.7 (MOVi-C),
            0.65 (MOVi-E), 0.6 (YT-VIS), 0.9 (COCO).
        slot_valid: ``(B, S)`` bool; other slots merge with nothing.
        patch_valid: ``(B, T, N)`` bool; other patches are left out.

    Returns:
        Winners, number of merged slots and overlaps.

    Examples:
        >>> logits = torch.tensor([[[[2.0, 2.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]]])
        >>> merge_slots(logits, torch.tensor([[2, 0, 2]])).winners
        tensor([[0, 0, 2]])

    Source: SSync (arXiv 2606.15527), transitive pseudo-label merging.
    """
    iou = _temporal_iou(slot_coverage(logits, slot_valid, patch_valid).to(compute_dtype(logits.dtype)))
    return _join(iou > merge_threshold, areas, iou)


def merge_by_soft_iou(probs: Tensor, areas: Tensor, patch_valid: Tensor | None = None) -> MergeResult:
    """Finds redundant slots by the sum of smaller over that of larger probabilities (B, T, S, N).

    After Soft-IoU (arXiv 2603.11246); here its threshold splits the overlaps of a clip into groups of least variance.
    """
    flat = (probs if patch_valid is None else probs * patch_valid.unsqueeze(2)).detach().transpose(1, 2).flatten(2)
    mass, distance = flat.sum(dim=2), torch.cdist(flat, flat, p=1.0)
    mass = mass.unsqueeze(1) + mass.unsqueeze(2)
    iou = (mass - distance) / (mass + distance).clamp_min(_AREA_EPSILON)
    rows, columns = torch.triu_indices(probs.shape[2], probs.shape[2], 1, device=probs.device)
    values = iou[:, rows, columns].sort(dim=1, descending=True).values
    if values.shape[1] < 2:
        return _join(iou > 1.0, areas, iou)
    high, total = torch.arange(1, values.shape[1], device=probs.device), values.sum(dim=1, keepdim=True)
    low, summed = values.shape[1] - high, values.cumsum(dim=1)[:, :-1]
    best = (high * low * (summed / high - (total - summed) / low).square()).max(dim=1, keepdim=True).indices
    return _join(iou > values.gather(1, best + 1).unsqueeze(2), areas, iou)


def redundant_slots(maps: SSyncMaps, merge_threshold: float = 0.7) -> Tensor:
    """Finds the slot whose label each slot takes, in the maps of any host; for use after training, or without one.

    Args:
        maps: The host's maps of whole clips; those of slot attention decide.
        merge_threshold: Overlap above which two slots are redundant, in [0, 1], strict.

    Returns:
        ``(B, S)`` int64; ``relabel(labels, winners)`` merges labels ``(B, T, ...)`` of either map.

    Examples:
        >>> logits = torch.tensor([[[[2.0, 2.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]]])
        >>> winners = redundant_slots(SSyncMaps(logits, logits, grid=(2, 2)))
        >>> relabel(torch.tensor([[[0, 1, 1, 2]]]), winners)
        tensor([[[0, 0, 0, 2]]])

    Source: SSync (arXiv 2606.15527), transitive pseudo-label merging, applied to predictions.
    """
    own = slot_logits(maps.attention_logits, maps.attention_probs, 1.0, maps.slot_valid, maps.patch_valid)
    areas = slot_areas(hard_labels(own.to(compute_dtype(own.dtype))), maps.shape[2], maps.patch_valid)
    logits = own.log_softmax(2) if maps.attention_logits is None else maps.attention_logits
    return merge_slots(logits, areas, merge_threshold, maps.slot_valid, maps.patch_valid).winners


def slot_coverage(logits: Tensor, slot_valid: Tensor | None = None, patch_valid: Tensor | None = None) -> Tensor:
    """Marks the patches where a slot's logit is above that slot's mean over the whole clip.

    Args:
        logits: ``(B, T, S, N)`` raw attention logits. Log-probabilities are no substitute: the softmax removes a
            constant from every patch, and with it two thirds of what this comparison sees.
        slot_valid: ``(B, S)`` bool; other slots cover nothing.
        patch_valid: ``(B, T, N)`` bool; other patches neither count in the mean nor are covered.

    Returns:
        ``(B, T, S, N)`` bool.

    Source: SSync (arXiv 2606.15527), coverage masks of transitive merging.
    """
    logits = logits.detach()
    if patch_valid is None:
        covered = logits > logits.mean(dim=(1, 3), keepdim=True)
    else:
        valid = patch_valid[:, :, None, :]
        count = valid.sum(dim=(1, 3), keepdim=True).clamp_min(1)
        covered = (logits > logits.masked_fill(~valid, 0.0).sum(dim=(1, 3), keepdim=True) / count) & valid
    return covered if slot_valid is None else covered & slot_valid[:, None, :, None]


def _join(linked: Tensor, areas: Tensor, iou: Tensor) -> MergeResult:
    winners = torch.where(_connected(linked), areas.unsqueeze(1), -1).max(dim=2).indices
    slots = torch.arange(winners.shape[1], device=winners.device)
    return MergeResult(winners, (winners != slots).sum(dim=1), iou)


def _temporal_iou(mask: Tensor) -> Tensor:
    """(B, S, S) intersection over union of coverage (B, T, S, N) of zeros and ones, averaged over frames."""
    intersection = mask @ mask.mT
    area = intersection.diagonal(dim1=-2, dim2=-1) + _AREA_EPSILON
    return (intersection / (area.unsqueeze(-1) + area.unsqueeze(-2) - intersection)).mean(dim=1)


def _connected(adjacency: Tensor) -> Tensor:
    """(B, S, S) reachability in an undirected graph by repeated squaring: log2(S) products, no loop over nodes."""
    size, length = adjacency.shape[-1], 1
    reach = (adjacency | torch.eye(size, dtype=torch.bool, device=adjacency.device)).float()
    while length < size:
        reach = (reach @ reach).clamp_(max=1.0)
        length *= 2
    return reach > 0.5


def relabel(labels: Tensor, winners: Tensor) -> Tensor:
    """Replaces each label (B, T, ...) by its winner (B, S)."""
    return winners.gather(1, labels.flatten(1)).view_as(labels)
