"""The report as Markdown, with the pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ssync_pl.compare.report.figures import Figure
from ssync_pl.compare.report.html import Section
from ssync_pl.compare.report.records import Comparison
from ssync_pl.compare.report.tables import Cell, Table
from ssync_pl.compare.report.words import facts, group_sentences, headline, typed_command

__all__ = ["document", "quote"]


def quote(text: str) -> str:
    """Keep Markdown from reading a name as markup.

    Args:
        text: Any text.

    Returns:
        One line of Markdown that shows it.

    Example:
        >>> quote("a|b_c <i>")
        'a\\\\|b\\\\_c \\\\<i\\\\>'
    """
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(text.split()))


def document(
    comparison: Comparison,
    sections: Sequence[Section],
    overall: Sequence[Figure],
    notes: Sequence[str],
    sheets: Mapping[str, str],
) -> str:
    """Write the document.

    Args:
        comparison: All runs.
        sections: One a data set and slot count.
        overall: Figures over slot counts.
        notes: What the reader should know of the report itself.
        sheets: Names of files with pictures of videos, to what they show; they belong to the section whose title
            begins their text.

    Returns:
        Markdown.
    """
    lines = [f"# Comparison: {quote(comparison.name)}", "", quote(headline(comparison)), ""]
    lines += [line for note in notes for line in (f"*{quote(note)}*", "")]
    for section in sections:
        lines += [f"## {quote(section.group.title)}", ""]
        sentences = group_sentences(section.group)
        lines += [*(f"* {quote(sentence)}" for sentence in sentences), *([""] if sentences else [])]
        for table in section.tables:
            lines += _table(table)
        for figure in section.figures:
            lines += _figure(figure)
        mine = {name: text for name, text in sheets.items() if text.startswith(f"{section.group.title}: ")}
        if mine:
            lines += ["### Validation videos", ""]
            lines += [line for name, text in mine.items() for line in (f"![{quote(text)}]({name})", "")]
    if overall:
        lines += ["## Slot counts", "", *(line for figure in overall for line in _figure(figure))]
    if comparison.missing:
        lines += ["## Runs that did not finish", ""]
        lines += [*(f"* {quote(one.label)}: {quote(one.reason)}" for one in comparison.missing), ""]
    lines += ["## How to reproduce", ""]
    command = typed_command(comparison)
    lines += [*(f"    {line}" for line in command.splitlines()), ""] if command else []
    lines += [f"* {quote(name)}: {quote(text)}" for name, text in facts(comparison).items()]
    lines += [f"* {quote(name)}: {quote(text)}" for name, text in comparison.descriptions.items() if text]
    lines += ["", "[results.csv](results.csv) has a row for every run.", ""]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    lines = [f"### {quote(table.title)}", "", quote(table.caption), ""]
    lines.append(f"| | {' | '.join(map(quote, table.columns))} |")
    lines.append(f"|---|{'---|' * len(table.columns)}")
    for row in table.rows:
        lines.append(f"| {quote(row.name)} ({quote(row.note)}) | {' | '.join(map(_cell, row.cells))} |")
    return [*lines, ""]


def _cell(cell: Cell) -> str:
    if not cell.difference:
        return cell.value
    return f"{cell.value}<br>{f'**{cell.difference}**' if cell.judged else cell.difference}"


def _figure(figure: Figure) -> list[str]:
    return [
        f"### {quote(figure.title)}",
        "",
        quote(figure.caption),
        "",
        f"![{quote(figure.alt)}]({figure.name}.png)",
        "",
    ]
