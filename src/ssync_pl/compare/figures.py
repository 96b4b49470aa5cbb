"""Figures of the report, drawn with matplotlib once for light and once for dark pages."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from ssync_pl.compare.tables import REFERENCE_TITLES, Group
from ssync_pl.metrics.table import METRICS, metric_names

__all__ = ["Figure", "group_figures", "slots_figure"]

_COLORS = (
    *("#0b84d8", "#e07b00", "#1a9e6c", "#cc5fa5", "#d8452e", "#8c6bd1"),
    *("#a6862d", "#5f9e1f", "#d93b87", "#16a3a3", "#6f86a8", "#b5651d"),
)
_GREY = "#808890"
_WIDTH = 11.2  # of the page, in inches; an inch is 100 pixels of CSS
_MOST_BANDS = 5
_THEMES = {  # paper, ink, faint lines
    "light": ("#ffffff", "#1b1f24", "#d5d9de"),
    "dark": ("#171b21", "#e4e7eb", "#3a414b"),
}
_MAIN = {name: METRICS[name].title for name in metric_names("segmentation", "headline", "table")}
_CURVES = {
    "learning": (
        {f"val/{name}": METRICS[name].title for name in metric_names("segmentation", "headline")},
        "Learning curves",
        "Scores of the validation videos over training steps.",
    ),
    "losses": (
        {"ssync/boundary_loss": "boundary loss", "ssync/interior_loss": "interior loss", "ssync/weight": "weight"},
        "SSync's losses",
        "The two terms, logged before their weight, and the weight that they were added with.",
    ),
    "merging": (
        {
            "ssync/merged_slots": "merged slots",
            "ssync/used_slots": "used slots, decoder",
            "ssync/used_encoder_slots": "used slots, slot attention",
            "ssync/agreement": "agreement of the maps",
        },
        "Merging and slots in use",
        "Slots that gave their label to another one, slots that own at least one patch, and the share of patches that "
        "slot attention and decoder give to the same slot.",
    ),
}

Curves = Mapping[tuple[str, int], pd.DataFrame]


class Figure(NamedTuple):
    """A figure of the report: its file's name, heading, how to read it, what it shows, PNGs and width on the page."""

    name: str
    title: str
    caption: str
    alt: str
    light: bytes
    dark: bytes
    width: int


def group_figures(group: Group, curves: Curves, slug: str) -> list[Figure]:
    """Draws paired scores, learning curves, losses and merging of one data set and slot count, as far as logged."""
    made = [_paired_figure(group, f"paired_{slug}")]
    made += [_curve_figure(group, curves, f"{name}_{slug}", *of) for name, of in _CURVES.items()]
    return [figure for figure in made if figure is not None]


def slots_figure(groups: Sequence[Group], name: str) -> Figure | None:
    """Draws scores over the slot counts of one data set; None with one slot count or without a score."""
    groups = sorted(groups, key=lambda group: group.slots)
    scores = {key: title for key, title in _MAIN.items() if any(group.has(key) for group in groups)}
    if len(groups) < 2 or not scores:
        return None
    variants = list(dict.fromkeys(variant for group in groups for variant in group.variants))
    counts = [group.slots for group in groups]
    baseline = groups[0].baseline
    apart = min(b - a for a, b in itertools.pairwise(counts))

    def paint(canvas: Any, ink: str) -> None:
        for axes, (key, title) in zip(_panels(canvas, len(scores), len(scores)), scores.items(), strict=True):
            for place, variant in enumerate(variants):
                shift = apart * 0.25 * ((place + 0.5) / len(variants) - 0.5)
                found = [(group.slots + shift, group.mean(variant, key)) for group in groups]
                known = [(x, value.mean, value.half_width or 0.0) for x, value in found if value is not None]
                if known:
                    x, y, half = zip(*known, strict=True)
                    look = _style(variants, baseline, variant)
                    axes.errorbar(x, y, yerr=half, marker="o", ms=3.5, lw=1.6, elinewidth=0.9, capsize=2.5, **look)
            axes.set_xticks(counts)
            axes.set_xlabel("slots")
            axes.set_title(title)
        _legend(canvas, variants, baseline, _WIDTH)

    return _draw(
        name,
        "Slot counts" if groups[0].set == "default" else f"Slot counts, set {groups[0].set}",
        "Means with 95 % intervals over seeds. A flat line is a variant that does not mind how many slots it has.",
        f"{', '.join(scores.values())} over {', '.join(map(str, counts))} slots for {', '.join(variants)}.",
        (_WIDTH, 3.2 + 0.2 * (len(variants) // 6)),
        paint,
    )


def _paired_figure(group: Group, name: str) -> Figure | None:
    """Lines from the baseline to each variant, one per seed: what the paired differences are made of."""
    scores = {key: title for key, title in _MAIN.items() if group.has(key)}
    others = [one for one in group.variants if one != group.baseline]
    shown = [_plain(one) for one in others or group.variants]
    if not scores:
        return None
    width = max(2.6, 0.95 * len(others) + 0.9)
    columns = min(len(scores), 4 if width <= _WIDTH / 4 else 2 if width <= _WIDTH / 2 else 1)
    width = max(width, _WIDTH / columns) if columns > 1 else width
    longest = max(map(len, shown))
    turned = longest * 0.075 > (width - 0.7) / max(len(others), 1)

    def paint(canvas: Any, ink: str) -> None:
        for axes, (key, title) in zip(_panels(canvas, len(scores), columns), scores.items(), strict=True):
            _pairs(axes, group, key, others, ink)
            turn: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if turned else {}
            axes.set_xticks(range(len(shown)), shown, **turn)
            axes.tick_params(axis="x", length=0)
            axes.set_xlim(-0.6, len(shown) - 0.4)
            axes.grid(axis="x", visible=False)
            axes.set_title(title)

    height = 2.7 + (0.06 * longest if turned else 0.0)
    return _draw(
        name,
        "Seed by seed",
        f"Thin lines: one per seed, from “{group.baseline}” (grey, left) to the variant (right). Thick: the mean. "
        "Lines that all go one way are a difference; lines that cross are noise. Dotted, where they are near: "
        "baselines without learning.",
        f"{', '.join(scores.values())} of each seed, from {group.baseline} to {', '.join(others) or 'nothing else'}.",
        (columns * width, -(-len(scores) // columns) * height),
        paint,
    )


def _pairs(axes: Any, group: Group, key: str, others: Sequence[str], ink: str) -> None:
    base = group.by_seed(group.baseline, key)
    drawn = list(base.values())
    for place, variant in enumerate(others or [group.baseline]):
        mine = group.by_seed(variant, key) if others else {}
        color = _style(group.variants, group.baseline, variant)["color"]
        drawn += mine.values()
        common = sorted(set(mine) & set(base))
        ends = [place - 0.28, place + 0.28]
        for seed in common:
            axes.plot(ends, [base[seed], mine[seed]], color=color, lw=0.9, alpha=0.6)
        axes.plot([ends[0]] * len(base), list(base.values()), "o", ms=4, color=_GREY)
        axes.plot([ends[1]] * len(mine), list(mine.values()), "o", ms=4, color=color)
        if len(common) > 1:
            means = [float(np.mean([one[seed] for seed in common])) for one in (base, mine)]
            axes.plot(ends, means, color=color, lw=3, solid_capstyle="round")
    if not drawn:
        return
    reach = max((max(drawn) - min(drawn)) / 2, 0.02)
    for prefix, title in REFERENCE_TITLES.items():
        value = group.reference(prefix, key)
        # Far ones would press the seeds into one line; the table has them.
        if value is not None and min(drawn) - reach <= value.mean <= max(drawn) + reach:
            axes.axhline(value.mean, color=ink, lw=0.9, ls=":", alpha=0.8)
            place = axes.get_yaxis_transform()
            axes.text(1.0, value.mean, title, transform=place, ha="right", va="bottom", fontsize=7, color=ink)


def _curve_figure(
    group: Group, curves: Curves, name: str, keys: Mapping[str, str], title: str, caption: str
) -> Figure | None:
    """Mean and range over seeds at each step that any of them logged."""
    bands: dict[tuple[str, str], pd.DataFrame] = {}
    for variant in group.variants:
        for key in keys:
            logged = [one[key].dropna() for (of, _), one in curves.items() if of == variant and key in one]
            logged = [one[~one.index.duplicated(keep="last")] for one in logged if len(one)]
            if logged:
                # A seed counts where it has begun and not ended.
                wide = pd.concat(logged, axis=1).sort_index().interpolate(method="index", limit_area="inside")
                bands[variant, key] = pd.DataFrame({"mean": wide.mean(1), "low": wide.min(1), "high": wide.max(1)})
    found = {key: label for key, label in keys.items() if any(of == key for _, of in bands)}
    if not found:
        return None
    shown = [variant for variant in group.variants if any(of == variant for of, _ in bands)]
    starts = {variant: step for variant in shown if (step := _switch_on(variant, curves)) is not None}
    alike = len(set(starts.values())) == 1
    width = _WIDTH if len(found) > 2 else 7.4

    def paint(canvas: Any, ink: str) -> None:
        from matplotlib.lines import Line2D

        for axes, (key, label) in zip(_panels(canvas, len(found), len(found)), found.items(), strict=True):
            for variant in shown:
                look = _style(group.variants, group.baseline, variant)
                if (variant, key) in bands:
                    band = bands[variant, key]
                    axes.plot(band.index, band["mean"], lw=1.8, marker="o" if len(band) <= 12 else "", ms=3, **look)
                    if len(shown) <= _MOST_BANDS:  # those of more would cover each other
                        axes.fill_between(band.index, band["low"], band["high"], color=look["color"], alpha=0.15, lw=0)
                if variant in starts:
                    axes.axvline(starts[variant], color=ink if alike else look["color"], lw=1.0, ls=":")
            axes.set_title(label)
            axes.set_xlabel("training step")
            axes.set_xlim(left=0)
        marks = [Line2D([], [], color=ink, lw=0.9, ls=":", label="SSync switches on")] if starts else []
        _legend(canvas, shown, group.baseline, width, marks)

    caption += " Lines: mean over seeds"
    caption += "; bands: from the lowest to the highest seed." if len(shown) <= _MOST_BANDS else "."
    if starts:
        said = sorted(set(starts.values()))
        caption += f" Dotted: SSync switches on, first logged at step {', '.join(f'{step:.0f}' for step in said)}."
    alt = f"{title} over training steps: {', '.join(found.values())}, for {', '.join(shown)}."
    return _draw(name, title, caption, alt, (width, 3.1 + 0.2 * (len(shown) // 6)), paint)


def _switch_on(variant: str, curves: Curves) -> float | None:
    """The first logged step at which SSync has a weight."""
    weights = [one["ssync/weight"] for (of, _), one in curves.items() if of == variant and "ssync/weight" in one]
    return min((float(one.index[one > 0][0]) for one in weights if (one > 0).any()), default=None)


def _plain(text: str) -> str:
    """Keeps matplotlib from reading a name as a formula, or from leaving it out of a legend."""
    text = text.replace("$", r"\$")
    text = text if len(text) <= 24 else f"{text[:23]}…"
    return f"\u200a{text}" if text.startswith("_") else text


def _style(variants: Sequence[str], baseline: str, name: str) -> dict[str, Any]:
    """Colour and dashes of a variant's lines: the same in all figures."""
    if name == baseline:
        return {"color": _GREY, "linestyle": "-"}
    place = [one for one in variants if one != baseline].index(name)
    return {"color": _COLORS[place % len(_COLORS)], "linestyle": "-" if place < 6 else (0, (5, 1.5))}


def _panels(canvas: Any, count: int, columns: int) -> list[Any]:
    axes = canvas.subplots(-(-count // columns), columns, squeeze=False).ravel()
    for place in axes[count:]:
        place.set_axis_off()
    return list(axes[:count])


def _legend(canvas: Any, names: Sequence[str], baseline: str, width: float, marks: Sequence[Any] = ()) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], lw=2, label=_plain(name), **_style(names, baseline, name)) for name in names]
    handles += marks
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(width / (0.62 + 0.075 * longest))))
    canvas.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.4)


def _draw(
    name: str, title: str, caption: str, alt: str, size: tuple[float, float], paint: Callable[[Any, str], None]
) -> Figure:
    light, dark = (_render(size, paint, *theme) for theme in _THEMES.values())
    return Figure(name, title, caption, alt, light, dark, round(size[0] * 100))


def _render(size: tuple[float, float], paint: Callable[[Any, str], None], paper: str, ink: str, faint: str) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    looks: dict[Any, Any] = {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), paper),
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), faint),
        **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
        **dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False),
        "font.size": 9,
        "axes.titlesize": 10,
        "font.family": "DejaVu Sans",
    }
    buffer = io.BytesIO()
    with mpl.rc_context(looks), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names may have letters that the font lacks
        canvas = Canvas(figsize=size, dpi=130, layout="constrained")
        paint(canvas, ink)
        canvas.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE)
    small = io.BytesIO()
    image.save(small, format="PNG", optimize=True)
    return small.getvalue()
