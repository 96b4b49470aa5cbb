"""The method as pure functions on tensors; nothing here knows Lightning, hosts or data."""

from ssync_pl.functional.dense_alignment import (
    DenseAlignment,
    DenseAlignmentOutput,
    decoder_consistency,
    encoder_consistency,
    slot_redundancy,
)
from ssync_pl.functional.distill import LossKind, brier_per_patch, cross_entropy_per_patch, selected_mean
from ssync_pl.functional.labels import hard_labels, mask_slots, slot_areas, slot_log_probabilities, slot_probabilities
from ssync_pl.functional.merging import (
    MergeResult,
    component_winners,
    connected_components,
    merge_slots,
    relabel,
    slot_coverage,
    temporal_slot_iou,
)
from ssync_pl.functional.regions import (
    NUM_NEIGHBOURS,
    boundary_region,
    count_differing_neighbours,
    interior_region,
)
from ssync_pl.functional.slot_contrast import slot_contrast_loss
from ssync_pl.functional.ssync import BlockPath, SSyncOutput, check_options, ssync_loss
from ssync_pl.functional.temporal_similarity import temporal_similarity, temporal_similarity_loss

__all__ = [
    "NUM_NEIGHBOURS",
    "BlockPath",
    "DenseAlignment",
    "DenseAlignmentOutput",
    "LossKind",
    "MergeResult",
    "SSyncOutput",
    "boundary_region",
    "brier_per_patch",
    "check_options",
    "component_winners",
    "connected_components",
    "count_differing_neighbours",
    "cross_entropy_per_patch",
    "decoder_consistency",
    "encoder_consistency",
    "hard_labels",
    "interior_region",
    "mask_slots",
    "merge_slots",
    "relabel",
    "selected_mean",
    "slot_areas",
    "slot_contrast_loss",
    "slot_coverage",
    "slot_log_probabilities",
    "slot_probabilities",
    "slot_redundancy",
    "ssync_loss",
    "temporal_similarity",
    "temporal_similarity_loss",
    "temporal_slot_iou",
]
