"""Means, intervals and paired differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

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
    count = len(found)
    if count < 2:
        return Estimate(float(found[0]), None, 1) if count else None
    error = float(found.std(ddof=1)) / math.sqrt(count)
    return Estimate(float(found.mean()), float(stdtrit(count - 1, (1.0 + confidence) / 2.0)) * error, count)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95
) -> Estimate | None:
    """Computes the mean difference over the seeds that both have; None without one.

    Runs of one seed share initial weights and the order of the data, so that their difference varies less than either.
    """
    return estimate([values[seed] - baseline[seed] for seed in sorted(set(values) & set(baseline))], confidence)


def verdict(difference: Estimate | None) -> str:
    """Says `up`, `down`, `within noise` (zero lies in the interval), or why there is no verdict."""
    if difference is None:
        return "no seed in common"
    if difference.half_width is None:
        return "one seed: no interval"
    if abs(difference.mean) <= difference.half_width:
        return "within noise"
    return "up" if difference.mean > 0 else "down"


def judge(difference: Estimate | None, better: int) -> str:
    """Says `better` or `worse`, `more` or `less` where neither is better (0), or nothing without a verdict."""
    found = verdict(difference)
    if found not in ("up", "down"):
        return ""
    if better == 0:
        return "more" if found == "up" else "less"
    return "better" if (found == "up") == (better > 0) else "worse"
