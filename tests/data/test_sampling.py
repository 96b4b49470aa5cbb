from __future__ import annotations

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssync_pl.data import sampling
from ssync_pl.data.loader import EvalSampler, TrainSampler
from ssync_pl.errors import ConfigError

COUNTS = st.integers(1, 60)
WORLDS = st.integers(1, 5)


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


@settings(max_examples=60, deadline=None)
@given(count=COUNTS, world=WORLDS, epoch=st.integers(0, 3))
def test_train_shares_are_disjoint_equal_and_drop_only_the_tail(count, world, epoch):
    shares = [sampling.train_share(count, 7, epoch, rank, world).tolist() for rank in range(world)]
    assert {len(share) for share in shares} == {count // world}
    union = [item for share in shares for item in share]
    assert len(union) == len(set(union)) == count - count % world
    assert set(union) <= set(range(count))


@settings(max_examples=60, deadline=None)
@given(count=COUNTS, world=WORLDS)
def test_eval_shares_cover_once_and_pad(count, world):
    real, total = [], []
    for rank in range(world):
        items, mask = sampling.eval_share(count, rank, world)
        real += items[mask].tolist()
        total.append(len(items))
        assert ((items >= 0) & (items < count)).all()
    assert sorted(real) == list(range(count))
    assert set(total) == {-(-count // world)}


@settings(max_examples=100, deadline=None)
@given(count=COUNTS, world=WORLDS, pad=st.booleans())
def test_contiguous_shares_cover(count, world, pad):
    shares = [sampling.contiguous_share(count, rank, world, pad=pad) for rank in range(world)]
    positions = [position for first, end in shares for position in range(first, end)]
    assert positions == list(range(-(-count // world) * world if pad else count - count % world))


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


def test_train_sampler_carries_the_pass():
    samplers = [TrainSampler(7, seed=3, rank=rank, world=2) for rank in (0, 1)]
    for epoch in (0, 1, 5):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        indices = [list(sampler) for sampler in samplers]
        assert [len(each) for each in indices] == [len(sampler) for sampler in samplers] == [3, 3]
        assert {index // 7 for each in indices for index in each} == {epoch}
        assert len({index for each in indices for index in each}) == 6


def test_eval_sampler_marks_repeats_by_index():
    ranks = [list(EvalSampler(5, rank=rank, world=3)) for rank in range(3)]
    assert ranks == [[0, 3], [1, 4], [2, 5]]
    assert [len(EvalSampler(5, rank, 3)) for rank in range(3)] == [2, 2, 2]
    assert list(EvalSampler(1, rank=2, world=3)) == [1]


@pytest.mark.parametrize(("rank", "world"), [(-1, 1), (1, 1), (0, 0)])
def test_ranks_out_of_range(rank, world):
    with pytest.raises(ConfigError, match="argument `rank`"):
        sampling.train_share(4, 0, 0, rank, world)
