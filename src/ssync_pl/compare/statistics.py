"""Means, intervals and paired differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = ["Estimate", "estimate", "judge", "paired_difference", "verdict"]


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
    """Computes the mean difference over the seeds that both have; None without one.

    Runs of one seed share initial weights and the order of the data, so that their difference varies less than either.
    """
    return estimate([values[seed] - baseline[seed] for seed in sorted(set(values) & set(baseline))])


def verdict(difference: Estimate) -> str:
    """Says `up`, `down`, `within noise` (zero lies in the interval), or that one seed has no interval."""
    if difference.half_width is None:
        return "one seed: no interval"
    if abs(difference.mean) <= difference.half_width:
        return "within noise"
    return "up" if difference.mean > 0 else "down"


def judge(difference: Estimate, better: int) -> str:
    """Says `better` or `worse`, `more` or `less` where neither is better (0), or nothing without a verdict."""
    sign = {"up": 1, "down": -1}.get(verdict(difference), 0)
    if better == 0:
        return {1: "more", -1: "less"}.get(sign, "")
    return {1: "better", -1: "worse"}.get(sign * better, "")
