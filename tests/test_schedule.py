"""Warm-up and ramp in optimizer steps."""

import pytest

from ssync_pl import SSyncConfig
from ssync_pl.errors import ConfigError
from ssync_pl.plugin.schedule import Phase, Schedule


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 99, 100, 1000, 100_001])
@pytest.mark.parametrize("ratio", [0.0, 0.07, 0.1, 0.3, 0.5, 0.7, 1.0])
def test_start_is_the_first_step_that_is_not_below_the_ratio(ratio, total):
    start = Schedule.resolve(SSyncConfig(warmup_ratio=ratio), total).start
    assert not start < ratio * total
    assert start == 0 or start - 1 < ratio * total


@pytest.mark.parametrize("total", [0, 10, float("inf"), -1])
def test_steps_take_the_place_of_the_ratio(total):
    assert Schedule.resolve(SSyncConfig(warmup_steps=7, warmup_ratio=0.5), total).start == 7
    assert Schedule.resolve(SSyncConfig(warmup_steps=0), total).start == 0


@pytest.mark.parametrize("total", [float("inf"), -1, float("nan")])
def test_unknown_length(total):
    with pytest.raises(ConfigError, match=r"`warmup_ratio`=0.3.*Pass `warmup_steps` instead"):
        Schedule.resolve(SSyncConfig(), total)
    assert Schedule.resolve(SSyncConfig(warmup_ratio=0.0), total).start == 0


def test_phases():
    schedule = Schedule.resolve(SSyncConfig(warmup_steps=5, guard_window=2), 100)
    phases = [schedule.phase(step) for step in range(8)]
    assert phases == [Phase.OFF] * 3 + [Phase.WATCH] * 2 + [Phase.ON] * 3


def test_a_watch_window_longer_than_the_warm_up():
    schedule = Schedule(start=2, watch_steps=50)
    assert [schedule.phase(step) for step in range(3)] == [Phase.WATCH, Phase.WATCH, Phase.ON]


def test_no_warm_up():
    assert Schedule(start=0, watch_steps=50).phase(0) is Phase.ON


@pytest.mark.parametrize(("ramp", "weights"), [(0, [0, 0, 1, 1, 1]), (1, [0, 0, 1, 1, 1]), (2, [0, 0, 0.5, 1, 1])])
def test_weight(ramp, weights):
    schedule = Schedule(start=2, ramp_steps=ramp)
    assert [schedule.weight(step) for step in range(5)] == weights
