"""What a call allocates and launches, read from a trace of PyTorch's profiler."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["count_call"]

_SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def count_call(call: Callable[[], Any], device: str | torch.device = "cpu") -> dict[str, float]:
    """Run once under the profiler.

    Memory is what PyTorch's allocator of the device hands out above what it held before: scratch of operators and of
    compiled code is in it, and so is what waits for the backward pass.

    Args:
        call: Called twice, once before.
        device: Whose memory and kernels are counted.

    Returns:
        ``peak_mib``; ``ops``, operators called from Python or autograd, not from another operator; on CUDA also
        ``kernels`` and ``syncs``.
    """
    cuda = torch.device(device).type == "cuda"
    call()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with _no_stderr(), profile(activities=activities, profile_memory=True) as profiler:
        call()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    counts: dict[str, float] = {"ops": _outermost([e for e in events if e.get("cat") == "cpu_op"])}
    if cuda:
        runtime = [e["name"] for e in events if e.get("cat") == "cuda_runtime"]
        counts["kernels"] = sum(e.get("cat") == "kernel" for e in events)
        # The last wait is that of this function.
        counts["syncs"] = max(sum(name in _SYNCS for name in runtime) - 1, 0)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = _peak_bytes(events)
    return {"peak_mib": round(peak / 2**20, 3), **counts}


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Some builds of the profiler write a line at each start and stop, from C++, through a progress bar."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _peak_bytes(events: list[dict[str, Any]]) -> int:
    held = peak = 0
    moves = [e for e in events if e.get("name") == "[memory]" and e["args"].get("Device Type") == 0]
    for event in sorted(moves, key=lambda e: (e["ts"], e["args"].get("Ev Idx", 0))):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _outermost(events: list[dict[str, Any]]) -> int:
    count = 0
    ends: dict[Any, float] = {}
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        thread = event["tid"]
        if not event["name"].startswith(("aten::", "triton", "graph_")):
            continue
        if event["ts"] >= ends.get(thread, -1.0):
            count += 1
            ends[thread] = event["ts"] + event["dur"]
    return count
