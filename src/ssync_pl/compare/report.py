"""The report of a comparison: one HTML page that needs nothing beside it, and its figures as PNG."""

import base64
import io
import itertools
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ssync_pl.compare.results import REFERENCES, Comparison, load_comparison
from ssync_pl.compare.runs import earlier_figures
from ssync_pl.compare.tables import SHEETS, Group, Row, groups_of, make_table
from ssync_pl.data.files import write_bytes
from ssync_pl.metrics.table import METRICS, metric_names

_MOST_SEEDS = 3  # whose sheets of pictures are shown
_COLORS = ("#0b84d8", "#e07b00", "#1a9e6c", "#cc5fa5", "#d8452e", "#8c6bd1", "#a6862d", "#16a3a3")
_GREY = "#808890"  # of the baseline
_WIDTH = 11.2  # of the page, in inches; an inch is 100 pixels of CSS
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
    png: bytes
    width: int


def write_report(folder: Path) -> Path:
    """Writes `results.csv` and `report/`, which has the figures as PNG and `index.html`, whose path it returns.

    The page holds all it shows. Runs that have not finished or are damaged are listed.
    """
    import jinja2

    comparison = load_comparison(Path(folder))
    earlier = earlier_figures(Path(folder))
    frame, matrix, out = comparison.frame, comparison.matrix, Path(folder) / "report"
    baseline = str(matrix.get("baseline", "without"))
    sections = [_section(comparison, group) for group in groups_of(frame, baseline)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ssync_pl.compare", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    # A quote keeps spreadsheets from reading a word as a formula.
    words = frame.replace(r"^([=+@\t\r\n-])", r"'\1", regex=True)
    table = words.to_csv(index=False, lineterminator="\n").encode(errors="replace")
    write_bytes(Path(folder) / "results.csv", table)
    page = environment.get_template("report.html.j2").render(
        name=Path(folder).resolve().name,
        matrix=matrix,
        baseline=baseline,
        command=shlex.join(matrix["command"]),
        finished=len(comparison.records),
        missing={key.label: why for key, why in comparison.absent.items()},
        sections=sections,
        frame=frame,
        commands=[record.command for record in comparison.records.values()],
        table=table,
    )
    figures = {f"{one.kind}_{part['group'].slots}.png": one.png for part in sections for one in part["figures"]}
    # A figure of an earlier report that this one lacks would be taken for its part.
    for old in earlier:
        if old.name not in figures:
            old.unlink()
    for name, png in figures.items():
        write_bytes(out / name, png)
    return write_bytes(out / "index.html", page.encode(errors="replace"))


def _section(comparison: Comparison, group: Group) -> dict[str, Any]:
    records = {
        (key.variant, key.seed): record for key, record in comparison.records.items() if key.slots == group.slots
    }
    tables = [make_table(group, title, *names) for title, names in SHEETS.items()]
    main = make_table(group, "", *metric_names("segmentation", "headline", "table"))
    verdicts = [_verdict(row, main.columns) for row in main.rows]
    sheets: dict[int, dict[str, bytes]] = {}
    for (variant, seed), record in sorted(records.items(), key=lambda one: group.variants.index(one[0][0])):
        if record.sheet is not None:
            sheets.setdefault(seed, {})[variant] = record.sheet
    return {
        "group": group,
        "tables": [table for table in tables if table.columns],
        "paired": any(one["sure"] or one["unsure"] for one in verdicts),
        "verdicts": [one for one in verdicts if one["sure"] or one["unsure"] or one["single"]],
        "figures": group_figures(group, {key: record.curves for key, record in records.items()}),
        "sheets": dict(sorted(sheets.items())[:_MOST_SEEDS]),
    }


def _verdict(row: Row, titles: list[str]) -> dict[str, Any]:
    """What differs from the baseline, what does not clearly, and what has one seed."""
    said: dict[str, Any] = {"variant": row.name, "sure": [], "unsure": [], "single": []}
    for title, cell in zip(titles, row.cells, strict=True):
        if cell.difference:
            place = "sure" if cell.judged else "unsure" if cell.verdict == "within noise" else "single"
            said[place].append(f"{title} {cell.difference}" + (f" ({cell.judged})" if cell.judged else ""))
    return said


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

    def paint(axes: Any, key: str) -> None:
        for variant in shown:
            if (variant, key) in bands:
                band, look = bands[variant, key], _look(group.variants, group.baseline, variant)
                axes.plot(band.index, band["mean"], lw=1.8, marker="o" if len(band) <= 12 else "", ms=3, **look)
                alpha = min(0.15, 0.75 / len(shown))  # many would cover each other
                low, high = band["min"].to_numpy(), band["max"].to_numpy()
                axes.fill_between(band.index.to_numpy(), low, high, color=look["color"], alpha=alpha, lw=0)
        for step in starts:
            axes.axvline(step, color="black", lw=1.0, ls=":", label="SSync switches on")
        axes.set_xlabel("training step")
        axes.set_xlim(left=0)

    return _draw(kind, found, paint, starts) if found else None


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
    columns: int = 4,
) -> Figure:
    """Draws a panel per key of `panels`, titled with its value; `paint(axes, key)` fills it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = _WIDTH if columns != 2 or rows > 1 else 7.4
    buffer = io.BytesIO()
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
        canvas.savefig(buffer, format="png", metadata={"Software": "ssync_pl report"})
    return Figure(kind, [*panels.values()], [*starts], buffer.getvalue(), round(width * 100))
