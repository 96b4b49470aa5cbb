"""Learning curves of the report, and what SSync did over the training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssync_pl.compare.report.figures import WIDTH, Figure, Theme, draw, legend, panels, style_of
from ssync_pl.compare.report.records import Group, Run

__all__ = ["band", "learning_figure", "losses_figure", "merging_figure", "switch_on"]

Line = NDArray[np.float64]

MOST_BANDS = 5
"""Variants with bands in one figure; those of more would cover each other."""

_LEARNING = {
    "val/video_fg_ari": "video FG-ARI",
    "val/video_ari": "video ARI",
    "val/video_mbo": "video mBO",
}
_LOSSES = {"ssync/boundary_loss": "boundary loss", "ssync/interior_loss": "interior loss", "ssync/weight": "weight"}
_MERGING = {
    "ssync/merged_slots": "merged slots",
    "ssync/used_slots": "used slots, decoder",
    "ssync/used_encoder_slots": "used slots, slot attention",
    "ssync/agreement": "agreement of the maps",
}


def switch_on(run: Run) -> float | None:
    """The step from which SSync has a weight.

    Args:
        run: A training.

    Returns:
        The first logged step with `ssync/weight` above 0; None without one.

    Example:
        >>> from pathlib import Path
        >>> switch_on(Run("c", 7, "with", 0, {}, Path("x"), {"ssync/weight": np.array([[0, 50, 100], [0, 0, 1]])}))
        100.0
    """
    curve = run.curves.get("ssync/weight")
    if curve is None:
        return None
    on = curve[0][curve[1] > 0]
    return float(on[0]) if len(on) else None


def band(runs: Sequence[Run], key: str) -> tuple[Line, Line, Line, Line] | None:
    """Mean and range over seeds, at the steps of any of them; a seed counts where it has begun and not ended.

    Args:
        runs: Trainings of one variant.
        key: Name of the logged value.

    Returns:
        Steps, means, least and largest values, each (n,); None where no run logged it.

    Example:
        >>> from pathlib import Path
        >>> curves = [np.array([[0.0, 10.0], [0.0, 1.0]]), np.array([[0.0, 10.0], [1.0, 2.0]])]
        >>> runs = [Run("c", 7, "with", s, {}, Path("x"), {"a": curve}) for s, curve in enumerate(curves)]
        >>> [line.tolist() for line in band(runs, "a")]
        [[0.0, 10.0], [0.5, 1.5], [0.0, 1.0], [1.0, 2.0]]
    """
    curves = [run.curves[key] for run in runs if key in run.curves]
    if not curves:
        return None
    steps = np.unique(np.concatenate([curve[0] for curve in curves]))
    values = np.stack([np.interp(steps, curve[0], curve[1], left=np.nan, right=np.nan) for curve in curves])
    found = np.isfinite(values)
    mean = np.where(found, values, 0.0).sum(axis=0) / found.sum(axis=0)
    return steps, mean, np.where(found, values, np.inf).min(axis=0), np.where(found, values, -np.inf).max(axis=0)


def learning_figure(group: Group, name: str) -> Figure | None:
    """Validation scores over the training.

    Args:
        group: Runs of one data set and slot count.
        name: Of the file.

    Returns:
        The figure; None where nothing was logged.
    """
    return _figure(group, name, _LEARNING, "Learning curves", "Scores of the validation videos over training steps.")


def losses_figure(group: Group, name: str) -> Figure | None:
    """SSync's two losses over the training.

    Args:
        group: Runs of one data set and slot count.
        name: Of the file.

    Returns:
        The figure; None where nothing was logged.
    """
    return _figure(
        group,
        name,
        _LOSSES,
        "SSync's losses",
        "The two terms, logged before their weight, and the weight that they were added with.",
    )


def merging_figure(group: Group, name: str) -> Figure | None:
    """What merging did over the training, and how many slots were in use.

    Args:
        group: Runs of one data set and slot count.
        name: Of the file.

    Returns:
        The figure; None where nothing was logged.
    """
    return _figure(
        group,
        name,
        _MERGING,
        "Merging and slots in use",
        "Slots that gave their label to another one, slots that own at least one patch, and the share of patches that "
        "slot attention and decoder give to the same slot.",
    )


def _figure(group: Group, name: str, keys: dict[str, str], title: str, caption: str) -> Figure | None:
    found = {key: label for key, label in keys.items() if any(key in run.curves for run in group.runs)}
    if not found:
        return None
    shown = [one for one in group.variants if any(key in run.curves for run in group.of(one) for key in found)]
    starts = _starts(group, shown)
    alike = len(set(starts.values())) == 1
    banded = len(shown) <= MOST_BANDS
    width = WIDTH if len(found) > 2 else 7.4

    def paint(canvas: Any, theme: Theme) -> None:
        from matplotlib.lines import Line2D

        for axes, (key, label) in zip(panels(canvas, len(found), len(found)), found.items(), strict=True):
            for one in shown:
                lines = band(group.of(one), key)
                if lines is not None:
                    look = style_of(group.variants, group.baseline, one)
                    mark = "o" if len(lines[0]) <= 12 else ""
                    axes.plot(lines[0], lines[1], lw=1.8, marker=mark, ms=3, **look)
                    if banded:
                        axes.fill_between(lines[0], lines[2], lines[3], color=look["color"], alpha=0.15, lw=0)
            for one, step in starts.items():
                color = style_of(group.variants, group.baseline, one)["color"]
                axes.axvline(step, color=theme.ink if alike else color, lw=1.0, ls=":")
            axes.set_title(label)
            axes.set_xlabel("training step")
            if any(len(run.curves.get(key, ())) for run in group.runs):
                axes.set_xlim(left=0)
        marks = [Line2D([], [], color=theme.ink, lw=0.9, ls=":", label="SSync switches on")] if starts else []
        legend(canvas, shown, group.baseline, width, marks)

    reading = " Lines: mean over seeds" + ("; bands: from the lowest to the highest seed." if banded else ".")
    if starts:
        steps = [f"{step:.0f}" for step in starts.values()]
        said = steps[0] if alike else ", ".join(f"{step} (“{one}”)" for one, step in zip(starts, steps, strict=True))
        reading += f" Dotted: SSync switches on, first logged at step {said}."
    alt = f"{title} over training steps: {', '.join(found.values())}, for {', '.join(shown)}."
    return draw(name, title, caption + reading, alt, (width, 3.1 + 0.2 * (len(shown) // 6)), paint)


def _starts(group: Group, shown: Sequence[str]) -> dict[str, float]:
    found = {one: [step for run in group.of(one) if (step := switch_on(run)) is not None] for one in shown}
    return {one: min(steps) for one, steps in found.items() if steps}
