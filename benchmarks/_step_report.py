"""Statistics, table and figure of `step.py`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Overhead", "draw", "overhead", "own_share", "table"]

BASES = {**dict.fromkeys(("warm-up", "with", "auto", "dense"), "without"), "validation attached": "validation"}
OWN = ("hooks_ms", "losses_ms", "losses_backward_ms")
PHASES = ("forward_ms", "backward_ms", "optimizer_ms")
_RESAMPLES = 5000


class Overhead(NamedTuple):
    """In % of the median step without.

    Args:
        percent: The estimate.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    percent: float
    low: float
    high: float


def overhead(times: list[float], base: list[float], seed: int = 0) -> Overhead:
    """Median paired difference of rounds, in % of the base's median, with a bootstrap interval over rounds.

    Args:
        times: Step times, one a round.
        base: Step times without, of the same rounds.
        seed: Of the resampling.

    Returns:
        Estimate and 95 % interval.
    """
    mine, theirs = np.array(times), np.array(base)
    rounds = np.random.default_rng(seed).integers(0, len(mine), (_RESAMPLES, len(mine)))
    draws = 100 * np.median((mine - theirs)[rounds], axis=1) / np.median(theirs[rounds], axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Overhead(float(100 * np.median(mine - theirs) / np.median(theirs)), float(low), float(high))


def own_share(rows: list[dict[str, Any]], host: str, kind: str) -> Overhead:
    """The plug-in's own time, in % of the median step without.

    Args:
        rows: Of the benchmark.
        host: Its name.
        kind: ``"with"``, ``"auto"`` or ``"warm-up"``.

    Returns:
        Median and 95 % interval of it, by bootstrap.
    """
    own = [sum(float(row[name]) for name in OWN) for row in _of(rows, host, kind)]
    base = [float(row["step_ms"]) for row in _of(rows, host, "without")]
    # Own times are no differences: added to the base they can be treated as one.
    return overhead([a + b for a, b in zip(own, base, strict=True)], base)


def table(rows: list[dict[str, Any]]) -> str:
    """What the benchmark prints: times, overheads with intervals, and the plug-in's own time.

    Args:
        rows: Of the benchmark.

    Returns:
        Lines of text.
    """
    head = f"{'host':<13}{'step':<21}{'ms':>9}{'forward':>9}{'backward':>9}{'optim.':>8}"
    lines = [head + f"  {'overhead % [95 % interval]':<28}{'own ms':>9}  {'own % [95 % interval]'}"]
    for host in dict.fromkeys(row["host"] for row in rows):
        for kind in dict.fromkeys(row["kind"] for row in _sorted(rows, host)):
            line = f"{host:<13}{kind:<21}{_median(rows, host, kind, 'step_ms'):>9.1f}"
            for name, width in zip(PHASES, (9, 9, 8), strict=True):
                known = kind not in ("validation", "validation attached")
                line += f"{_median(rows, host, kind, name):>{width}.1f}" if known else " " * width
            if kind in BASES:
                line += f"  {_words(_overhead(rows, host, kind)):<28}"
            if kind in ("with", "warm-up", "auto"):
                own = sum(_median(rows, host, kind, name) for name in OWN)
                line += f"{own:>9.3f}  {_words(own_share(rows, host, kind))}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path, facts: dict[str, Any]) -> None:
    """Draw overheads with their intervals, and where the time of a step goes.

    Args:
        rows: Of the benchmark.
        path: The picture to write.
        facts: Of the machine, for the title.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    hosts = list(dict.fromkeys(row["host"] for row in rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.9 + 1.35 * max(len(hosts), 1.3)), width_ratios=(1.25, 1))
    kinds = {"warm-up": "tab:gray", "with": "tab:blue", "auto": "tab:cyan", "validation attached": "tab:green"}
    kinds["dense"] = "tab:red"
    names = {
        "warm-up": "attached, off",
        "with": "SSync",
        "auto": "SSync, auto",
        "validation attached": "validation, attached",
    }
    lines = [(host, kind) for host in hosts for kind in kinds if _of(rows, host, kind)]
    for place, (host, kind) in enumerate(lines):
        value = _overhead(rows, host, kind)
        spread = [[value.percent - value.low], [value.high - value.percent]]
        left.errorbar(value.percent, place, xerr=spread, fmt="o", color=kinds[kind], capsize=3)
        if kind in ("with", "warm-up", "auto"):
            left.plot(own_share(rows, host, kind).percent, place, "D", mfc="none", color=kinds[kind], ms=8)
    left.plot([], [], "o", color="black", label="by paired difference, 95 % interval")
    left.plot([], [], "D", mfc="none", color="black", ms=8, label="the plug-in's own time")
    left.set_yticks(range(len(lines)), [f"{host}: {names.get(kind, kind)}" for host, kind in lines])
    left.invert_yaxis()
    left.axvline(0, color="black", lw=0.8)
    left.set_xscale("symlog", linthresh=2, linscale=1.5)
    ticks = [-100, -10, -2, -1, 0, 1, 2, 10, 100, 1000, 10_000]
    low, high = left.get_xlim()
    left.set_xticks([tick for tick in ticks if low <= tick <= high])
    left.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    left.minorticks_off()
    left.grid(axis="x", alpha=0.3)
    left.set_xlabel("% of the same step without it (linear up to 2, logarithmic beyond)")
    left.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)

    bars = [(host, kind) for host in hosts for kind in ("without", "with", "auto", "dense") if _of(rows, host, kind)]
    start = np.zeros(len(bars))
    for name, color in zip(PHASES, ("tab:olive", "tab:orange", "tab:brown"), strict=True):
        values = np.array([_median(rows, host, kind, name) for host, kind in bars])
        right.barh(range(len(bars)), values, left=start, color=color, label=name.removesuffix("_ms"))
        start += values
    right.set_yticks(range(len(bars)), [f"{host}: {names.get(kind, kind)}" for host, kind in bars])
    right.invert_yaxis()
    right.set_xlabel("ms a training step, medians")
    right.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    figure.suptitle(
        f"A training step with and without SSync · {facts['device']}, torch {facts['torch']}, {facts['date']}, "
        f"{facts['batch_size']} clips of {facts['frames']} frames",
        fontsize=10,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _overhead(rows: list[dict[str, Any]], host: str, kind: str) -> Overhead:
    mine, base = ([float(row["step_ms"]) for row in _of(rows, host, which)] for which in (kind, BASES[kind]))
    return overhead(mine, base)


def _of(rows: list[dict[str, Any]], host: str, kind: str) -> list[dict[str, Any]]:
    mine = [row for row in rows if row["host"] == host and row["kind"] == kind]
    return sorted(mine, key=lambda row: int(row["round"]))


def _sorted(rows: list[dict[str, Any]], host: str) -> list[dict[str, Any]]:
    order = ["without", "warm-up", "with", "auto", "dense", "validation", "validation attached"]
    return sorted((row for row in rows if row["host"] == host), key=lambda row: order.index(row["kind"]))


def _median(rows: list[dict[str, Any]], host: str, kind: str, name: str) -> float:
    return statistics.median(float(row[name]) for row in _of(rows, host, kind))


def _words(value: Overhead) -> str:
    return f"{value.percent:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"
