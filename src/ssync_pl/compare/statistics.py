"""Means, intervals and paired differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ssync_pl.errors import ConfigError

__all__ = ["Estimate", "estimate", "paired_difference", "t_quantile", "verdict"]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval.

    Args:
        mean: The mean.
        half_width: Half the width of its interval; None with one seed.
        count: Number of seeds.

    Example:
        >>> str(Estimate(0.5, 0.02, 3)), str(Estimate(0.5, None, 1))
        ('0.500 ± 0.020', '0.500')
    """

    mean: float
    half_width: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.half_width is None else f"{self.mean:.3f} ± {self.half_width:.3f}"

    def signed(self) -> str:
        """Write it as a difference.

        Returns:
            The mean with its sign, and the half width.

        Example:
            >>> Estimate(0.5, 0.02, 3).signed()
            '+0.500 ± 0.020'
        """
        text = f"{self.mean:+.3f}".replace("-", "−")
        return text if self.half_width is None else f"{text} ± {self.half_width:.3f}"


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, by bisection of its exact distribution function.

    Args:
        probability: In [0.5, 1).
        degrees: Degrees of freedom, at least 1.

    Returns:
        The value below which a draw lies with this probability.

    Raises:
        ConfigError: An argument is out of range.

    Example:
        >>> round(t_quantile(0.975, 4), 4)
        2.7764

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    if not 0.5 <= probability < 1.0 or degrees < 1:
        raise ConfigError(
            "Expected argument `probability` to be in [0.5, 1) and `degrees` to be at least 1, but got "
            f"{probability} and {degrees}."
        )
    inside = 2.0 * probability - 1.0
    # In the angle the distribution has no tail, so that the bisection needs no upper bound.
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _inside(middle, degrees) < inside else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _inside(angle: float, degrees: int) -> float:
    """Probability of |t| < sqrt(degrees) tan(angle)."""
    cosine = math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2.0 / math.pi * (angle + total) if odd else total


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate | None:
    """Mean of the seeds' values with the t interval of their spread.

    Args:
        values: One value a seed; NaN is left out.
        confidence: Of the interval, in (0, 1).

    Returns:
        The estimate; None without a value.

    Example:
        >>> str(estimate([0.1, 0.2, 0.3]))
        '0.200 ± 0.248'
    """
    found = np.asarray([value for value in values if math.isfinite(value)], dtype=np.float64)
    count = len(found)
    if count == 0:
        return None
    if count == 1:
        return Estimate(float(found[0]), None, 1)
    error = float(found.std(ddof=1)) / math.sqrt(count)
    return Estimate(float(found.mean()), t_quantile((1.0 + confidence) / 2.0, count - 1) * error, count)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95
) -> Estimate | None:
    """Mean difference over the seeds that both have.

    Runs of one seed share initial weights and the order of the data, so that their difference varies less than either.

    Args:
        values: Seed to value.
        baseline: The same of the baseline.
        confidence: Of the interval, in (0, 1).

    Returns:
        The difference; None without a seed in common.

    Example:
        >>> str(paired_difference({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.6, 2: 0.9}))
        '0.100 ± 0.000'
    """
    common = sorted(set(values) & set(baseline))
    return estimate([values[seed] - baseline[seed] for seed in common], confidence)


def verdict(difference: Estimate | None) -> str:
    """Say what a difference means.

    Args:
        difference: Of `paired_difference`.

    Returns:
        `up`, `down`, `within noise` (zero lies in the interval), or why there is no verdict.

    Example:
        >>> verdict(Estimate(0.1, 0.05, 5)), verdict(Estimate(0.1, 0.2, 5)), verdict(Estimate(0.1, None, 1))
        ('up', 'within noise', 'one seed: no interval')
    """
    if difference is None:
        return "no seed in common"
    if difference.half_width is None:
        return "one seed: no interval"
    if abs(difference.mean) <= difference.half_width:
        return "within noise"
    return "up" if difference.mean > 0 else "down"
