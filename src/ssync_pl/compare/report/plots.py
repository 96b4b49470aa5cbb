"""Figures of final scores: seed by seed, and over slot counts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssync_pl.compare.report.figures import WIDTH, Figure, Theme, draw, legend, panels, plain, style_of
from ssync_pl.compare.report.records import Comparison, Group
from ssync_pl.compare.report.scores import MAIN, REFERENCES, Score, in_words

__all__ = ["paired_figure", "slots_figure"]


def paired_figure(group: Group, name: str) -> Figure | None:
    """Lines from the baseline to each variant, one a seed: what the paired differences are made of.

    Args:
        group: Runs of one data set and slot count.
        name: Of the file.

    Returns:
        The figure; None without a score.
    """
    scores = [score for score in MAIN if any(score.key in run.values for run in group.runs)]
    others = [one for one in group.variants if one != group.baseline]
    if not scores:
        return None
    wide = max(2.6, 0.95 * len(others) + 0.9)
    columns = min(len(scores), 4 if wide <= WIDTH / 4 else 2 if wide <= WIDTH / 2 else 1)
    wide = max(wide, WIDTH / columns) if columns > 1 else wide
    longest = max((len(plain(one)) for one in group.variants), default=0)
    turned = longest * 0.075 > (wide - 0.7) / max(len(others), 1)
    height = 2.7 + (0.06 * longest if turned else 0.0)

    def paint(canvas: Any, theme: Theme) -> None:
        for axes, score in zip(panels(canvas, len(scores), columns), scores, strict=True):
            _pairs(axes, group, score, others, theme)
            names = others or list(group.variants)
            axes.set_xticks(range(len(names)), [plain(one) for one in names])
            axes.tick_params(axis="x", rotation=35 if turned else 0, length=0)
            if turned:
                for label in axes.get_xticklabels():
                    label.set_ha("right")
                    label.set_rotation_mode("anchor")
            axes.set_xlim(-0.6, len(names) - 0.4)
            axes.grid(axis="x", visible=False)
            axes.set_title(score.label)

    said = [
        f"{one} {score.label} {in_words(difference, signed=True)}"
        for one in others
        for score in scores
        if (difference := group.difference(one, score.key)) is not None
    ]
    lines = -(-len(scores) // columns)
    return draw(
        name,
        "Seed by seed",
        f"Thin lines: a seed each, from “{group.baseline}” (grey, left) to the variant (right). Thick: the mean. Lines "
        "that all go one way are a difference; lines that cross are noise. Dotted, where they are near: baselines "
        "without learning.",
        f"Paired plot against {group.baseline}: {'; '.join(said) or 'single runs'}.",
        (columns * wide, lines * height),
        paint,
    )


def _pairs(axes: Any, group: Group, score: Score, others: Sequence[str], theme: Theme) -> None:
    base = group.by_seed(group.baseline, score.key)
    drawn = []
    for place, name in enumerate(others or [group.baseline]):
        mine = group.by_seed(name, score.key) if others else {}
        color = style_of(group.variants, group.baseline, name)["color"]
        drawn += [*mine.values(), *base.values()]
        common = sorted(set(mine) & set(base))
        for seed in common:
            axes.plot([place - 0.28, place + 0.28], [base[seed], mine[seed]], color=color, lw=0.9, alpha=0.6)
        axes.plot(
            [place - 0.28] * len(base),
            list(base.values()),
            "o",
            ms=4,
            color=style_of((), group.baseline, group.baseline)["color"],
            mec=theme.paper,
            mew=0.4,
        )
        axes.plot([place + 0.28] * len(mine), list(mine.values()), "o", ms=4, color=color, mec=theme.paper, mew=0.4)
        if len(common) > 1:
            ends = [float(np.mean([one[seed] for seed in common])) for one in (base, mine)]
            axes.plot([place - 0.28, place + 0.28], ends, color=color, lw=3, solid_capstyle="round")
    if not drawn:
        return
    low, high = min(drawn), max(drawn)
    reach = max((high - low) / 2, 0.02)
    for prefix, title in REFERENCES.items():
        value = group.reference(prefix, score.key)
        # Far ones would press the seeds into one line; the table has them.
        if value is not None and low - reach <= value.mean <= high + reach:
            axes.axhline(value.mean, color=theme.ink, lw=0.9, ls=":", alpha=0.8)
            place = axes.get_yaxis_transform()
            axes.text(1.0, value.mean, title, transform=place, ha="right", va="bottom", fontsize=7, color=theme.ink)


def slots_figure(comparison: Comparison, of: str, name: str) -> Figure | None:
    """Scores over slot counts, which tell how robust a variant is against a wrong one.

    Args:
        comparison: All runs.
        of: Name of the data set.
        name: Of the file.

    Returns:
        The figure; None with one slot count or without a score.
    """
    groups = sorted((group for group in comparison.groups if group.set == of), key=lambda group: group.slots)
    scores = [score for score in MAIN if any(score.key in run.values for group in groups for run in group.runs)]
    names = [one for one in comparison.descriptions if any(one in group.variants for group in groups)]
    if len(groups) < 2 or not scores:
        return None
    counts = [group.slots for group in groups]
    labels = ", ".join(score.label for score in scores)
    apart = min(b - a for a, b in itertools.pairwise(counts))

    def paint(canvas: Any, theme: Theme) -> None:
        for axes, score in zip(panels(canvas, len(scores), min(len(scores), 4)), scores, strict=True):
            for place, one in enumerate(names):
                shift = apart * 0.25 * ((place + 0.5) / len(names) - 0.5)
                found = [(g.slots + shift, g.mean(one, score.key)) for g in groups]
                known = [(x, value.mean, value.half_width or 0.0) for x, value in found if value is not None]
                if known:
                    x, y, half = zip(*known, strict=True)
                    look = style_of(names, comparison.baseline, one)
                    axes.errorbar(x, y, yerr=half, marker="o", ms=3.5, lw=1.6, elinewidth=0.9, capsize=2.5, **look)
            axes.set_xticks(counts)
            axes.set_xlabel("slots")
            axes.set_title(score.label)
        legend(canvas, names, comparison.baseline, WIDTH)

    return draw(
        name,
        "Slot counts" if of == "default" else f"Slot counts, set {of}",
        "Means with 95 % intervals over seeds. A flat line is a variant that does not mind how many slots it has.",
        f"{labels} over {', '.join(map(str, counts))} slots for {', '.join(names)}.",
        (WIDTH, 3.2 + 0.2 * (len(names) // 6)),
        paint,
    )
