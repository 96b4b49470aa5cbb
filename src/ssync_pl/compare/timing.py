"""What a training step costs: its time, without making the device wait, and the largest memory."""

from __future__ import annotations

import sys
import time
from array import array
from collections import deque
from statistics import median

import torch

__all__ = ["StepClock", "process_peak_mib"]

_MIB = 2.0**20


class StepClock:
    """Times training steps; the device is asked whether it is done, never waited for, until the end.

    On CUDA two events a step are put into the stream, and read once the device has passed them. Elsewhere a step is
    timed from its start to its end on the host.

    Args:
        skip: First steps that are left out: they compile, fill caches and start workers.

    Example:
        >>> clock = StepClock(skip=1)
        >>> for _ in range(3):
        ...     clock.start(torch.device("cpu"))
        ...     clock.stop()
        >>> clock.steps, clock.median_ms() >= 0.0
        (3, True)
    """

    def __init__(self, skip: int = 20) -> None:
        self.skip = skip
        self._times = array("d")
        self._began: float | torch.cuda.Event | None = None
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []

    @property
    def steps(self) -> int:
        """Steps that were timed.

        Returns:
            Their number, those whose time is still to come included.

        Example:
            >>> StepClock().steps
            0
        """
        return len(self._times) + len(self._pending)

    def start(self, device: torch.device) -> None:
        """A step begins.

        Args:
            device: Where it runs.

        Example:
            >>> StepClock().start(torch.device("cpu"))
        """
        self._began = self._mark() if device.type == "cuda" else time.perf_counter()

    def stop(self) -> None:
        """The step ends; without a beginning nothing is counted.

        Example:
            >>> StepClock().stop()
        """
        began, self._began = self._began, None
        if isinstance(began, float):
            self._times.append(1e3 * (time.perf_counter() - began))
        elif began is not None:
            self._pending.append((began, self._mark()))
            self._read()

    def median_ms(self) -> float | None:
        """Median time of a step after the first ones; waits for the device.

        Returns:
            Milliseconds; of all steps where there are no more than the first ones; None without a step.

        Example:
            >>> StepClock().median_ms() is None
            True
        """
        if self._pending:
            self._pending[-1][1].synchronize()
            self._read()
        times = self._times[self.skip :] or self._times
        return median(times) if times else None

    def _mark(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> None:
        # Steps end in their order, so the first one that is not done says it for all behind it.
        while self._pending and self._pending[0][1].query():
            events = self._pending.popleft()
            self._times.append(events[0].elapsed_time(events[1]))
            self._free += events


def process_peak_mib() -> float | None:
    """Largest resident memory of this process so far.

    Returns:
        MiB, or None where the system does not say (Windows).

    Example:
        >>> peak = process_peak_mib()
        >>> peak is None or peak > 1.0
        True
    """
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (_MIB if sys.platform == "darwin" else 1024.0)
