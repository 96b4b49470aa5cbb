"""Steps are timed without waiting for the device; events are read when it has passed them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from ssync_pl.compare.timing import StepClock, process_peak_mib

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_first_steps_are_left_out() -> None:
    clock = StepClock(skip=2)
    for pause in (0.05, 0.05, 0.0, 0.0, 0.0):
        clock.start(CPU)
        time.sleep(pause)
        clock.stop()
    assert clock.steps == 5
    median = clock.median_ms()
    assert median is not None
    assert median < 20.0
    short = StepClock(skip=20)
    short.start(CPU)
    time.sleep(0.01)
    short.stop()
    assert (short.median_ms() or 0.0) >= 10.0


def test_a_step_without_a_beginning_does_not_count() -> None:
    clock = StepClock()
    clock.stop()
    assert clock.steps == 0
    assert clock.median_ms() is None


class FakeDevice:
    """A stream in which work is done when the test says so."""

    def __init__(self) -> None:
        self.done = 0
        self.made = 0
        self.recorded = 0
        self.waits = 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            fake.made += 1
            self.at = 0

        def record(self) -> None:
            fake.recorded += 1
            self.at = fake.recorded

        def query(self) -> bool:
            return self.at <= fake.done

        def synchronize(self) -> None:
            fake.waits += 1
            fake.done = max(fake.done, self.at)

        def elapsed_time(self, other: Any) -> float:
            assert other.at <= fake.done
            return float(other.at - self.at) * 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return fake


def test_events_are_read_later_and_used_again(device: FakeDevice) -> None:
    clock = StepClock(skip=0)
    for step in range(50):
        clock.start(CUDA)
        clock.stop()
        device.done = max(0, 2 * (step - 3))  # the device is three steps behind
    assert device.waits == 0
    assert clock.steps == 50
    assert device.made <= 14
    assert clock.median_ms() == 3.0
    assert device.waits == 1
    assert clock.steps == 50


def test_the_process_knows_its_memory() -> None:
    peak = process_peak_mib()
    assert peak is None or 10.0 < peak < 1e6
