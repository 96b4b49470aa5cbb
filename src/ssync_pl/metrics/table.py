"""The one table of metrics: every table, figure and log takes names, titles and directions from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["METRICS", "MetricInfo", "metric_names"]

Group = Literal["segmentation", "slots", "probe"]
Shown = Literal["headline", "table", "report"]


@dataclass(frozen=True)
class MetricInfo:
    """What is known about a metric besides its value.

    Args:
        title: name in tables and figures.
        better: 1 where more is better, -1 where less is, 0 where neither is.
        group: "segmentation" (scored in every validation, and for baselines), "slots" or "probe".
        shown: "headline" (sentences, curves and tables), "table" (all tables) or "report" (reports and files).
        both_maps: also reported for slot attention's map, under the name with `encoder_` before it.
        digits: digits behind the point.
    """

    title: str
    better: Literal[-1, 0, 1]
    group: Group
    shown: Shown = "report"
    both_maps: bool = False
    digits: int = 3


METRICS: dict[str, MetricInfo] = {
    "video_fg_ari": MetricInfo("video FG-ARI", 1, "segmentation", "headline", both_maps=True),
    "video_ari": MetricInfo("video ARI", 1, "segmentation", "headline", both_maps=True),
    "video_mbo": MetricInfo("video mBO", 1, "segmentation", "headline", both_maps=True),
    "video_miou": MetricInfo("video mIoU", 1, "segmentation", "table"),
    "image_fg_ari": MetricInfo("image FG-ARI", 1, "segmentation"),
    "image_ari": MetricInfo("image ARI", 1, "segmentation"),
    "image_mbo": MetricInfo("image mBO", 1, "segmentation"),
    "image_miou": MetricInfo("image mIoU", 1, "segmentation"),
    "boundary_f": MetricInfo("boundary F", 1, "slots", "table", both_maps=True),
    "identity": MetricInfo("identity kept", 1, "slots", "table"),
    "slots_per_object": MetricInfo("slots per object", 0, "slots", "table", digits=2),
    "unused_slots": MetricInfo("unused slots", 0, "slots", digits=2),
    "used_slots": MetricInfo("used slots", 0, "slots", "table", digits=2),
    "probe_position_r2": MetricInfo("position R²", 1, "probe"),
    "probe_color_r2": MetricInfo("colour R²", 1, "probe"),
    "probe_shape_accuracy": MetricInfo("shape accuracy", 1, "probe"),
}
"""Every metric by the name that logs, files and columns use, in the order of tables; logs put `val/` before it."""


def metric_names(group: Group | None = None, *shown: Shown) -> tuple[str, ...]:
    """Returns the names of a group, or of all groups with None, in the order of tables.

    Args:
        group: "segmentation", "slots", "probe" or None.
        *shown: only those shown there, e.g. "headline", "table"; none given means all.
    """
    return tuple(
        name for name, info in METRICS.items() if group in (None, info.group) and (not shown or info.shown in shown)
    )
