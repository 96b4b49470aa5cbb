"""What the benchmarks share: the facts of the machine, and files of results."""

from __future__ import annotations

import csv
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

__all__ = ["device_facts", "exponent", "graph_seconds", "interleaved", "spread", "write_rows"]


def device_facts(device: str | torch.device) -> dict[str, Any]:
    """What a row of results says of the machine.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        ``device``, ``cpus``, ``torch`` and ``date``.
    """
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}",
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def write_rows(path: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write rows with the facts of the run behind each, in one go.

    Args:
        path: The CSV file; its folder is made.
        rows: Results; a column that a row lacks stays empty.
        facts: Of the machine and the options.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys([*(name for row in rows for name in row), *facts]))
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
    os.replace(part, path)


def interleaved(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    seconds: float = math.inf,
    tick: Callable[[], Any] | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:
    """Time functions in turns, so that all of them see the same noise.

    Args:
        calls: What is timed, by name; each is called twice before the clock starts.
        rounds: Calls of each.
        seconds: A function that has used as much is left out of later rounds, after three.
        tick: Called after each round.
        device: Waited for around each call.

    Returns:
        Seconds of each call, by name.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if len(times[name]) >= 3 and sum(times[name]) > seconds:
                continue
            wait()
            start = time.perf_counter()
            call()
            wait()
            times[name].append(time.perf_counter() - start)
        if tick is not None:
            tick()
    return times


def graph_seconds(call: Callable[[], Any], replays: int = 200) -> float | None:
    """Time that the device itself needs, without Python and launches: a call captured as a CUDA graph, replayed.

    Args:
        call: Waits for nothing; called before, so that nothing is compiled while it is captured.
        replays: The time is their mean.

    Returns:
        Seconds a call, None where a graph cannot hold it.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(replays + 10):
        if number == 10:
            first.record()
        graph.replay()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / replays


def spread(times: list[float]) -> dict[str, float]:
    """Median, quartiles and minimum in milliseconds.

    Args:
        times: Seconds.

    Returns:
        ``median_ms``, ``low_ms`` and ``high_ms`` (quartiles), ``min_ms`` and ``calls``.
    """
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    values = {"median_ms": middle, "low_ms": low, "high_ms": high, "min_ms": min(times)}
    return {**{name: round(1e3 * value, 4) for name, value in values.items()}, "calls": len(times)}


def exponent(sizes: list[float], times: list[float]) -> float:
    """Slope of time over size in logarithms, by least squares: 1 is linear, 2 is quadratic.

    Args:
        sizes: At least two different ones.
        times: One a size.

    Returns:
        The exponent.
    """
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in times]
    return statistics.linear_regression(x, y).slope
