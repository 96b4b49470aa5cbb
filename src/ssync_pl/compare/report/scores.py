"""The numbers of a run that the report shows, and how each is written."""

from __future__ import annotations

from dataclasses import dataclass

from ssync_pl.compare.collect import COLUMNS as RUN_COLUMNS
from ssync_pl.compare.statistics import Estimate

__all__ = ["COLUMNS", "MAIN", "REFERENCES", "SCORES", "SHEETS", "Score", "in_words"]


@dataclass(frozen=True)
class Score:
    """A column of `results.csv`.

    Args:
        key: Name of the column.
        label: What tables and figures call it.
        better: 1 where more is better, -1 where less is, 0 where neither is.
        sheet: Which of the tables it is in.
        digits: Digits behind the point.

    Example:
        >>> Score("video_ari", "video ARI", 1, "scores").digits
        3
    """

    key: str
    label: str
    better: int
    sheet: str
    digits: int = 3


SCORES = (
    Score("video_fg_ari", "video FG-ARI", 1, "scores"),
    Score("video_ari", "video ARI", 1, "scores"),
    Score("video_mbo", "video mBO", 1, "scores"),
    Score("video_miou", "video mIoU", 1, "scores"),
    Score("image_fg_ari", "image FG-ARI", 1, "scores"),
    Score("image_ari", "image ARI", 1, "scores"),
    Score("image_mbo", "image mBO", 1, "scores"),
    Score("image_miou", "image mIoU", 1, "scores"),
    Score("boundary_f", "boundary F", 1, "slots"),
    Score("identity", "identity kept", 1, "slots"),
    Score("probe_position_r2", "position R²", 1, "slots"),
    Score("probe_color_r2", "colour R²", 1, "slots"),
    Score("probe_shape_accuracy", "shape accuracy", 1, "slots"),
    Score("slots_per_object", "slots an object", 0, "slots", 2),
    Score("unused_slots", "unused slots", 0, "slots", 2),
    Score("used_slots", "used slots", 0, "slots", 2),
    Score("merged_slots", "merged slots", 0, "slots", 2),
    Score("encoder_video_fg_ari", "video FG-ARI", 1, "encoder"),
    Score("encoder_video_ari", "video ARI", 1, "encoder"),
    Score("encoder_video_mbo", "video mBO", 1, "encoder"),
    Score("encoder_boundary_f", "boundary F", 1, "encoder"),
    Score("step_ms", "step, ms", -1, "cost", 1),
    Score("peak_mib", "peak memory, MiB", -1, "cost", 0),
    Score("wall_seconds", "wall time, s", -1, "cost", 0),
    Score("cpu_seconds", "CPU time, s", -1, "cost", 0),
)
"""All of them, in the order of the tables."""

MAIN = tuple(score for score in SCORES if score.key in ("video_fg_ari", "video_ari", "video_mbo", "video_miou"))
"""Those that the verdict and the paired figure are about."""

SHEETS = {
    "scores": "Segmentation",
    "slots": "Slots: edges, identity, what they tell about objects, how many are in use",
    "encoder": "Slot attention's own map: the teacher at boundaries",
    "cost": "Cost of a run",
}
"""Titles of the tables."""

REFERENCES = {"untrained": "untrained host", "grid": "fixed grid", "kmeans_rgb": "k-means on RGB"}
"""Baselines without learning: prefix of their columns, and name."""

_REFERENCE_SCORES = [score.key for score in SCORES if score.sheet == "scores"] + ["used_slots"]
COLUMNS = (*RUN_COLUMNS, *(f"{prefix}_{key}" for prefix in REFERENCES for key in _REFERENCE_SCORES))
"""Columns of `results.csv`."""


def in_words(value: Estimate, digits: int = 3, *, signed: bool = False) -> str:
    """Write an estimate with a true minus sign.

    Args:
        value: Mean with half width, or without one.
        digits: Digits behind the point.
        signed: Whether a plus is written, as differences have it.

    Returns:
        The text.

    Example:
        >>> in_words(Estimate(-0.5, 0.02, 3)), in_words(Estimate(0.5, None, 1), signed=True)
        ('−0.500 ± 0.020', '+0.500')
    """
    mean = f"{value.mean:{'+' if signed else ''}.{digits}f}"
    if not mean.strip("+-0."):
        mean = mean.lstrip("+-")  # a sign of what is rounded away would say too much
    mean = mean.replace("-", "−")
    return mean if value.half_width is None else f"{mean} ± {value.half_width:.{digits}f}"
