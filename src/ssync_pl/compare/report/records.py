"""What a comparison holds, as plain data with the statistics that the report shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssync_pl.compare.statistics import Estimate, estimate, paired_difference

__all__ = ["Comparison", "Group", "Missing", "Run", "number"]

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
        found = {key: number(text) for key, text in self.row.items()}
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


def number(text: str) -> float | None:
    """Read a number.

    Args:
        text: What stands in a file.

    Returns:
        The number; None where there is none that is finite.

    Example:
        >>> number("0.5"), number("nan"), number("")
        (0.5, None, None)
    """
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
