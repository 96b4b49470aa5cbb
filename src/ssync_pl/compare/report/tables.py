"""Tables of the report as plain data; HTML and Markdown only write them down."""

from __future__ import annotations

from dataclasses import dataclass

from ssync_pl.compare.report.records import Group
from ssync_pl.compare.report.scores import REFERENCES, SCORES, SHEETS, Score, in_words
from ssync_pl.compare.statistics import Estimate, verdict

__all__ = ["Cell", "Row", "Table", "group_tables", "judge"]


@dataclass(frozen=True)
class Cell:
    """A number of a table.

    Args:
        value: Mean and half width, or a dash.
        difference: The paired difference to the baseline, or nothing.
        judged: Of `judge`.

    Example:
        >>> Cell("0.500").difference
        ''
    """

    value: str
    difference: str = ""
    judged: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Args:
        name: Of the variant or baseline.
        note: What is said beside the name.
        cells: One a column.
        reference: Whether it is a baseline without learning.

    Example:
        >>> Row("with", "3 seeds", ()).reference
        False
    """

    name: str
    note: str
    cells: tuple[Cell, ...]
    reference: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Args:
        title: Its heading.
        caption: How to read it.
        columns: Headings of the numbers.
        rows: Its lines.

    Example:
        >>> Table("Cost", "", (), ()).rows
        ()
    """

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def judge(difference: Estimate | None, better: int) -> str:
    """Say what a difference means for a score.

    Args:
        difference: To the baseline.
        better: 1 where more is better, -1 where less is, 0 where neither is.

    Returns:
        `better` or `worse`, `more` or `less` where neither is better, or nothing: the interval holds zero, or there
        is no interval.

    Example:
        >>> judge(Estimate(0.1, 0.05, 5), 1), judge(Estimate(0.1, 0.05, 5), -1), judge(Estimate(0.1, 0.2, 5), 1)
        ('better', 'worse', '')
    """
    found = verdict(difference)
    if found not in ("up", "down"):
        return ""
    up = found == "up"
    if better == 0:
        return "more" if up else "less"
    return "better" if up == (better > 0) else "worse"


_COST = " A step is the median of the later half of a training. A warm-up that runs share is in the time of each."


def group_tables(group: Group) -> list[Table]:
    """Tables of a data set and slot count, without columns and tables that have no number.

    Args:
        group: The runs.

    Returns:
        The tables of `SHEETS`.
    """
    tables = []
    for sheet, title in SHEETS.items():
        found = [score for score in SCORES if score.sheet == sheet and _known(group, score)]
        if not found:
            continue
        rows = [_variant(group, name, found) for name in group.variants]
        rows += [_reference(group, prefix, name, found) for prefix, name in REFERENCES.items()]
        rows = [row for row in rows if not row.reference or any(cell.value != "–" for cell in row.cells)]
        caption = _caption(group) + (_COST if sheet == "cost" else "")
        tables.append(Table(title, caption, tuple(score.label for score in found), tuple(rows)))
    return tables


def _known(group: Group, score: Score) -> bool:
    return any(score.key in run.values for run in group.runs)


def _variant(group: Group, name: str, scores: list[Score]) -> Row:
    cells = []
    for score in scores:
        mean, difference = group.mean(name, score.key), group.difference(name, score.key)
        text = "" if difference is None else in_words(difference, score.digits, signed=True)
        cells.append(Cell("–" if mean is None else in_words(mean, score.digits), text, judge(difference, score.better)))
    seeds = len(group.of(name))
    note = f"{seeds} seed{'' if seeds == 1 else 's'}" + (", baseline" if name == group.baseline else "")
    return Row(name, note, tuple(cells))


def _reference(group: Group, prefix: str, name: str, scores: list[Score]) -> Row:
    found = [(group.reference(prefix, score.key), score.digits) for score in scores]
    cells = tuple(Cell("–" if value is None else in_words(value, digits)) for value, digits in found)
    return Row(name, "no training" if prefix == "untrained" else "no learning", cells, True)


def _caption(group: Group) -> str:
    paired = any(
        len(set(group.by_seed(n, s.key)) & set(group.by_seed(group.baseline, s.key))) > 1
        for n in group.variants
        if n != group.baseline
        for s in SCORES
    )
    if not paired:
        return "One run each: no interval. Below it: the difference to the baseline with the same seed."
    return (
        "Mean over seeds ± half width of its 95 % t interval. Below it: the mean difference to the baseline with the "
        "same seed, in bold where its interval is clear of zero."
    )
