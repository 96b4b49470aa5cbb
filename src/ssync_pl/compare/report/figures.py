"""Figures of the report: drawn with matplotlib, once for light and once for dark pages."""

from __future__ import annotations

import importlib.util
import io
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ssync_pl.compare.report.load import Comparison, Group
from ssync_pl.compare.report.scores import MAIN, REFERENCES, Score, in_words
from ssync_pl.compare.statistics import estimate

__all__ = ["DARK", "LIGHT", "Figure", "Theme", "can_draw", "draw", "paired_figure", "plain", "slots_figure", "style_of"]

_COLORS = (
    *("#0b84d8", "#e07b00", "#1a9e6c", "#cc5fa5", "#d8452e", "#8c6bd1"),
    *("#a6862d", "#5f9e1f", "#d93b87", "#16a3a3", "#6f86a8", "#b5651d"),
)
_GREY = "#808890"
_DPI = 130
WIDTH = 11.2
"""Of a figure as wide as the page, in inches; an inch is 100 pixels of CSS."""


@dataclass(frozen=True)
class Theme:
    """Colours of a page.

    Args:
        paper: Background.
        ink: Lines and text.
        faint: Grid.

    Example:
        >>> LIGHT.paper
        '#ffffff'
    """

    paper: str
    ink: str
    faint: str


LIGHT = Theme("#ffffff", "#1b1f24", "#d5d9de")
DARK = Theme("#171b21", "#e4e7eb", "#3a414b")


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Args:
        name: Of its file, without the ending.
        title: Its heading.
        caption: How to read it.
        alt: What it shows, for those who do not see it.
        light: PNG for light pages and for paper.
        dark: PNG for dark pages.
        width: Width on the page, in pixels of CSS.

    Example:
        >>> Figure("a", "A", "", "", b"", b"", 100).width
        100
    """

    name: str
    title: str
    caption: str
    alt: str
    light: bytes
    dark: bytes
    width: int


def can_draw() -> bool:
    """Tell whether matplotlib is installed.

    Returns:
        True when `import matplotlib` would find a package.

    Example:
        >>> isinstance(can_draw(), bool)
        True
    """
    return importlib.util.find_spec("matplotlib") is not None


def plain(text: str) -> str:
    """Keep matplotlib from reading a name as a formula, or from leaving it out of a legend.

    Args:
        text: Any text.

    Returns:
        The text to give to matplotlib.

    Example:
        >>> plain("a$b$")
        'a\\\\$b\\\\$'
    """
    text = text.replace("$", r"\$")
    text = text if len(text) <= 24 else f"{text[:23]}…"
    return f"\u200a{text}" if text.startswith("_") else text


def style_of(group_variants: Sequence[str], baseline: str, name: str) -> dict[str, Any]:
    """Colour and dashes of a variant's lines: the same in all figures.

    Args:
        group_variants: Names of all variants, in their order.
        baseline: Name of the baseline, which is grey.
        name: Of the variant.

    Returns:
        Keywords of matplotlib's `plot`.

    Example:
        >>> style_of(["without", "with"], "without", "with")["color"]
        '#0b84d8'
    """
    if name == baseline:
        return {"color": _GREY, "linestyle": "-"}
    place = [one for one in group_variants if one != baseline].index(name)
    return {"color": _COLORS[place % len(_COLORS)], "linestyle": "-" if place < 6 else (0, (5, 1.5))}


def draw(
    name: str,
    title: str,
    caption: str,
    alt: str,
    size: tuple[float, float],
    paint: Callable[[Any, Theme], None],
) -> Figure:
    """Draw a figure for both kinds of page.

    Args:
        name: Of its file.
        title: Its heading.
        caption: How to read it.
        alt: What it shows.
        size: Width and height in inches.
        paint: Draws on an empty figure of matplotlib.

    Returns:
        The figure.
    """
    light, dark = (_render(size, paint, theme) for theme in (LIGHT, DARK))
    return Figure(name, title, caption, alt, light, dark, round(size[0] * 100))


def _render(size: tuple[float, float], paint: Callable[[Any, Theme], None], theme: Theme) -> bytes:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    colors: dict[Any, Any] = {
        **{f"{part}.facecolor": theme.paper for part in ("figure", "axes", "savefig")},
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.ink),
        "axes.edgecolor": theme.faint,
        "grid.color": theme.faint,
        "legend.facecolor": theme.paper,
    }
    looks: dict[Any, Any] = {
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.grid": True,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.family": "DejaVu Sans",
    }
    buffer = io.BytesIO()
    with mpl.rc_context({**colors, **looks}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names may have letters that the font lacks
        canvas = Canvas(figsize=size, dpi=_DPI, layout="constrained")
        agg = FigureCanvasAgg(canvas)
        paint(canvas, theme)
        agg.draw()  # `savefig` would draw twice, and write colours that nobody can tell apart
        pixels = np.asarray(agg.buffer_rgba())[..., :3]
    image = Image.fromarray(np.ascontiguousarray(pixels)).quantize(256, method=Image.Quantize.FASTOCTREE)
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def panels(canvas: Any, count: int, columns: int) -> list[Any]:
    """Axes side by side and below each other.

    Args:
        canvas: A figure of matplotlib.
        count: Number of axes.
        columns: Axes in a line.

    Returns:
        The axes; places that are left over stay empty.
    """
    lines = -(-count // columns)
    axes = canvas.subplots(lines, columns, squeeze=False).ravel()
    for place in axes[count:]:
        place.set_axis_off()
    return list(axes[:count])


def legend(canvas: Any, names: Sequence[str], baseline: str, width: float, marks: Sequence[Any] = ()) -> None:
    """Put one legend below all axes.

    Args:
        canvas: A figure of matplotlib.
        names: Variants, in their order.
        baseline: Name of the baseline.
        width: Of the figure, in inches.
        marks: Further handles.
    """
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], lw=2, label=plain(name), **style_of(names, baseline, name)) for name in names]
    handles += marks
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(width / (0.62 + 0.075 * longest))))
    canvas.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.4)


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
        axes.plot([place - 0.28] * len(base), list(base.values()), "o", ms=4, color=_GREY, mec=theme.paper, mew=0.4)
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
    apart = min(b - a for a, b in itertools.pairwise(counts))

    def paint(canvas: Any, theme: Theme) -> None:
        for axes, score in zip(panels(canvas, len(scores), min(len(scores), 4)), scores, strict=True):
            for place, one in enumerate(names):
                shift = apart * 0.25 * ((place + 0.5) / len(names) - 0.5)
                found = [(g.slots + shift, estimate(list(g.by_seed(one, score.key).values()))) for g in groups]
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
        f"{join_labels(scores)} over {', '.join(map(str, counts))} slots for {', '.join(names)}.",
        (WIDTH, 3.2 + 0.2 * (len(names) // 6)),
        paint,
    )


def join_labels(scores: Sequence[Score]) -> str:
    """Labels of scores with commas between them.

    Args:
        scores: The scores.

    Returns:
        The text.
    """
    return ", ".join(score.label for score in scores)
