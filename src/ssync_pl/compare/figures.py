"""Figures of the report, drawn with matplotlib: every seed, learning curves, and merging."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from ssync_pl.compare.results import REFERENCES
from ssync_pl.compare.tables import Group
from ssync_pl.metrics.table import METRICS, metric_names

__all__ = ["Figure", "group_figures"]

_COLORS = ("#0b84d8", "#e07b00", "#1a9e6c", "#cc5fa5", "#d8452e", "#8c6bd1", "#a6862d", "#16a3a3")
_GREY = "#808890"  # of the baseline
_WIDTH = 11.2  # of the page, in inches; an inch is 100 pixels of CSS
_MOST_BANDS = 5
_MAIN = {name: METRICS[name].title for name in metric_names("segmentation", "headline", "table")}
_CURVES = {
    "learning": {f"val/{name}": METRICS[name].title for name in metric_names("segmentation", "headline")},
    "merging": {
        "ssync/merged_slots": "merged slots",
        "ssync/used_slots": "used slots, decoder",
        "ssync/used_encoder_slots": "used slots, slot attention",
        "ssync/agreement": "agreement of the maps",
    },
}
_LOOKS: dict[Any, Any] = {
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), "#d5d9de"),
    "font.size": 9,
    "axes.titlesize": 10,
    "font.family": "DejaVu Sans",
}

Curves = Mapping[tuple[str, int], pd.DataFrame]


class Figure(NamedTuple):
    """A figure of the report: its kind, the titles of its panels, when SSync switches on, PNG and width on the page."""

    kind: str
    panels: list[str]
    starts: list[float]
    banded: bool
    png: bytes
    width: int


def group_figures(group: Group, curves: Curves) -> list[Figure]:
    """Draws paired scores, learning curves and merging of one slot count, as far as logged."""
    curved = [_curve_figure(group, curves, kind, keys) for kind, keys in _CURVES.items()]
    return [figure for figure in (_paired_figure(group), *curved) if figure is not None]


def _paired_figure(group: Group) -> Figure | None:
    """Lines from the baseline to each variant, one per seed: what the paired differences are made of."""
    scores = {key: title for key, title in _MAIN.items() if group.has(key)}
    others = [one for one in group.variants if one != group.baseline]

    def paint(axes: Any, key: str) -> None:
        base = group.by_seed(group.baseline, key)
        drawn = list(base.values())
        for place, variant in enumerate(others or [group.baseline]):
            mine = group.by_seed(variant, key) if others else {}
            drawn += mine.values()
            color = _look(group.variants, group.baseline, variant)["color"]
            ends = [place - 0.28, place + 0.28]
            common = sorted(set(mine) & set(base))
            for seed in common:
                axes.plot(ends, [base[seed], mine[seed]], color=color, lw=0.9, alpha=0.6)
            axes.plot([ends[0]] * len(base), list(base.values()), "o", ms=4, color=_GREY)
            axes.plot([ends[1]] * len(mine), list(mine.values()), "o", ms=4, color=color)
            if len(common) > 1:
                means = [float(np.mean([one[seed] for seed in common])) for one in (base, mine)]
                axes.plot(ends, means, color=color, lw=3, solid_capstyle="round")
        reach = max((max(drawn) - min(drawn)) / 2, 0.02)
        for prefix, (_, title) in REFERENCES.items():
            value = group.reference(prefix, key)
            # Far ones would press the seeds into one line; the table has them.
            if value is not None and min(drawn) - reach <= value.mean <= max(drawn) + reach:
                axes.axhline(value.mean, color="black", lw=0.9, ls=":")
                place = axes.get_yaxis_transform()
                axes.text(1.0, value.mean, title, transform=place, ha="right", va="bottom", fontsize=7)
        shown = [_plain(one) for one in others or group.variants]
        axes.set_xticks(range(len(shown)), shown, rotation=20 if len(shown) > 2 else 0)
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.6, len(shown) - 0.4)
        axes.grid(axis="x", visible=False)

    columns = 4 if len(others) < 3 else 2 if len(others) < 6 else 1
    return _draw("paired", scores, paint, columns=columns) if scores else None


def _curve_figure(group: Group, curves: Curves, kind: str, keys: Mapping[str, str]) -> Figure | None:
    """Mean and range over seeds at each step that any of them logged."""
    bands: dict[tuple[str, str], pd.DataFrame] = {}
    for variant, key in itertools.product(group.variants, keys):
        logged = [one[key].dropna() for (of, _), one in curves.items() if of == variant and key in one]
        logged = [one[~one.index.duplicated(keep="last")] for one in logged if len(one)]
        if logged:
            # A seed counts where it has begun and not ended.
            wide = pd.concat(logged, axis=1).sort_index().interpolate(method="index", limit_area="inside")
            bands[variant, key] = wide.agg(["mean", "min", "max"], axis=1)
    found = {key: label for key, label in keys.items() if any(of == key for _, of in bands)}
    shown = [variant for variant in group.variants if any(of == variant for of, _ in bands)]
    weights = [one["ssync/weight"] for one in curves.values() if "ssync/weight" in one]
    starts = sorted({float(one.index[one > 0][0]) for one in weights if (one > 0).any()})
    banded = len(shown) <= _MOST_BANDS  # those of more would cover each other

    def paint(axes: Any, key: str) -> None:
        for variant in shown:
            if (variant, key) in bands:
                band, look = bands[variant, key], _look(group.variants, group.baseline, variant)
                axes.plot(band.index, band["mean"], lw=1.8, marker="o" if len(band) <= 12 else "", ms=3, **look)
                if banded:
                    axes.fill_between(band.index, band["min"], band["max"], color=look["color"], alpha=0.15, lw=0)
        for step in starts:
            axes.axvline(step, color="black", lw=1.0, ls=":", label="SSync switches on")
        axes.set_xlabel("training step")
        axes.set_xlim(left=0)

    return _draw(kind, found, paint, starts, banded) if found else None


def _plain(text: str) -> str:
    """Keeps matplotlib from reading a name as a formula, or from leaving it out of a legend."""
    text = text.replace("$", r"\$")
    text = text if len(text) <= 24 else f"{text[:23]}…"
    return f"\u200a{text}" if text.startswith("_") else text


def _look(variants: Sequence[str], baseline: str, name: str) -> dict[str, Any]:
    """Label, colour and dashes of a variant's lines: the same in all figures."""
    place = [baseline, *(one for one in variants if one != baseline)].index(name) - 1
    color = _GREY if name == baseline else _COLORS[place % len(_COLORS)]
    dashes = "-" if place < len(_COLORS) else (0, (5, 1.5))
    return {"label": _plain(name), "color": color, "linestyle": dashes}


def _draw(
    kind: str,
    panels: Mapping[str, str],
    paint: Callable[[Any, str], None],
    starts: Sequence[float] = (),
    banded: bool = False,
    columns: int = 4,
) -> Figure:
    """Draws a panel per key of `panels`, titled with its value; `paint(axes, key)` fills it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = _WIDTH if columns != 2 or rows > 1 else 7.4
    buffer, small = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(_LOOKS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names may have letters that the font lacks
        canvas = Canvas(figsize=(width, 2.8 * rows + 0.4), dpi=130, layout="constrained")
        grid = canvas.subplots(rows, columns, squeeze=False).ravel()
        legend: dict[str, Any] = {}
        for axes, (key, label) in zip(grid, panels.items(), strict=False):
            axes.set_title(label)
            paint(axes, key)
            handles, labels = axes.get_legend_handles_labels()
            legend |= dict(zip(labels, handles, strict=True))
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        if legend:
            canvas.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=min(len(legend), 6))
        canvas.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE)
    image.save(small, format="PNG", optimize=True)
    return Figure(kind, [*panels.values()], [*starts], banded, small.getvalue(), round(width * 100))
