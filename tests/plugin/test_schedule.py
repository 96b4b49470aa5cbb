"""Warm-up and ramp in optimizer steps."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from ssync_pl import SSyncConfig
from ssync_pl.errors import ConfigError
from ssync_pl.plugin.schedule import Phase, Schedule, training_length

INF = float("inf")


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 99, 100, 1000, 100_001])
@pytest.mark.parametrize("ratio", [0.0, 0.07, 0.1, 0.3, 0.5, 0.7, 1.0])
def test_start_is_the_first_step_that_is_not_below_the_ratio(ratio, total):
    start = Schedule.resolve(SSyncConfig(warmup_ratio=ratio), total).start
    assert not start < ratio * total
    assert start == 0 or start - 1 < ratio * total


def test_unknown_lengths():
    for total in (INF, -1, float("nan")):
        with pytest.raises(ConfigError, match=r"`warmup_ratio`=0.3.*`warmup_steps`"):
            Schedule.resolve(SSyncConfig(), total)
        assert Schedule.resolve(SSyncConfig(warmup_ratio=0.0), total).start == 0
        assert Schedule.resolve(SSyncConfig(warmup_steps=7, warmup_ratio=0.5), total).start == 7


@pytest.mark.parametrize(
    ("schedule", "phases"),
    [
        (Schedule.resolve(SSyncConfig(warmup_steps=5, guard_window=2), 100), "off off off watch watch on on"),
        (Schedule(start=2, watch_steps=50), "watch watch on"),
        (Schedule(start=0, watch_steps=50), "on on"),
    ],
)
def test_phases(schedule, phases):
    assert [schedule.phase(step) for step in range(len(phases.split()))] == [Phase(one) for one in phases.split()]


@pytest.mark.parametrize(("ramp", "weights"), [(0, [0, 0, 1, 1, 1]), (1, [0, 0, 1, 1, 1]), (2, [0, 0, 0.5, 1, 1])])
def test_weight(ramp, weights):
    schedule = Schedule(start=2, ramp_steps=ramp)
    assert [schedule.weight(step) for step in range(5)] == weights


@pytest.mark.parametrize(
    ("scheduling", "settings", "steps"),
    [
        (None, {}, 80),
        (None, {"estimated_stepping_batches": -1}, INF),
        (None, {"estimated_stepping_batches": INF}, INF),
        ({0: 1, 1: 8}, {}, 8 + 9),
        ({0: 3, 5: 1}, {}, 5 * 3 + 5 * 8),
        ({0: 1, 1: 8}, {"max_steps": 12, "estimated_stepping_batches": 12}, 12),
        ({0: 1, 1: 8}, {"max_steps": 12, "max_epochs": -1, "estimated_stepping_batches": 12}, 12),
        ({0: 1}, {"max_steps": 5, "estimated_stepping_batches": 5, "num_training_batches": INF}, 5),
    ],
)
def test_length_of_a_training(scheduling, settings, steps):
    defaults = {"estimated_stepping_batches": 80, "max_epochs": 10, "max_steps": -1, "num_training_batches": 8}
    defaults["accumulate_grad_batches"] = 1
    callbacks = [] if scheduling is None else [GradientAccumulationScheduler(scheduling)]
    assert training_length(SimpleNamespace(callbacks=callbacks, **{**defaults, **settings})) == steps
