"""Segmentation metrics as pure functions: labels or masks in, float64 scores out."""

from ssync_pl.metrics.functional.ari import adjusted_rand_index
from ssync_pl.metrics.functional.assignment import linear_assignment
from ssync_pl.metrics.functional.boundary import boundary_f
from ssync_pl.metrics.functional.consistency import slot_identity
from ssync_pl.metrics.functional.contingency import Contingency, contingency
from ssync_pl.metrics.functional.fragmentation import slots_per_object, unused_slots
from ssync_pl.metrics.functional.overlap import mean_best_overlap, mean_iou
from ssync_pl.metrics.functional.prepare import labels_to_masks

__all__ = [
    "Contingency",
    "adjusted_rand_index",
    "boundary_f",
    "contingency",
    "labels_to_masks",
    "linear_assignment",
    "mean_best_overlap",
    "mean_iou",
    "slot_identity",
    "slots_per_object",
    "unused_slots",
]
