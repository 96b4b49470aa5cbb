"""The report of a comparison: one HTML page that needs nothing beside it, and its figures as PNG."""

from __future__ import annotations

import base64
import re
import shlex
from pathlib import Path
from typing import Any

import pandas as pd

from ssync_pl.compare.figures import Figure, group_figures
from ssync_pl.compare.results import Comparison, load_comparison, write_results
from ssync_pl.compare.statistics import judge
from ssync_pl.compare.tables import Group, group_tables, groups_of
from ssync_pl.data.files import write_bytes
from ssync_pl.metrics.table import METRICS, metric_names

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
    groups = groups_of(frame, baseline)
    sections = [_section(comparison, group, place) for place, group in enumerate(groups, start=1)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ssync_pl.compare", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    page = environment.get_template("report.html.j2").render(
        name=Path(folder).resolve().name,
        matrix=matrix,
        baseline=baseline,
        command=shlex.join(matrix.get("command", [])),
        finished=len(comparison.records),
        missing={key.label: why for key, why in {**comparison.missing, **comparison.damaged}.items()},
        seeds=sorted(set(frame["seed"])),
        sections=sections,
        tested=sum(len(one["sure"]) + len(one["unsure"]) for part in sections for one in part["verdicts"]),
        fewest=min((len(part) for _, part in frame.groupby(["set", "slots", "variant"])), default=0),
        facts=_facts(frame, matrix),
        commands=[record.command for record in comparison.records.values()],
        table=write_results(Path(folder) / "results.csv", frame).read_bytes(),
    )
    figures: list[Figure] = [figure for part in sections for figure in part["figures"]]
    # A figure of an earlier report that this one lacks would be taken for its part.
    for old in out.glob("*.png"):
        if re.match(r"(paired|learning|merging)_\d", old.name) and old.stem not in {one.name for one in figures}:
            old.unlink()
    for figure in figures:
        write_bytes(out / f"{figure.name}.png", figure.png)
    return write_bytes(out / "index.html", page.encode())


def _section(comparison: Comparison, group: Group, place: int) -> dict[str, Any]:
    records = {
        (key.variant, key.seed): record
        for key, record in comparison.records.items()
        if (key.set, key.slots) == (group.set, group.slots)
    }
    verdicts = [_verdict(group, variant) for variant in group.variants if variant != group.baseline]
    # The place tells sets apart whose names differ in odd characters alone.
    name = re.sub(r"[^A-Za-z0-9-]+", "-", group.set).strip("-")[:40] or "set"
    curves = {key: record.curves for key, record in records.items()}
    sheets: dict[int, dict[str, bytes]] = {}
    for (variant, seed), record in sorted(records.items(), key=lambda one: group.variants.index(one[0][0])):
        if record.sheet is not None:
            sheets.setdefault(seed, {})[variant] = record.sheet.read_bytes()
    return {
        "group": group,
        "tables": group_tables(group),
        "paired": any(one["sure"] or one["unsure"] for one in verdicts),
        "verdicts": [one for one in verdicts if one["sure"] or one["unsure"] or one["single"]],
        "figures": group_figures(group, curves, f"{place}_{name}_{group.slots}"),
        "sheets": dict(sorted(sheets.items())[:_MOST_SEEDS]),
    }


def _verdict(group: Group, variant: str) -> dict[str, Any]:
    """What differs from the baseline, what does not clearly, and what has one seed."""
    said: dict[str, Any] = {"variant": variant, "sure": [], "unsure": [], "single": []}
    for name in metric_names("segmentation", "headline", "table"):
        difference = group.difference(variant, name)
        if difference is not None:
            judged = judge(difference, METRICS[name].better)
            place = "single" if difference.half_width is None else "sure" if judged else "unsure"
            text = f"{METRICS[name].title} {difference.text(METRICS[name].digits, signed=True)}"
            said[place].append(f"{text} ({judged})" if judged else text)
    return said


def _facts(frame: pd.DataFrame, matrix: Any) -> dict[str, str]:
    """What the runs were made with, without what no run tells."""
    titles = {"seed": "seeds", "step": "training steps", "device": "machine", "torch": "torch", "date": "date"}
    found = {title: ", ".join(map(str, sorted(set(frame[name].dropna())))) for name, title in titles.items()}
    seconds = frame["wall_seconds"].dropna().astype(float)
    if len(seconds):
        found["wall time"] = f"{seconds.sum() / 60:.1f} min, {seconds.min():.0f} to {seconds.max():.0f} s per run"
    return {name: text for name, text in {**found, "ssync_pl": str(matrix.get("version", ""))}.items() if text}
