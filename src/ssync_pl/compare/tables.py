"""Tables of a comparison: means with intervals, paired differences and what needs no learning."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from ssync_pl.compare.results import REFERENCES
from ssync_pl.metrics.table import MAPS, METRICS, MetricInfo, metric_names

_SHOWN = {
    **METRICS,
    **{f"{of}{name}": info for of in MAPS if of for name, info in METRICS.items() if info.both_maps},
    "merged_slots": MetricInfo("merged slots", 0, "slots", digits=2),
    "wall_seconds": MetricInfo("wall time, s", -1, "slots", digits=0),
    "cpu_seconds": MetricInfo("CPU time, s", -1, "slots", digits=0),
}
SHEETS = {
    "Segmentation": metric_names("segmentation"),
    "Slots: edges, identity, how many are in use": (*metric_names("slots"), "merged_slots"),
    "Slot attention's own map: the teacher at boundaries": tuple(n for n in _SHOWN if n.startswith("encoder_")),
    "Redundant slots merged after training": tuple(
        n for n in _SHOWN if n.startswith("merged_") and n != "merged_slots"
    ),
    "Cost of a run": ("wall_seconds", "cpu_seconds"),
}


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds with half the width of its interval, which is None with one seed."""

    mean: float
    half_width: float | None
    count: int

    def text(self, digits: int = 3, *, signed: bool = False) -> str:
        """Writes it with a true minus sign; differences also have a plus."""
        mean = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        if not mean.strip("+-0."):
            mean = mean.lstrip("+-")  # a sign of what is rounded away would say too much
        mean = mean.replace("-", "−")
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.{digits}f}"


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate | None:
    """Computes the mean over seeds with the t interval of their spread; NaN is left out, and None means no value."""
    found = np.asarray([value for value in values if math.isfinite(value)], dtype=np.float64)
    if len(found) < 2:
        return Estimate(float(found[0]), None, 1) if len(found) else None
    half_width = stats.t.ppf((1 + confidence) / 2, len(found) - 1) * stats.sem(found)
    return Estimate(float(found.mean()), float(half_width), len(found))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Computes the mean difference over the seeds that both have, which varies less than either; None without one."""
    return estimate([values[seed] - baseline[seed] for seed in sorted(set(values) & set(baseline))])


def verdict(difference: Estimate, better: int) -> str:
    """Says `better` or `worse`, `more` or `less` where neither is better (0), or why there is no saying."""
    if difference.half_width is None:
        return "one seed: no interval"
    if abs(difference.mean) <= difference.half_width:
        return "within noise"  # zero lies in the interval
    if better == 0:
        return "more" if difference.mean > 0 else "less"
    return "better" if difference.mean * better > 0 else "worse"


@dataclass(frozen=True)
class Group:
    """Rows of runs that can be compared with each other: those of one slot count."""

    slots: int
    baseline: str
    frame: pd.DataFrame

    @property
    def title(self) -> str:
        """What headings call it."""
        return f"{self.slots} slot{'' if self.slots == 1 else 's'}"

    @property
    def variants(self) -> list[str]:
        """Variants that have a run, the baseline first."""
        return sorted(dict.fromkeys(self.frame["variant"]), key=lambda name: name != self.baseline)

    def has(self, name: str) -> bool:
        """Whether any run has a value in a column."""
        return name in self.frame and bool(self.frame[name].notna().any())

    def by_seed(self, variant: str, name: str) -> dict[int, float]:
        """Returns a column of a variant by seed, for the runs that have a value."""
        if not self.has(name):
            return {}
        chosen = self.frame[self.frame["variant"] == variant].set_index("seed")[name].dropna()
        return {int(seed): float(value) for seed, value in chosen.sort_index().items()}

    def reference(self, prefix: str, name: str) -> Estimate | None:
        """Returns the score of what needs no learning; variants of a seed share it, so each seed counts once."""
        column = f"{prefix}_{name}"
        if not self.has(column):
            return None
        values = self.frame.dropna(subset=column).drop_duplicates("seed")[column].tolist()
        return estimate(values if prefix == "untrained" else values[:1])


class Cell(NamedTuple):
    """A mean, its difference to the baseline, and the verdict on that difference."""

    value: str
    difference: str = ""
    verdict: str = ""

    @property
    def judged(self) -> str:
        """The verdict where the difference is clear of zero, else nothing."""
        return self.verdict if self.verdict in ("better", "worse", "more", "less") else ""


class Row(NamedTuple):
    """A line of a table: a variant, or what needs no learning."""

    name: str
    note: str
    cells: list[Cell]
    reference: bool = False


class Table(NamedTuple):
    """A table of the report."""

    title: str
    columns: list[str]
    rows: list[Row]


def groups_of(frame: pd.DataFrame, baseline: str) -> list[Group]:
    """Splits rows of runs by slot count."""
    return [Group(int(slots), baseline, part) for slots, part in frame.groupby("slots", sort=False)]


def printed_tables(frame: pd.DataFrame, baseline: str) -> str:
    """Writes a table per slot count for a terminal: means, paired differences, what needs no learning."""
    if frame.empty:
        return "No run is finished, so there is no table."
    parts = [
        "Mean over seeds ± half width of the 95 % interval. "
        f"Below it: the paired difference to {baseline}, over the seeds that both have, with its verdict."
    ]
    for group in groups_of(frame, baseline):
        table = make_table(group, group.title, *metric_names(None, "headline", "table"))
        lines = []
        for row in table.rows:
            lines.append([row.name, row.note, *(cell.value for cell in row.cells)])
            if any(cell.difference for cell in row.cells):
                lines.append(["", "difference", *(cell.difference for cell in row.cells)])
                lines.append(["", "", *(cell.verdict for cell in row.cells)])
        parts.append(pd.DataFrame(lines, columns=[group.title, "", *table.columns]).to_string(index=False))
    return "\n\n".join(parts)


def make_table(group: Group, title: str, *names: str) -> Table:
    """Makes a table of some columns, as far as any run has them."""
    columns = {name: _SHOWN[name] for name in names if group.has(name)}
    rows = []
    for variant in group.variants:
        cells = []
        for name, info in columns.items():
            mine, base = (group.by_seed(of, name) for of in (variant, group.baseline))
            value = _text(estimate(list(mine.values())), info)
            found = None if variant == group.baseline else paired_difference(mine, base)
            said = () if found is None else (found.text(info.digits, signed=True), verdict(found, info.better))
            cells.append(Cell(value, *said))
        seeds = int((group.frame["variant"] == variant).sum())
        note = f"{seeds} seed{'' if seeds == 1 else 's'}" + (", baseline" if variant == group.baseline else "")
        rows.append(Row(variant, note, cells))
    for prefix, (_, name) in REFERENCES.items():
        cells = [Cell(_text(group.reference(prefix, key), info)) for key, info in columns.items()]
        if any(cell.value != "–" for cell in cells):
            rows.append(Row(name, "no training" if prefix == "untrained" else "no learning", cells, True))
    return Table(title, [info.title for info in columns.values()], rows)


def _text(found: Estimate | None, info: MetricInfo) -> str:
    return "–" if found is None else found.text(info.digits)
