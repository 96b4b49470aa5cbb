"""Tables and sentences of a comparison, out of the rows of its runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ssync_pl.compare.collect import BASELINES, number
from ssync_pl.compare.statistics import Estimate, estimate, paired_difference, verdict

__all__ = ["METRICS", "comparison_tables", "sentences", "slot_drops", "values_by_seed"]

METRICS = {
    "video_fg_ari": "video FG-ARI",
    "video_ari": "video ARI",
    "video_mbo": "video mBO",
    "video_miou": "video mIoU",
    "boundary_f": "boundary F",
    "slots_per_object": "slots per object",
    "unused_slots": "unused slots",
    "identity": "identity",
}
_SPOKEN = ("video_fg_ari", "video_ari", "video_mbo")

Rows = Sequence[Mapping[str, Any]]


def values_by_seed(rows: Rows, metric: str, **where: Any) -> dict[int, float]:
    """Values of a metric by seed.

    Args:
        rows: Rows of runs.
        metric: Name of a column.
        where: What the other columns have to hold, e.g. `variant="with"`.

    Returns:
        Seed to value; runs without one are left out.

    Example:
        >>> values_by_seed([{"variant": "with", "seed": 3, "video_mbo": 0.5}], "video_mbo", variant="with")
        {3: 0.5}
    """
    chosen = [row for row in rows if all(str(row.get(name)) == str(value) for name, value in where.items())]
    found = {int(row["seed"]): number(row.get(metric)) for row in chosen}
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def comparison_tables(rows: Rows, baseline: str, markdown: bool = False) -> str:
    """All tables and sentences of a comparison.

    Args:
        rows: Rows of runs.
        baseline: Variant that the differences are against.
        markdown: Whether tables are Markdown; else columns are lined up.

    Returns:
        The text: means, paired differences, a sentence a variant and metric, what needs no learning, and for several
        slot counts what more slots cost.

    Example:
        >>> rows = [{"set": "c", "slots": 7, "variant": "without", "seed": 0, "video_mbo": 0.5}]
        >>> print(comparison_tables(rows, "without").splitlines()[0])
        Mean over seeds ± half width of the 95 % interval
    """
    if not rows:
        return "No run is finished, so there is no table."
    metrics = [name for name in METRICS if any(math.isfinite(number(row.get(name))) for row in rows)]
    heads = ["set", "slots", "variant", "seeds", *(METRICS[name] for name in metrics)]
    draw: Callable[[Sequence[str], Sequence[Sequence[str]]], str] = _markdown if markdown else _plain
    parts = ["Mean over seeds ± half width of the 95 % interval", draw(heads, _means(rows, metrics))]
    if differences := _differences(rows, metrics, baseline):
        parts += [f"Paired differences to {baseline}, over the seeds that both have", draw(heads, differences)]
        parts.append("\n".join(sentences(rows, baseline)))
    if without_learning := _without_learning(rows, metrics):
        parts += ["What needs no learning", draw([*heads[:2], "baseline", *heads[4:]], without_learning)]
    if drops := slot_drops(rows):
        heads = ["set", "from", "to", "variant", "seeds", *(METRICS[name] for name in metrics)]
        parts += ["Change from fewer to more slots, over the seeds that both have", draw(heads, drops)]
    return "\n\n".join(parts)


def sentences(rows: Rows, baseline: str) -> list[str]:
    """Say in words how each variant does against the baseline.

    Args:
        rows: Rows of runs.
        baseline: Variant that the differences are against.

    Returns:
        A sentence for each set, slot count, variant and main metric.

    Example:
        >>> rows = [{"set": "c", "slots": 7, "variant": "with", "seed": seed, "video_mbo": 0.5} for seed in (0, 1)]
        >>> rows += [{"set": "c", "slots": 7, "variant": "without", "seed": seed, "video_mbo": 0.4} for seed in (0, 1)]
        >>> sentences(rows, "without")
        ['with: video mBO +0.100 ± 0.000 against without: up (2 seeds)']
    """
    groups = _groups(rows)
    several = len({group[:2] for group in groups}) > 1
    out = []
    for set_name, slots, variant in groups:
        if variant == baseline:
            continue
        where = f" [{set_name}, {slots} slots]" if several else ""
        for metric in _SPOKEN:
            difference = _difference(rows, metric, set_name, slots, variant, baseline)
            if difference is not None:
                seeds = "" if difference.count == 1 else f" ({difference.count} seeds)"
                out.append(
                    f"{variant}{where}: {METRICS[metric]} {difference.signed()} against {baseline}: "
                    f"{verdict(difference)}{seeds}"
                )
    return out


def slot_drops(rows: Rows) -> list[list[str]]:
    """What more slots change, for each variant.

    Args:
        rows: Rows of runs.

    Returns:
        Table rows: set, slots from, slots to, variant, seeds, then the paired change of each metric that is there.

    Example:
        >>> rows = [{"set": "c", "slots": s, "variant": "with", "seed": 0, "video_mbo": 5 / s} for s in (10, 20)]
        >>> slot_drops(rows)
        [['c', '10', '20', 'with', '1', '−0.250']]
    """
    metrics = [name for name in METRICS if any(math.isfinite(number(row.get(name))) for row in rows)]
    out = []
    for set_name, variant in dict.fromkeys((group[0], group[2]) for group in _groups(rows)):
        counts = sorted({int(group[1]) for group in _groups(rows) if (group[0], group[2]) == (set_name, variant)})
        for few, many in pairwise(counts):
            changes = []
            for metric in metrics:
                of_few = values_by_seed(rows, metric, set=set_name, slots=few, variant=variant)
                of_many = values_by_seed(rows, metric, set=set_name, slots=many, variant=variant)
                changes.append(paired_difference(of_many, of_few))
            count = max((change.count for change in changes if change), default=0)
            if count:
                out.append([set_name, str(few), str(many), variant, str(count), *(_signed(one) for one in changes)])
    return out


def _groups(rows: Rows) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys((str(row["set"]), str(row["slots"]), str(row["variant"])) for row in rows))


def _means(rows: Rows, metrics: Sequence[str]) -> list[list[str]]:
    out = []
    for set_name, slots, variant in _groups(rows):
        where = {"set": set_name, "slots": slots, "variant": variant}
        seeds = len([row for row in rows if all(str(row[name]) == value for name, value in where.items())])
        cells = [estimate(list(values_by_seed(rows, metric, **where).values())) for metric in metrics]
        out.append([set_name, slots, variant, str(seeds), *("–" if cell is None else str(cell) for cell in cells)])
    return out


def _difference(rows: Rows, metric: str, set_name: str, slots: str, variant: str, baseline: str) -> Estimate | None:
    own = values_by_seed(rows, metric, set=set_name, slots=slots, variant=variant)
    return paired_difference(own, values_by_seed(rows, metric, set=set_name, slots=slots, variant=baseline))


def _differences(rows: Rows, metrics: Sequence[str], baseline: str) -> list[list[str]]:
    out = []
    for set_name, slots, variant in _groups(rows):
        if variant == baseline:
            continue
        found = [_difference(rows, metric, set_name, slots, variant, baseline) for metric in metrics]
        count = max((one.count for one in found if one), default=0)
        if count:
            out.append([set_name, slots, variant, str(count), *(_signed(one) for one in found)])
    return out


def _without_learning(rows: Rows, metrics: Sequence[str]) -> list[list[str]]:
    out = []
    for set_name, slots in dict.fromkeys(group[:2] for group in _groups(rows)):
        own = [row for row in rows if (str(row["set"]), str(row["slots"])) == (set_name, slots)]
        for name, prefix in BASELINES.items():
            # The variants of a seed share their untrained host, so each seed counts once.
            cells = [
                estimate(
                    list(values_by_seed(own, f"{prefix}_{metric}").values())
                    if prefix == "untrained"
                    else list(values_by_seed(own, f"{prefix}_{metric}").values())[:1]
                )
                for metric in metrics
            ]
            if any(cells):
                out.append([set_name, slots, name, *("–" if cell is None else str(cell) for cell in cells)])
    return out


def _signed(difference: Estimate | None) -> str:
    return "–" if difference is None else difference.signed()


def _markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[place]) for line in (heads, *body)) for place in range(len(heads))]
    lines = [heads, *body]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
