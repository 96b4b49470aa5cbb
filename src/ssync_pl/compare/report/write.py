"""`write_report`: from the folder of a comparison to its report."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from ssync_pl.compare.report.curves import learning_figure, losses_figure, merging_figure
from ssync_pl.compare.report.figures import Figure, can_draw
from ssync_pl.compare.report.html import Section, page
from ssync_pl.compare.report.load import load_comparison
from ssync_pl.compare.report.markdown import document
from ssync_pl.compare.report.pictures import group_videos, video_sheet
from ssync_pl.compare.report.plots import paired_figure, slots_figure
from ssync_pl.compare.report.records import Comparison, Group, Run
from ssync_pl.compare.report.scores import COLUMNS
from ssync_pl.compare.report.tables import group_tables
from ssync_pl.data.files import write_bytes

__all__ = ["results_csv", "write_report"]


def write_report(folder: Path) -> Path:
    """Write `<folder>/report/`: `index.html`, `report.md`, `results.csv` and the figures and pictures as PNG.

    The page holds all it shows: it can be sent as one file. Runs that have not finished yet are listed, so that a
    report can be looked at while a comparison goes on.

    Args:
        folder: What `ssync-pl compare --out` wrote.

    Returns:
        Path of `index.html`.

    Raises:
        ConfigError: There is nothing of a comparison in the folder.

    Example:
        >>> write_report(Path("none"))
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected the folder of a comparison, ... but none has no finished or planned run...
    """
    comparison = load_comparison(Path(folder))
    out = Path(folder) / "report"
    drawn = can_draw()
    sections = [_section(group, _slug(group, place), drawn) for place, group in enumerate(comparison.groups)]
    overall = _overall(comparison) if drawn else []
    notes = [] if drawn else ["Without figures: they need matplotlib. Run `pip install ssync-pl[bench]` and ask again."]
    table = results_csv(comparison.runs)
    files = {f"{f.name}.png": f.light for f in [*(f for s in sections for f in s.figures), *overall]}
    sheets: dict[str, str] = {}
    for place, section in enumerate(sections):
        for number, video in enumerate(section.videos, start=1):
            name = f"videos_{_slug(section.group, place)}_{number}.png"
            sheets[name] = f"{section.group.title}: video {video.key}"
            files[name] = video_sheet(video)
    # What an earlier report showed and this one does not would be taken for its part.
    for old in out.glob("*.png"):
        if old.name not in files:
            old.unlink()
    for name, content in files.items():
        write_bytes(out / name, content)
    write_bytes(out / "results.csv", table)
    write_bytes(out / "report.md", document(comparison, sections, overall, notes, sheets).encode())
    return write_bytes(out / "index.html", page(comparison, sections, overall, notes, table).encode())


def results_csv(runs: Sequence[Run]) -> bytes:
    """The rows that the report is made of.

    Args:
        runs: The runs.

    Returns:
        CSV: known columns first, then any that the rows have beside them.

    Example:
        >>> row = {"set": "c", "slots": "7", "variant": "with", "seed": "0"}
        >>> results_csv([Run("c", 7, "with", 0, row, Path("x"))]).decode().splitlines()[1][:11]
        'c,7,with,0,'
    """
    further = [name for name in dict.fromkeys(name for run in runs for name in run.row) if name not in COLUMNS]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*COLUMNS, *further], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(run.row for run in runs)
    return text.getvalue().encode()


def _slug(group: Group, place: int) -> str:
    # The place tells sets apart whose names differ in odd characters alone.
    name = re.sub(r"[^A-Za-z0-9-]+", "-", group.set).strip("-")[:40]
    return f"{place + 1}_{name or 'set'}_{group.slots}"


def _section(group: Group, slug: str, drawn: bool) -> Section:
    made: list[Figure | None] = []
    if drawn:
        made.append(paired_figure(group, f"paired_{slug}"))
        made.append(learning_figure(group, f"learning_{slug}"))
        made.append(losses_figure(group, f"losses_{slug}"))
        made.append(merging_figure(group, f"merging_{slug}"))
    figures = [figure for figure in made if figure is not None]
    return Section(group, group_tables(group), figures, group_videos(group))


def _overall(comparison: Comparison) -> list[Figure]:
    sets = list(dict.fromkeys(group.set for group in comparison.groups))
    figures = [slots_figure(comparison, of, f"slots_{place + 1}") for place, of in enumerate(sets)]
    return [figure for figure in figures if figure is not None]
