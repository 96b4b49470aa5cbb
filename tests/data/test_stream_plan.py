from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ssync_pl.data.stream_plan import (
    batch_order,
    lane_bounds,
    mixed_order,
    mixed_shard_plan,
    plain_shard_plan,
    worker_batches,
)
from ssync_pl.errors import ConfigError


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [0, 1, 5, 6, 7, 40, 41])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_lanes_and_their_order_cover_each_position_once(lanes, length, size):
    bounds = lane_bounds(100, 100 + length, size, lanes)
    order = batch_order(-(-length // size), lanes)
    batches = [
        list(range(bounds[lane][0] + number * size, min(bounds[lane][0] + (number + 1) * size, bounds[lane][1])))
        for lane, number in order
    ]
    assert sorted(position for batch in batches for position in batch) == list(range(100, 100 + length))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert all(batches)
    assert all(bounds[lane][1] == bounds[lane + 1][0] for lane in range(lanes - 1))


@pytest.mark.parametrize("workers", [0, 1, 3, 5])
def test_workers_share_the_batches_in_turns(workers):
    shares = [list(worker_batches(11, worker, workers, start=4)) for worker in range(max(workers, 1))]
    turns = [share[turn] for turn in range(11) for share in shares if turn < len(share)]
    assert turns == list(range(4, 11))


@pytest.mark.parametrize("buffer", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("count", [0, 1, 6, 50])
def test_mixed_order_is_a_bounded_permutation(count, buffer):
    order = mixed_order(count, buffer, "a")
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, mixed_order(count, buffer, "a"))
    # What has been read but not emitted, after each emission
    held = np.maximum.accumulate(order) + 1 - np.arange(1, count + 1) if count else np.zeros(1)
    assert held.max() <= buffer
    if buffer > 1 and count == 50:
        assert not np.array_equal(order, mixed_order(count, buffer, "b"))
        assert not np.array_equal(order, np.arange(count))


def test_mixed_order_moves_clips_far():
    order = mixed_order(2000, 64, "x")
    assert np.abs(order - np.arange(2000)).mean() > 30


def test_plain_plan():
    assert plain_shard_plan([3, 1], None, 7) == [(0, 0, 3, 0), (1, 0, 1, 0)]
    passes = [plain_shard_plan([2] * 9, 5, epoch) for epoch in range(4)]
    assert len({tuple(plan) for plan in passes}) == 4
    assert all(sorted(plan) == [(shard, 0, 2, 0) for shard in range(9)] for plan in passes)


def _clips(plan):
    return [(take.shard, take.visit, take.first + clip) for take in plan for clip in range(take.clips)]


@pytest.mark.parametrize("clips", [[7], [3, 1, 4]])
def test_a_rotated_plan_holds_the_same_clips_and_begins_elsewhere(clips):
    whole = sorted(_clips(plain_shard_plan(clips, None, 0)))
    begins = set()
    for epoch in range(60):
        plan = _clips(plain_shard_plan(clips, 1, epoch, rotate=True))
        assert sorted(plan) == whole
        begins.add(plan[0])
    assert len(begins) == len(whole)


@pytest.mark.parametrize("weights", [[1, 1], [5, 1], [1, 9], [0.3, 0.7]])
def test_mixing_gives_each_set_its_share_and_comes_to_every_clip(weights):
    sets = [[4, 4, 3, 4], [6, 0, 5]]
    seen: list[Counter] = [Counter(), Counter()]
    shares = None
    for epoch in range(12):
        plan = mixed_shard_plan(sets, weights, seed=1, epoch=epoch)
        clips = _clips(plan)
        assert len(clips) == len(set(clips)) == 26
        parts = [[clip for clip in clips if (clip[0] < 4) == (number == 0)] for number in range(2)]
        assert abs(len(parts[0]) - 26 * weights[0] / sum(weights)) <= 0.5 + 1e-9
        shares = shares or [len(part) for part in parts]
        assert [len(part) for part in parts] == shares
        for number, part in enumerate(parts):
            assert [visit for _, visit, _ in part] == sorted(visit for _, visit, _ in part)
            seen[number].update(part)
    for number, (counter, total) in enumerate(zip(seen, (15, 11), strict=True)):
        # Nothing comes twice in a visit, and a visit begins when the one before has ended.
        assert set(counter.values()) == {1}
        whole = 12 * shares[number] // total
        assert Counter(visit for _, visit, _ in counter if visit < whole) == dict.fromkeys(range(whole), total)


def test_mixing_interleaves_and_changes_from_pass_to_pass():
    sets = [[4] * 10, [4] * 10]
    plan = mixed_shard_plan(sets, [1, 1], seed=0, epoch=0)
    assert all({plan[turn][0] // 10, plan[turn + 1][0] // 10} == {0, 1} for turn in range(0, 20, 2))
    assert plan == mixed_shard_plan(sets, [1, 1], seed=0, epoch=0)
    assert plan != mixed_shard_plan(sets, [1, 1], seed=0, epoch=1)
    assert plan != mixed_shard_plan(sets, [1, 1], seed=1, epoch=0)


def test_bad_mixes_are_refused():
    with pytest.raises(ConfigError, match="one weight for each of 2 sets, but got 1"):
        mixed_shard_plan([[1], [1]], [1.0], 0, 0)
    with pytest.raises(ConfigError, match="set 1 holds none"):
        mixed_shard_plan([[8], [0]], [1.0, 1.0], 0, 0)
    with pytest.raises(ConfigError, match="`lanes` to be at least 1, but got 0"):
        batch_order(3, 0)
