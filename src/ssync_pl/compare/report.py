"""The report of a comparison: one HTML page that needs nothing beside it, and its figures as PNG."""

from __future__ import annotations

import base64
import re
import shlex
from pathlib import Path
from typing import Any

import pandas as pd

from ssync_pl.compare.figures import group_figures
from ssync_pl.compare.results import Comparison, load_comparison
from ssync_pl.compare.tables import Group, Row, group_tables, groups_of, make_table
from ssync_pl.data.files import write_bytes
from ssync_pl.metrics.table import metric_names

__all__ = ["write_report"]

_MOST_SEEDS = 3  # whose sheets of pictures are shown


def write_report(folder: Path) -> Path:
    """Writes `results.csv` and `report/`, which has the figures as PNG and `index.html`, whose path it returns.

    The page holds all it shows, so that it can be sent as one file. Runs that have not finished or whose files are
    damaged are listed, so that a report can be made while a comparison goes on.
    """
    import jinja2

    comparison = load_comparison(Path(folder))
    frame, matrix, out = comparison.frame, comparison.matrix, Path(folder) / "report"
    baseline = str(matrix.get("baseline", "without"))
    sections = [_section(comparison, group) for group in groups_of(frame, baseline)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ssync_pl.compare", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    table = frame.to_csv(index=False, lineterminator="\n").encode()
    write_bytes(Path(folder) / "results.csv", table)
    page = environment.get_template("report.html.j2").render(
        name=Path(folder).resolve().name,
        matrix=matrix,
        baseline=baseline,
        command=shlex.join(matrix.get("command", [])),
        finished=len(comparison.records),
        missing={key.label: why for key, why in comparison.absent.items()},
        seeds=sorted(set(frame["seed"])),
        sections=sections,
        tested=sum(len(one["sure"]) + len(one["unsure"]) for part in sections for one in part["verdicts"]),
        fewest=min((len(part) for _, part in frame.groupby(["slots", "variant"])), default=0),
        facts=_facts(frame, matrix),
        commands=[record.command for record in comparison.records.values()],
        table=table,
    )
    figures = {f"{one.kind}_{part['group'].slots}.png": one.png for part in sections for one in part["figures"]}
    # A figure of an earlier report that this one lacks would be taken for its part.
    for old in out.glob("*.png"):
        if re.match(r"(paired|learning|merging)_\d", old.name) and old.name not in figures:
            old.unlink()
    for name, png in figures.items():
        write_bytes(out / name, png)
    return write_bytes(out / "index.html", page.encode())


def _section(comparison: Comparison, group: Group) -> dict[str, Any]:
    records = {
        (key.variant, key.seed): record for key, record in comparison.records.items() if key.slots == group.slots
    }
    main = make_table(group, "", *metric_names("segmentation", "headline", "table"))
    verdicts = [_verdict(row, main.columns) for row in main.rows]
    sheets: dict[int, dict[str, bytes]] = {}
    for (variant, seed), record in sorted(records.items(), key=lambda one: group.variants.index(one[0][0])):
        if record.sheet is not None:
            sheets.setdefault(seed, {})[variant] = record.sheet.read_bytes()
    return {
        "group": group,
        "tables": group_tables(group),
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


def _facts(frame: pd.DataFrame, matrix: Any) -> dict[str, str]:
    """What the runs were made with, without what no run tells."""
    titles = {"seed": "seeds", "step": "training steps", "device": "machine", "torch": "torch", "date": "date"}
    found = {title: ", ".join(map(str, sorted(set(frame[name].dropna())))) for name, title in titles.items()}
    seconds = frame["wall_seconds"].dropna().astype(float)
    if len(seconds):
        found["wall time"] = f"{seconds.sum() / 60:.1f} min, {seconds.min():.0f} to {seconds.max():.0f} s per run"
    return {name: text for name, text in {**found, "ssync_pl": str(matrix.get("version", ""))}.items() if text}
