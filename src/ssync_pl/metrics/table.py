"""The one table of metrics: every table, figure and log takes names, titles and directions from here.

A new metric is a function in `functional`, a row here, and a class in `classes` if it is also used alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ssync_pl.metrics.functional.boundary import boundary_f
from ssync_pl.metrics.functional.contingency import Contingency
from ssync_pl.metrics.functional.scene import Scene
from ssync_pl.metrics.functional.segmentation import adjusted_rand_index, mean_best_overlap, mean_iou
from ssync_pl.metrics.functional.slots import slot_identity, slots_per_object, used_slots

Level = Literal["video", "image"]
Group = Literal["segmentation", "slots"]
Shown = Literal["headline", "table", "report"]


@dataclass(frozen=True)
class ScoredBatch:
    """A batch as metrics see it: pixels are read and counted once for all of them."""

    pred: Tensor
    valid: Tensor | None
    scene: Scene
    frames: Contingency
    has_background: bool

    def counts(self, level: Level) -> Contingency:
        """Returns the counts of videos `(B, ...)` or frames `(B, T, ...)`."""
        return self.frames.videos() if level == "video" else self.frames

    def objects(self, level: Level) -> Contingency:
        """Returns the counts without the background."""
        return self.counts(level).foreground() if self.has_background else self.counts(level)

    def used(self) -> Tensor:
        """Returns the number of slots in use, `(B,)`."""
        return used_slots(self.pred, self.valid)

    def fg_ari(self, level: Level) -> Tensor:
        """Returns the FG-ARI of videos or frames."""
        return adjusted_rand_index(self.objects(level))


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
    "video_fg_ari": _segmentation("video FG-ARI", lambda batch: batch.fg_ari("video"), "headline"),
    "video_ari": _segmentation("video ARI", lambda batch: adjusted_rand_index(batch.counts("video")), "headline"),
    "video_mbo": _segmentation("video mBO", lambda batch: mean_best_overlap(batch.objects("video")), "headline"),
    "video_miou": _segmentation("video mIoU", lambda batch: mean_iou(batch.objects("video")), "table"),
    "image_fg_ari": _segmentation("image FG-ARI", lambda batch: batch.fg_ari("image")),
    "image_ari": _segmentation("image ARI", lambda batch: adjusted_rand_index(batch.counts("image"))),
    "image_mbo": _segmentation("image mBO", lambda batch: mean_best_overlap(batch.objects("image"))),
    "image_miou": _segmentation("image mIoU", lambda batch: mean_iou(batch.objects("image"))),
    "boundary_f": MetricInfo(
        "boundary F", 1, "slots", lambda batch: boundary_f(batch.scene).nanmean(dim=1), "table", both_maps=True
    ),
    "identity": MetricInfo("identity kept", 1, "slots", lambda batch: slot_identity(batch.objects("image")), "table"),
    "slots_per_object": MetricInfo(
        "slots per object", 0, "slots", lambda batch: slots_per_object(batch.objects("video")), "table", digits=2
    ),
    "unused_slots": MetricInfo("unused slots", 0, "slots", lambda batch: batch.pred.shape[2] - batch.used(), digits=2),
    "used_slots": MetricInfo("used slots", 0, "slots", lambda batch: batch.used(), "table", digits=2),
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
