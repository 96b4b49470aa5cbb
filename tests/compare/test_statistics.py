import math

import numpy as np
import pytest
from scipy import stats

from ssync_pl.compare.tables import Estimate, estimate, paired_difference, verdict


def test_intervals_are_those_of_scipy_and_differences_are_paired_by_seed():
    values = np.random.default_rng(0).normal(size=7)
    low, high = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    found = estimate(list(values))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert (estimate([math.nan, 0.5]), estimate([math.nan])) == (Estimate(0.5, None, 1), None)
    interval = stats.ttest_rel([0.9, 0.3, 0.6], [0.7, 0.2, 0.5]).confidence_interval(0.95)
    found = paired_difference({0: 0.9, 1: 0.3, 2: 0.6, 7: 9.0}, {2: 0.5, 0: 0.7, 1: 0.2, 8: 9.0})
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(tuple(interval))
    assert (found.count, paired_difference({0: 1.0}, {1: 1.0})) == (3, None)


VERDICTS = [  # where more is better, less is better, and neither
    (Estimate(0.3, 0.2, 3), ["better", "worse", "more"]),
    (Estimate(-0.3, 0.2, 3), ["worse", "better", "less"]),
    (Estimate(-0.1, 0.2, 3), ["within noise"] * 3),
    (Estimate(0.0, 0.0, 3), ["within noise"] * 3),
    (Estimate(0.3, None, 1), ["one seed: no interval"] * 3),
]


@pytest.mark.parametrize(("difference", "said"), VERDICTS)
def test_verdicts(difference, said):
    assert [verdict(difference, better) for better in (1, -1, 0)] == said


def test_an_estimate_is_written_with_a_true_minus_sign():
    assert Estimate(-0.5, 0.02, 3).text() == "−0.500 ± 0.020"
    assert Estimate(0.5, None, 1).text(2, signed=True) == "+0.50"
    assert Estimate(-0.0001, 0.02, 3).text(signed=True) == "0.000 ± 0.020"
