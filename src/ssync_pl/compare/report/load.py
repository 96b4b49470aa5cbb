"""The folder of a comparison, read into plain data. Runs that lack files lose what these would have told."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssync_pl.compare.curves import read_curve
from ssync_pl.compare.report.scores import COLUMNS, REFERENCES
from ssync_pl.compare.statistics import Estimate, estimate, paired_difference
from ssync_pl.errors import ConfigError

__all__ = ["Comparison", "Group", "Missing", "Run", "load_comparison"]

Curve = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One finished training.

    Args:
        set: Name of its data set.
        slots: Its slots.
        variant: Name of its variant.
        seed: Its seed.
        row: Its row of `results.csv`, as text.
        folder: Where its files are.
        curves: For each logged name an array (2, n): steps and finite values.
        command: What was typed, or nothing.

    Example:
        >>> Run("c", 7, "with", 0, {"video_ari": "0.5", "identity": "nan"}, Path("x")).values
        {'video_ari': 0.5}
    """

    set: str
    slots: int
    variant: str
    seed: int
    row: Mapping[str, str]
    folder: Path
    curves: Mapping[str, Curve] = field(default_factory=dict)
    command: str = ""

    @property
    def values(self) -> dict[str, float]:
        """The numbers of its row that are finite."""
        found = {key: _number(text) for key, text in self.row.items()}
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class Missing:
    """A run that was asked for and did not finish.

    Args:
        label: Which one.
        reason: What is known of why.

    Example:
        >>> Missing("c, 7 slots, with, seed 0", "not started").reason
        'not started'
    """

    label: str
    reason: str


@dataclass(frozen=True)
class Group:
    """Runs that can be compared with each other: one data set, one slot count.

    Args:
        set: Name of the data set.
        slots: Slot count.
        variants: Names of the variants that have a run, the baseline first.
        baseline: Name of the variant that differences are against.
        runs: The runs.

    Example:
        >>> Group("default", 7, (), "without", ()).title
        '7 slots'
    """

    set: str
    slots: int
    variants: tuple[str, ...]
    baseline: str
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        """What headings call it."""
        slots = f"{self.slots} slot{'' if self.slots == 1 else 's'}"
        return slots if self.set == "default" else f"Set {self.set}, {slots}"

    def of(self, variant: str) -> list[Run]:
        """Runs of a variant, by seed.

        Args:
            variant: Its name.

        Returns:
            The runs.
        """
        return sorted((run for run in self.runs if run.variant == variant), key=lambda run: run.seed)

    def by_seed(self, variant: str, key: str) -> dict[int, float]:
        """A score of each run of a variant.

        Args:
            variant: Its name.
            key: Column of the score.

        Returns:
            Seed to value, for the runs that have one.
        """
        return {run.seed: run.values[key] for run in self.of(variant) if key in run.values}

    def mean(self, variant: str, key: str) -> Estimate | None:
        """Mean of a score with the 95 % interval over seeds.

        Args:
            variant: Its name.
            key: Column of the score.

        Returns:
            The estimate; None without a value.
        """
        return estimate(list(self.by_seed(variant, key).values()))

    def difference(self, variant: str, key: str) -> Estimate | None:
        """Mean difference to the baseline over the seeds that both have, with its 95 % interval.

        Args:
            variant: Its name.
            key: Column of the score.

        Returns:
            The estimate; None without a seed in common, and for the baseline itself.
        """
        if variant == self.baseline:
            return None
        return paired_difference(self.by_seed(variant, key), self.by_seed(self.baseline, key))

    def reference(self, prefix: str, key: str) -> Estimate | None:
        """Score of a baseline without learning.

        Args:
            prefix: One of `REFERENCES`.
            key: Column of the score.

        Returns:
            The estimate; the untrained host has one value a seed, the others one in all.
        """
        found = {run.seed: run.values[f"{prefix}_{key}"] for run in self.runs if f"{prefix}_{key}" in run.values}
        values = list(found.values())
        return estimate(values if prefix == "untrained" else values[:1])


@dataclass(frozen=True)
class Comparison:
    """All that the report tells.

    Args:
        name: Name of the folder.
        folder: The folder.
        matrix: Content of `matrix.json`.
        descriptions: Names of variants to what they are, the baseline first.
        groups: Finished runs, by data set and slot count.
        missing: Runs that did not finish.

    Example:
        >>> Comparison("x", Path("x"), {}, {"without": ""}, (), ()).baseline
        'without'
    """

    name: str
    folder: Path
    matrix: Mapping[str, Any]
    descriptions: Mapping[str, str]
    groups: tuple[Group, ...]
    missing: tuple[Missing, ...]

    @property
    def baseline(self) -> str:
        """Name of the variant that differences are against."""
        return next(iter(self.descriptions), "")

    @property
    def runs(self) -> list[Run]:
        """All finished runs."""
        return [run for group in self.groups for run in group.runs]

    @property
    def seeds(self) -> list[int]:
        """Seeds of the finished runs."""
        return sorted({run.seed for run in self.runs})


def load_comparison(folder: Path) -> Comparison:
    """Read what `ssync-pl compare` left in a folder.

    Args:
        folder: The folder; `matrix.json`, `results.csv` and files of runs may be missing.

    Returns:
        The comparison.

    Raises:
        ConfigError: There is nothing of a comparison in it.

    Example:
        >>> load_comparison(Path("none"))
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected the folder of a comparison, ... but none has no finished or planned run...
    """
    matrix = _json(folder / "matrix.json")
    runs = {(run.set, run.slots, run.variant, run.seed): run for run in _runs(folder)}
    asked = _asked(matrix)
    if not runs and not asked:
        raise ConfigError(
            f"Expected the folder of a comparison, with matrix.json or results.csv, but {folder} has no finished or "
            "planned run. Give the folder that `ssync-pl compare --out` wrote."
        )
    described = matrix.get("variants")
    known = {str(one.get("name")): str(one.get("description", "")) for one in described or [] if isinstance(one, dict)}
    names = list(dict.fromkeys([*known, *(key[2] for key in runs)]))
    wanted = str(matrix.get("baseline", "without"))
    baseline = wanted if wanted in names else names[0]
    names = [baseline, *(name for name in names if name != baseline)]
    planned = list(dict.fromkeys([*(key[:2] for key in asked), *(key[:2] for key in runs)]))
    groups = []
    for place in planned:
        mine = tuple(run for key, run in runs.items() if key[:2] == place)
        present = tuple(name for name in names if any(run.variant == name for run in mine))
        if mine:
            groups.append(Group(*place, present, baseline, mine))
    absent = [key for key in asked if key not in runs] or [key for key in _folders(folder) if key not in runs]
    missing = tuple(Missing(_label(key), _reason(_place(folder, key))) for key in absent)
    name = folder.resolve().name
    return Comparison(name, folder, matrix, {key: known.get(key, "") for key in names}, tuple(groups), missing)


Key = tuple[str, int, str, int]


def _asked(matrix: Mapping[str, Any]) -> list[Key]:
    try:
        names = [str(one["name"]) for one in matrix["variants"]]
        return [
            (str(of), int(slots), name, int(seed))
            for of in matrix["sets"]
            for slots in matrix["slots"]
            for name in names
            for seed in matrix["seeds"]
        ]
    except (KeyError, TypeError, ValueError):
        return []


def _folders(folder: Path) -> Iterator[Key]:
    for path in sorted((folder / "runs").glob("*/slots_*/*/seed_*")):
        slots, seed = path.parts[-3].removeprefix("slots_"), path.name.removeprefix("seed_")
        if slots.isdecimal() and seed.isdecimal():
            yield path.parts[-4], int(slots), path.parts[-2], int(seed)


def _place(folder: Path, key: Key) -> Path:
    return folder / "runs" / key[0] / f"slots_{key[1]}" / key[2] / f"seed_{key[3]}"


def _label(key: Key) -> str:
    return f"{key[0]}, {key[1]} slots, {key[2]}, seed {key[3]}"


def _runs(folder: Path) -> Iterator[Run]:
    rows = _rows(folder / "results.csv")
    keys = [
        *rows,
        *(key for key in _folders(folder) if key not in rows and (_place(folder, key) / "run.json").is_file()),
    ]
    for key in keys:
        place = _place(folder, key)
        facts = _json(place / "run.json")
        row = {**dict(zip(COLUMNS[:4], map(str, key), strict=True)), **_row(place, facts), **rows.get(key, {})}
        command = facts.get("command", "")
        words = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
        yield Run(*key, row, place, _curves(place / "metrics.csv"), words)


def _rows(path: Path) -> dict[Key, dict[str, str]]:
    if not path.is_file():
        return {}
    found = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            full = {name: text for name, text in row.items() if name and text}
            slots, seed = full.get("slots", ""), full.get("seed", "")
            if slots.isdecimal() and seed.isdecimal() and "variant" in full:
                found[(full.get("set", "default"), int(slots), full["variant"], int(seed))] = full
    return found


def _row(place: Path, facts: Mapping[str, Any]) -> dict[str, str]:
    """What `results.csv` would say of a run that is not in it, from the run's own files."""
    evaluation, summary = _json(place / "evaluation.json"), _json(place / "summary.json")
    lines = summary.get("rows") or {}
    row: dict[str, Any] = {"step": summary.get("step", evaluation.get("steps")), **(lines.get("this run") or {})}
    row.update(evaluation.get("scores") or {})
    for name, value in (evaluation.get("probe") or {}).items():
        row[f"probe_{name.removeprefix('probe_')}"] = value
    for prefix, title in zip(REFERENCES, ("untrained", "grid", "k-means RGB"), strict=True):
        row.update({f"{prefix}_{key}": value for key, value in (lines.get(title) or {}).items()})
    row.update({name: evaluation.get(name) for name in ("step_ms", "peak_mib")})
    row.update({name: facts.get(name) for name in ("wall_seconds", "cpu_seconds", "recipe", "device", "torch", "date")})
    return {name: str(row[name]) for name in COLUMNS if row.get(name) is not None}


def _curves(path: Path) -> dict[str, Curve]:
    points: dict[str, dict[int, float]] = {}
    for row in read_curve(path):
        for name, text in row.items():
            value = _number(text) if name.startswith(("val/", "ssync/")) else None
            if value is not None:
                points.setdefault(name, {})[int(row["step"])] = value
    return {name: np.array(sorted(found.items()), dtype=np.float64).T for name, found in points.items()}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _reason(place: Path) -> str:
    try:
        lines = (place / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "not started"
    said = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).strip() for line in lines if line.strip()]
    return f"did not finish; its log ends with: {said[-1][:300]}" if said else "did not finish; its log is empty"
