"""The method as pure functions on tensors; nothing here knows Lightning, hosts or data."""

from ssync_pl.method.labels import hard_labels, slot_probabilities
from ssync_pl.method.loss import BackendChoice, SSyncOutput, brier_per_patch, describe_backend, ssync_loss
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.method.merging import MergeResult, merge_slots, redundant_slots, relabel, slot_coverage
from ssync_pl.method.regions import boundary_region, count_differing_neighbours, interior_region

__all__ = ["BackendChoice", "MergeResult", "SSyncMaps", "SSyncOutput"]
__all__ += ["boundary_region", "brier_per_patch", "count_differing_neighbours", "describe_backend", "hard_labels"]
__all__ += ["interior_region", "merge_slots", "redundant_slots", "relabel", "slot_coverage", "slot_probabilities"]
__all__ += ["ssync_loss"]
