import math

import numpy as np
import pytest
from scipy import stats

from ssync_pl.compare.statistics import Estimate, estimate, paired_difference, t_quantile, verdict
from ssync_pl.errors import ConfigError


@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.95, 0.975, 0.995, 0.9999])
def test_quantiles_are_those_of_scipy(probability):
    for degrees in [*range(1, 41), 99, 100, 1000]:
        assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("probability", "degrees"), [(0.4, 3), (1.0, 3), (0.9, 0)])
def test_quantiles_out_of_range(probability, degrees):
    with pytest.raises(ConfigError, match="to be in"):
        t_quantile(probability, degrees)


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(0).normal(size=7)
    low, high = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    found = estimate(list(values))
    assert found.mean - found.half_width == pytest.approx(low)
    assert found.mean + found.half_width == pytest.approx(high)


def test_missing_values_are_left_out():
    assert estimate([math.nan, 0.5]) == Estimate(0.5, None, 1)
    assert estimate([math.nan]) is None
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_a_difference_is_paired_by_seed():
    ours, theirs = {0: 0.9, 1: 0.3, 2: 0.6, 7: 9.0}, {2: 0.5, 0: 0.7, 1: 0.2, 8: 9.0}
    test = stats.ttest_rel([0.9, 0.3, 0.6], [0.7, 0.2, 0.5])
    interval = test.confidence_interval(0.95)
    found = paired_difference(ours, theirs)
    assert found.count == 3
    assert found.mean - found.half_width == pytest.approx(interval.low)
    assert found.mean + found.half_width == pytest.approx(interval.high)


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (Estimate(0.3, 0.2, 3), "up"),
        (Estimate(-0.3, 0.2, 3), "down"),
        (Estimate(-0.1, 0.2, 3), "within noise"),
        (Estimate(0.0, 0.0, 3), "within noise"),
        (Estimate(0.3, None, 1), "one seed: no interval"),
        (None, "no seed in common"),
    ],
)
def test_verdicts(difference, text):
    assert verdict(difference) == text
