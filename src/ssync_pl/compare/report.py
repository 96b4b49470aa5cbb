"""The report of a comparison: one HTML page that needs nothing beside it, its figures as PNG, and `results.csv`."""

from __future__ import annotations

import base64
import re
import shlex
from pathlib import Path
from typing import Any

import pandas as pd

from ssync_pl.compare.figures import Figure, group_figures, slots_figure
from ssync_pl.compare.results import Comparison, load_comparison
from ssync_pl.compare.statistics import judge
from ssync_pl.compare.tables import Group, group_tables, groups_of
from ssync_pl.data.files import write_bytes
from ssync_pl.metrics.table import METRICS, metric_names
from ssync_pl.tools.viz import REGION_COLORS

__all__ = ["write_report"]

_HEADLINE = metric_names("segmentation", "headline", "table")


def write_report(folder: Path) -> Path:
    """Writes `<folder>/report/`: `index.html`, its figures as PNG, and `results.csv`; returns the page's path.

    The page holds all it shows, so that it can be sent as one file. Runs that have not finished or whose files are
    damaged are listed, so that a report can be made while a comparison goes on.
    """
    import jinja2

    comparison = load_comparison(Path(folder))
    frame = comparison.frame
    baseline = str(comparison.matrix.get("baseline", "without"))
    groups = groups_of(frame, baseline)
    sections = [_section(comparison, group, _slug(group, place)) for place, group in enumerate(groups, start=1)]
    of_sets = [[group for group in groups if group.set == name] for name in dict.fromkeys(frame["set"])]
    drawn = [slots_figure(part, f"slots_{place}") for place, part in enumerate(of_sets, start=1)]
    overall = [figure for figure in drawn if figure is not None]
    table = frame.to_csv(index=False, lineterminator="\n").encode()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ssync_pl.compare", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    page = environment.get_template("report.html.j2").render(
        name=Path(folder).resolve().name,
        matrix=comparison.matrix,
        baseline=baseline,
        command=shlex.join(comparison.matrix.get("command", [])),
        finished=len(comparison.records),
        missing={key.label: why for key, why in {**comparison.missing, **comparison.damaged}.items()},
        seeds=sorted(set(frame["seed"])),
        sections=sections,
        tested=sum(len(one["sure"]) + len(one["unsure"]) for part in sections for one in part["verdicts"]),
        fewest=min((len(part) for _, part in frame.groupby(["set", "slots", "variant"])), default=0),
        overall=overall,
        regions={name: REGION_COLORS[name] for name in ("boundary", "interior", "both")},
        facts=_facts(frame, comparison.matrix),
        commands=[record.command for record in comparison.records.values()],
        table=table,
    )
    out = Path(folder) / "report"
    figures: list[Figure] = [*(figure for part in sections for figure in part["figures"]), *overall]
    # A figure of an earlier report that this one lacks would be taken for its part.
    for old in out.glob("*.png"):
        made = re.match(r"(paired|learning|losses|merging|slots)_\d", old.name)
        if made and old.stem not in {figure.name for figure in figures}:
            old.unlink()
    for figure in figures:
        write_bytes(out / f"{figure.name}.png", figure.light)
    write_bytes(out / "results.csv", table)
    return write_bytes(out / "index.html", page.encode())


def _section(comparison: Comparison, group: Group, slug: str) -> dict[str, Any]:
    keys = [key for key in comparison.records if (key.set, key.slots) == (group.set, group.slots)]
    curves = {(key.variant, key.seed): comparison.records[key].curves for key in keys}
    verdicts = [_verdict(group, variant) for variant in group.variants if variant != group.baseline]
    return {
        "group": group,
        "tables": group_tables(group),
        "paired": any(one["sure"] or one["unsure"] for one in verdicts),
        "verdicts": [one for one in verdicts if one["sure"] or one["unsure"] or one["single"]],
        "figures": group_figures(group, curves, slug),
        "videos": _videos(comparison, group),
    }


def _verdict(group: Group, variant: str) -> dict[str, Any]:
    """What differs from the baseline, what does not clearly, and what has one seed."""
    said: dict[str, Any] = {"variant": variant, "sure": [], "unsure": [], "single": []}
    for name in _HEADLINE:
        difference = group.difference(variant, name)
        if difference is not None:
            judged = judge(difference, METRICS[name].better)
            place = "single" if difference.half_width is None else "sure" if judged else "unsure"
            text = f"{METRICS[name].title} {difference.text(METRICS[name].digits, signed=True)}"
            said[place].append(f"{text} ({judged})" if judged else text)
    return said


def _videos(comparison: Comparison, group: Group) -> list[dict[str, Any]]:
    """Pictures of each video: what the variants share, then their own, of the seed that most variants have."""
    found = {
        (key.variant, key.seed): record.pictures
        for key, record in comparison.records.items()
        if (key.set, key.slots) == (group.set, group.slots) and record.pictures
    }
    if not found:
        return []
    seeds = [seed for _, seed in found]
    seed = max(sorted(set(seeds)), key=seeds.count)
    videos: dict[str, dict[str, Any]] = {}
    for variant in group.variants:
        of = next((one for one in ((variant, seed), *found) if one in found and one[0] == variant), (variant, -1))
        for video in found.get(of, []):
            shared = {title: video["columns"][title] for title in ("frame", "truth")}
            own = {title: strip for title, strip in video["columns"].items() if title not in shared}
            entry = videos.setdefault(video["key"], {"key": video["key"], "shared": shared, "variants": {}})
            entry["variants"][variant if of == (variant, seed) else f"{variant} (seed {of[1]})"] = own
    return [{**video, "seed": seed} for video in videos.values()]


def _slug(group: Group, place: int) -> str:
    # The place tells sets apart whose names differ in odd characters alone.
    name = re.sub(r"[^A-Za-z0-9-]+", "-", group.set).strip("-")[:40]
    return f"{place}_{name or 'set'}_{group.slots}"


def _facts(frame: pd.DataFrame, matrix: Any) -> dict[str, str]:
    """What the runs were made with, without what no run tells."""
    known = {name: sorted({str(one) for one in frame[name].dropna()}) for name in ("device", "torch", "date")}
    steps = sorted({int(step) for step in frame["step"].dropna()})
    seconds = frame["wall_seconds"].dropna().astype(float)
    wall = f"{seconds.sum() / 60:.1f} min in all, {seconds.min():.0f} to {seconds.max():.0f} s per run"
    found = {
        "seeds": ", ".join(str(seed) for seed in sorted(set(frame["seed"]))),
        "training steps": ", ".join(map(str, steps)),
        "wall time": wall if len(seconds) else "",
        "machine": "; ".join(known["device"]),
        "torch": ", ".join(known["torch"]),
        "ssync_pl": str(matrix.get("version", "")),
        "date": " to ".join(dict.fromkeys((known["date"][0], known["date"][-1]))) if known["date"] else "",
    }
    return {name: text for name, text in found.items() if text}
