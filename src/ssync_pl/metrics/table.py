"""The one table of metrics: every table, figure and log takes names, titles and directions from here.

A new metric is a function in `functional`, a row here, and a class in `classes` if it is also used alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from ssync_pl.metrics.functional.boundary import boundary_f
from ssync_pl.metrics.functional.contingency import Contingency
from ssync_pl.metrics.functional.scene import Scene
from ssync_pl.metrics.functional.segmentation import adjusted_rand_index, mean_best_overlap, mean_iou
from ssync_pl.metrics.functional.slots import slot_identity, slots_per_object, used_slots

Group = Literal["segmentation", "slots"]
Shown = Literal["headline", "table", "report"]


class ScoredBatch(NamedTuple):
    """A batch as metrics see it: pixels are read and counted once for all of them."""

    pred: Tensor
    valid: Tensor | None
    scene: Scene
    counts: Mapping[str, Contingency]  # of videos `(B, ...)` and of frames `(B, T, ...)`
    objects: Mapping[str, Contingency]  # the same without the background


Score = Callable[[ScoredBatch], Tensor]


@dataclass(frozen=True)
class MetricInfo:
    """What is known about a metric.

    Args:
        title: name in tables and figures.
        better: 1 where more is better, -1 where less is, 0 where neither is.
        group: "segmentation" (scored in every validation, and for baselines) or "slots".
        score: values per video `(B,)` or frame `(B, T)`, NaN where an item does not count; None where a metric is not
            a mean over items.
        shown: "headline" (sentences, curves and tables), "table" (all tables) or "report" (reports and files).
        both_maps: also reported for the other maps, under the name with a prefix of `MAPS` before it.
        digits: digits behind the point.
    """

    title: str
    better: Literal[-1, 0, 1]
    group: Group
    score: Score | None = None
    shown: Shown = "report"
    both_maps: bool = False
    digits: int = 3


def _segmentation(title: str, score: Score, shown: Shown = "report") -> MetricInfo:
    return MetricInfo(title, 1, "segmentation", score, shown, both_maps=shown == "headline")


METRICS: dict[str, MetricInfo] = {
    "video_fg_ari": _segmentation("video FG-ARI", lambda b: adjusted_rand_index(b.objects["video"]), "headline"),
    "video_ari": _segmentation("video ARI", lambda b: adjusted_rand_index(b.counts["video"]), "headline"),
    "video_mbo": _segmentation("video mBO", lambda b: mean_best_overlap(b.objects["video"]), "headline"),
    "video_miou": _segmentation("video mIoU", lambda b: mean_iou(b.objects["video"]), "table"),
    "image_fg_ari": _segmentation("image FG-ARI", lambda b: adjusted_rand_index(b.objects["image"])),
    "image_ari": _segmentation("image ARI", lambda b: adjusted_rand_index(b.counts["image"])),
    "image_mbo": _segmentation("image mBO", lambda b: mean_best_overlap(b.objects["image"])),
    "image_miou": _segmentation("image mIoU", lambda b: mean_iou(b.objects["image"])),
    "boundary_f": MetricInfo("boundary F", 1, "slots", lambda b: boundary_f(b.scene).nanmean(1), "table", True),
    "identity": MetricInfo("identity kept", 1, "slots", lambda b: slot_identity(b.objects["image"]), "table"),
    "slots_per_object": MetricInfo(
        "slots per object", 0, "slots", lambda b: slots_per_object(b.objects["video"]), "table", digits=2
    ),
    "unused_slots": MetricInfo(
        "unused slots", 0, "slots", lambda b: b.pred.shape[2] - used_slots(b.pred, b.valid), digits=2
    ),
    "used_slots": MetricInfo("used slots", 0, "slots", lambda b: used_slots(b.pred, b.valid), "table", digits=2),
}
"""Every metric by the name that logs, files and columns use, in the order of tables; logs put `val/` before it."""


MAPS: dict[str, str] = {
    "": "this run",
    "encoder_": "slot attention's map",
    "merged_": "merged",
    "merged_encoder_": "slot attention's, merged",
}
"""Names of the scored maps by the prefix of their scores: the decoder's, slot attention's, and these with redundant
slots merged."""


def metric_names(group: Group | None = None, *shown: Shown) -> tuple[str, ...]:
    """Returns the names of a group, or of all groups with None, in the order of tables.

    Args:
        group: "segmentation", "slots" or None.
        *shown: only those shown there, e.g. "headline", "table"; none given means all.
    """
    return tuple(
        name for name, info in METRICS.items() if group in (None, info.group) and (not shown or info.shown in shown)
    )
