"""The report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ssync_pl.compare.report.figures import Figure
from ssync_pl.compare.report.pictures import Column, Video
from ssync_pl.compare.report.records import Comparison, Group
from ssync_pl.compare.report.style import STYLE
from ssync_pl.compare.report.tables import Cell, Table
from ssync_pl.compare.report.words import SHORT, facts, group_sentences, headline, typed_command
from ssync_pl.tools.viz import REGION_COLORS

__all__ = ["Section", "anchor", "page"]


@dataclass(frozen=True)
class Section:
    """What the report shows of one data set and slot count.

    Args:
        group: The runs.
        tables: Their tables.
        figures: Their figures.
        videos: Their pictures.

    Example:
        >>> Section(Group("c", 7, (), "without", ()), (), (), ()).group.title
        'Set c, 7 slots'
    """

    group: Group
    tables: Sequence[Table]
    figures: Sequence[Figure]
    videos: Sequence[Video]


def anchor(place: int) -> str:
    """Name by which links find a section.

    Args:
        place: Its place among the sections.

    Returns:
        The name.

    Example:
        >>> anchor(0)
        'part-1'
    """
    return f"part-{place + 1}"


def page(
    comparison: Comparison, sections: Sequence[Section], overall: Sequence[Figure], notes: Sequence[str], csv: bytes
) -> str:
    """Write the page.

    Args:
        comparison: All runs.
        sections: One a data set and slot count.
        overall: Figures over slot counts.
        notes: What the reader should know of the report itself.
        csv: Content of `results.csv`, for the link to it.

    Returns:
        HTML.
    """
    links = [(anchor(place), section.group.title) for place, section in enumerate(sections)]
    links += [("slot-counts", "Slot counts")] if overall else []
    links += [("missing", "Runs that did not finish")] if comparison.missing else []
    links += [("again", "How to reproduce")]
    # What the headline quotes is not said again.
    listed = sum(len(group_sentences(section.group)) for section in sections) > SHORT
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(comparison.name)}: comparison</title><style>{STYLE}</style></head><body>",
        f"<header><h1>Comparison: {escape(comparison.name)}</h1>",
        f'<p class="lead">{_prose(headline(comparison))}</p>',
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
        '<nav aria-label="Sections"><ul>',
        *(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title in links),
        "</ul></nav></header><main>",
        *(_section(section, place, listed) for place, section in enumerate(sections)),
    ]
    if overall:
        parts += ['<section id="slot-counts"><h2>Slot counts</h2>', *map(_figure, overall), "</section>"]
    if comparison.missing:
        parts += ['<section id="missing"><h2>Runs that did not finish</h2><ul>']
        parts += [f"<li>{escape(one.label)}: {escape(one.reason)}</li>" for one in comparison.missing]
        parts += ["</ul></section>"]
    parts += [_again(comparison, csv), "</main></body></html>\n"]
    return "\n".join(parts)


def _section(section: Section, place: int, listed: bool) -> str:
    group = section.group
    parts = [f'<section id="{anchor(place)}"><h2>{escape(group.title)}</h2>']
    sentences = group_sentences(group)
    if sentences and listed:
        parts += ['<ul class="verdicts">', *(f"<li>{_prose(sentence)}</li>" for sentence in sentences), "</ul>"]
    parts += [_table(table) for table in section.tables]
    parts += [_figure(figure) for figure in section.figures]
    if section.videos:
        inner = [_legend(), *(_video(video) for video in section.videos)]
        parts.append("<h3>Validation videos</h3>")
        # Several groups make a long page; the pictures of the first are open.
        if place == 0:
            parts += inner
        else:
            parts += ["<details><summary>Show the videos</summary>", *inner, "</details>"]
    return "\n".join([*parts, "</section>"])


def _scroll(label: str, content: str) -> str:
    hint = '<p class="hint" aria-hidden="true">scroll sideways →</p>'
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{hint}{content}</div>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    lines = []
    for row in table.rows:
        kind = ' class="reference"' if row.reference else ""
        name = f'<th scope="row">{escape(row.name)}<small>{escape(row.note)}</small></th>'
        lines.append(f"<tr{kind}>{name}{''.join(map(_cell, row.cells))}</tr>")
    caption = f"<caption><span>{escape(table.caption)}</span></caption>"
    body = f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f"<h3>{escape(table.title)}</h3>" + _scroll(
        f"Table: {table.title}", f'<table class="numbers">{caption}{body}</table>'
    )


def _cell(cell: Cell) -> str:
    if not cell.difference:
        return f"<td>{escape(cell.value)}</td>"
    if not cell.judged:
        return f"<td>{escape(cell.value)}<small>{escape(cell.difference)}</small></td>"
    said = f'<span class="unseen"> ({cell.judged})</span>'
    return f'<td>{escape(cell.value)}<small class="{cell.judged}"><b>{escape(cell.difference)}</b>{said}</small></td>'


def _figure(figure: Figure) -> str:
    dark = f'<source media="screen and (prefers-color-scheme: dark)" srcset="{_data(figure.dark)}">'
    image = f'<img src="{_data(figure.light)}" width="{figure.width}" alt="{escape(figure.alt)}">'
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
    picture = _scroll(f"Figure: {figure.title}", f"<picture>{dark}{image}</picture>")
    return f"<figure><h3>{escape(figure.title)}</h3>{caption}{picture}</figure>"


def _legend() -> str:
    colors = [(REGION_COLORS[name], name) for name in ("boundary", "interior", "both")]
    swatches = "".join(
        f'<span class="key"><span class="swatch" style="background:rgb{color}"></span>{escape(name)}</span> '
        for color, name in colors
    )
    return (
        '<p class="note">Each row is a moment of the video. Slots have the colour of the object of the truth that they '
        "match best; the slot of the background is grey, slots without an object are pale. Regions, where SSync would "
        f"teach: {swatches}</p>"
    )


def _video(video: Video) -> str:
    first = "".join(
        f'<th scope="col" rowspan="2" class="{column.title}">{escape(column.title)}</th>' for column in video.columns
    )
    names, kinds = "", ""
    cells = "".join(_picture(column, f"{column.title} of video {video.key}", column.title) for column in video.columns)
    for name, columns in video.variants.items():
        names += f'<th scope="colgroup" colspan="{len(columns)}" class="first">{escape(name)}</th>'
        for place, column in enumerate(columns):
            kind = "first" if place == 0 else ""
            kinds += f'<th scope="col" class="{kind}">{escape(column.title)}</th>'
            cells += _picture(column, f"{name}: {column.title} of video {video.key}", kind)
    head = f"<thead><tr>{first}{names}</tr><tr>{kinds}</tr></thead>"
    caption = f"<caption><span>Video {escape(video.key)}, seed {video.seed}</span></caption>"
    table = f'<table class="videos">{caption}{head}<tbody><tr>{cells}</tr></tbody></table>'
    return _scroll(f"Pictures of video {video.key}", table)


def _picture(column: Column, alt: str, kind: str) -> str:
    width = column.frames.shape[2]
    return f'<td class="{kind}"><img src="{_data(column.png)}" width="{width}" alt="{escape(alt)}"></td>'


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _again(comparison: Comparison, csv: bytes) -> str:
    parts = ['<section id="again"><h2>How to reproduce</h2>']
    command = typed_command(comparison)
    if command:
        parts += ["<p>The whole comparison; runs that are there already are kept.</p>", _code(command)]
    parts += ["<dl>", *(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in facts(comparison).items()), "</dl>"]
    described = [(name, text) for name, text in comparison.descriptions.items() if text]
    if described:
        parts += ["<h3>Variants</h3><dl>"]
        parts += [*(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in described), "</dl>"]
    single = [run.command for run in comparison.runs if run.command]
    if single:
        shown = "\n\n".join(dict.fromkeys(single))
        parts.append(_fold(f"Commands of the {len(single)} runs", [_code(shown)]))
    config = comparison.matrix.get("config")
    texts = [config] if isinstance(config, str) else [str(text) for text in config or []]
    if texts:
        parts.append(_fold("Configuration", map(_code, texts)))
    link = f"data:text/csv;base64,{base64.b64encode(csv).decode()}"
    parts.append(f'<p><a download="results.csv" href="{link}">results.csv</a>: a row for every run.</p></section>')
    return "\n".join(parts)


def _prose(text: str) -> str:
    return escape(text.replace(" ± ", "\u00a0±\u00a0"))  # a number stays on one line


def _code(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def _fold(title: str, content: Iterable[str]) -> str:
    return f"<details><summary>{escape(title)}</summary>{''.join(content)}</details>"
