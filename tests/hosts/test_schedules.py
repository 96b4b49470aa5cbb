from __future__ import annotations

import math

import pytest

from ssync_pl.errors import ConfigError
from ssync_pl.hosts.schedules import WarmupDecay, WarmupExponential, exponential_for, schedule_for


def test_warmup_rises_linearly() -> None:
    factor = WarmupDecay(1000, warmup_steps=4, decay="constant")
    assert [factor(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (250, 0.5 + math.sqrt(0.125)), (500, 0.5), (1000, 0.0)])
def test_cosine_values(step: int, expected: float) -> None:
    assert WarmupDecay(1000, decay="cosine")(step) == pytest.approx(expected)


def test_exponential_halves_three_times_and_stays_there() -> None:
    factor = WarmupDecay(900, decay="exponential", halvings=3)
    assert [factor(step) for step in (0, 300, 600, 900, 5000)] == pytest.approx([1, 0.5, 0.25, 0.125, 0.125])


def test_short_training_gets_a_short_warmup() -> None:
    assert schedule_for(50, warmup_steps=100).warmup_steps == 5
    assert schedule_for(500, warmup_steps=100).warmup_steps == 100
    assert schedule_for(0, warmup_steps=100)(0) == 1.0


def test_endless_training_needs_a_constant_rate() -> None:
    assert schedule_for(math.inf, 10, "constant")(100) == 1.0
    with pytest.raises(ConfigError, match="`max_steps` or `max_epochs`"):
        schedule_for(math.inf, 10, "cosine")


def test_bad_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="`decay` to be 'cosine'"):
        WarmupDecay(10, decay="linear")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`warmup_steps` to be at least 0"):
        WarmupDecay(10, warmup_steps=-1)


def test_published_exponential_by_hand() -> None:
    factor = WarmupExponential(warmup_steps=10, decay_steps=110, rate=0.25)
    expected = [0.0, 0.5, 1.0, 0.25**0.5, 0.25, 0.25**2]
    assert [factor(step) for step in (0, 5, 10, 60, 110, 210)] == pytest.approx(expected)
    assert WarmupExponential(0, 100, 1.0)(73) == 1.0


def test_published_exponential_of_a_training() -> None:
    assert exponential_for(1000, 100)(1000) == pytest.approx(0.5)
    assert exponential_for(1000, 100, decay_steps=500)(500) == pytest.approx(0.5)
    short = exponential_for(50, 100)
    assert (short.warmup_steps, short.decay_steps) == (5, 50)
    assert exponential_for(0, 100)(0) == 1.0
    endless = exponential_for(-1, 10, rate=1.0)
    assert [endless(step) for step in (0, 10, 10_000)] == [0.0, 1.0, 1.0]


def test_published_exponential_refusals() -> None:
    with pytest.raises(ConfigError, match="a training with an end, or argument `decay_steps`"):
        exponential_for(-1, 10)
    with pytest.raises(ConfigError, match="`decay_steps` to be above `warmup_steps` = 10, but got 5"):
        exponential_for(100, 10, decay_steps=5)
    with pytest.raises(ConfigError, match=r"`decay_rate` to be in \(0, 1\], but got 10 and 0"):
        exponential_for(100, 10, rate=0)
