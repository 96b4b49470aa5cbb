from __future__ import annotations

import collections

import numpy as np
import pytest

from ssync_pl.data import sampling
from ssync_pl.data.loader import EvalSampler, TrainSampler
from ssync_pl.errors import ConfigError


def test_permutation_is_a_function_of_seed_and_pass():
    orders = {(seed, epoch): sampling.permutation(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    # Written down so that a change of NumPy or of this code, which would change resumed runs, is noticed.
    assert sampling.permutation(8, 0, 0).tolist() == [5, 7, 3, 2, 6, 4, 0, 1]


def test_permutation_has_no_favourite_place():
    places = np.array([np.argsort(sampling.permutation(10, 0, epoch))[3] for epoch in range(2000)])
    counts = np.bincount(places, minlength=10)
    assert counts.min() > 140
    assert counts.max() < 260


def test_draws_depend_on_everything_and_cover_all_starts():
    base = sampling.draw_clip("a/7", 0, 0, 0, 1000, 0.5)
    assert base == sampling.draw_clip("a/7", 0, 0, 0, 1000, 0.5)
    others = [
        sampling.draw_clip("a/8", 0, 0, 0, 1000, 0.5),
        sampling.draw_clip("a/7", 1, 0, 0, 1000, 0.5),
        sampling.draw_clip("a/7", 0, 1, 0, 1000, 0.5),
        sampling.draw_clip("a/7", 0, 0, 1, 1000, 0.5),
    ]
    assert len({draw.start for draw in [base, *others]}) == 5
    draws = [sampling.draw_clip("a/7", 0, 0, epoch, 5, 0.25) for epoch in range(4000)]
    starts = collections.Counter(draw.start for draw in draws)
    assert set(starts) == set(range(5))
    assert min(starts.values()) > 700
    assert 0.22 < np.mean([draw.flip for draw in draws]) < 0.28
    assert all(0 <= draw.top < 1 and 0 <= draw.left < 1 for draw in draws)
    assert not any(sampling.draw_clip("a/7", 0, 0, epoch, 1, 0.0).flip for epoch in range(50))
    assert all(sampling.draw_clip("a/7", 0, 0, epoch, 1, 1.0).flip for epoch in range(50))


@pytest.mark.parametrize(("rank", "world"), [(-1, 1), (1, 1), (0, 0)])
@pytest.mark.parametrize("sampler", [TrainSampler, EvalSampler])
def test_ranks_out_of_range(sampler, rank, world):
    with pytest.raises(ConfigError, match="rank"):
        sampler(4, rank=rank, world=world)
