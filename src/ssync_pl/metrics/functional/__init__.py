"""Segmentation metrics as pure functions: float64 values per video or frame, NaN where an item does not count.

`contingency(read_scene(pred, true))` counts pixels; the other functions make scores of the counts or the scene.
"""

from ssync_pl.metrics.functional.boundary import boundary_f
from ssync_pl.metrics.functional.contingency import Contingency, contingency
from ssync_pl.metrics.functional.scene import Scene, labels_to_masks, read_scene
from ssync_pl.metrics.functional.segmentation import adjusted_rand_index, mean_best_overlap, mean_iou
from ssync_pl.metrics.functional.slots import slot_identity, slots_per_object, used_slots

__all__ = ["Contingency", "Scene"]
__all__ += ["adjusted_rand_index", "boundary_f", "contingency", "labels_to_masks", "mean_best_overlap", "mean_iou"]
__all__ += ["read_scene", "slot_identity", "slots_per_object", "used_slots"]
