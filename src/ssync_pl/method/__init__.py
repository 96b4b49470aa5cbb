"""The method as pure functions on tensors; nothing here knows Lightning, hosts or data."""

from ssync_pl.method.distill import LossKind, brier_per_patch, cross_entropy_per_patch, selected_mean
from ssync_pl.method.labels import hard_labels, mask_slots, slot_areas, slot_log_probabilities, slot_probabilities
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.method.merging import (
    MergeResult,
    component_winners,
    connected_components,
    merge_slots,
    relabel,
    slot_coverage,
    temporal_slot_iou,
)
from ssync_pl.method.regions import (
    NUM_NEIGHBOURS,
    boundary_region,
    count_differing_neighbours,
    interior_region,
)
from ssync_pl.method.ssync import BlockPath, SSyncOutput, check_options, ssync_loss

__all__ = [
    "NUM_NEIGHBOURS",
    "BlockPath",
    "LossKind",
    "MergeResult",
    "SSyncMaps",
    "SSyncOutput",
    "boundary_region",
    "brier_per_patch",
    "check_options",
    "component_winners",
    "connected_components",
    "count_differing_neighbours",
    "cross_entropy_per_patch",
    "hard_labels",
    "interior_region",
    "mask_slots",
    "merge_slots",
    "relabel",
    "selected_mean",
    "slot_areas",
    "slot_coverage",
    "slot_log_probabilities",
    "slot_probabilities",
    "ssync_loss",
    "temporal_slot_iou",
]
