"""How figures of the report are drawn: with matplotlib, once for light and once for dark pages."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["DARK", "LIGHT", "WIDTH", "Figure", "Theme", "can_draw", "draw", "legend", "panels", "plain", "style_of"]

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
