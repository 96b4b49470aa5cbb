"""The cost benchmark runs, its baselines compute the method, and its counters count."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest
import torch

from ssync_pl import SSyncMaps
from ssync_pl.method import ssync_loss

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in ("cost", "_cost_report", "_counting", "_baselines"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (2, 3, 5, 6), (1, 2, 7, 5)])
@pytest.mark.parametrize("threshold", [0.2, 0.7])
def test_baselines_equal_the_package(load, shape, threshold):
    baselines, cost = load("_baselines"), load("cost")
    maps = cost.clip(cost.Shape(*shape), "cpu")
    grid = (shape[3], shape[3])
    output = ssync_loss(SSyncMaps(*maps, grid=grid), merge_threshold=threshold, backend="torch")
    expected = torch.autograd.grad(output.loss, maps)
    for block in (baselines.loop_block, baselines.vectorised_block):
        loss = block(*maps, grid, threshold)
        torch.testing.assert_close(loss, output.loss)
        for got, grad in zip(torch.autograd.grad(loss, maps), expected, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-7)


def test_nothing_selected_is_zero_in_the_baselines(load):
    baselines = load("_baselines")
    d = torch.zeros(1, 1, 2, 4)
    d[:, :, 0, ::2] = d[:, :, 1, 1::2] = 9.0
    flat = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1).expand(1, 1, 2, 4)
    # A checkerboard has no interior, and one label no boundary.
    for block in (baselines.loop_block, baselines.vectorised_block):
        assert block(flat, d, (1, 4)).item() == 0


def test_it_runs_and_writes_rows_tables_and_a_figure(load, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert load("cost").main(["--quick", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    with open(tmp_path / "cost_cpu.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    methods = {row["method"] for row in rows}
    assert methods == {"torch", "vectorised", "loop", "dense"}
    assert {row["table"] for row in rows} == {"main", "rival", "frames"}
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"])
        assert row["torch"] == torch.__version__
        assert row["date"]
        assert row["device"].startswith("CPU")
        assert float(row["ops"]) > 30
    assert (tmp_path / "cost_cpu.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "| frames T | torch | 2 – 8 |" in printed
    assert printed.count("| dense |") == 3


def test_memory_is_the_largest_sum_held(load):
    counting = load("_counting")

    def call():
        first = torch.zeros(1 << 20)
        second = first + 1.0
        del first
        return second * 2.0 + 1.0

    counted = counting.count_call(call)
    # Two arrays of 4 MiB at first, then `second`, the product and the sum.
    assert counted["peak_mib"] == pytest.approx(12.0, abs=0.1)
    assert counted["ops"] == 4


def test_turns_spread_and_exponent(load):
    timing = load("_timing")
    seen = []
    times = timing.interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=3)
    assert seen == list("aabbababab")
    assert [len(values) for values in times.values()] == [3, 3]
    slow = timing.interleaved({"a": lambda: torch.randn(1000).sort()}, rounds=9, seconds=0.0)
    assert len(slow["a"]) == 3
    summary = timing.spread([0.001, 0.002, 0.003, 0.004, 0.005])
    assert summary == {"median_ms": 3.0, "low_ms": 2.0, "high_ms": 4.0, "min_ms": 1.0, "calls": 5}
    assert timing.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


def test_full_jobs_cover_what_the_tables_need(load):
    cost = load("cost")
    jobs = cost.jobs(quick=False, cuda=True)
    assert all("triton" in job.methods for job in jobs)
    assert "triton" not in cost.jobs(quick=False, cuda=False)[0].methods
    assert {job.table for job in jobs} == {"main", "rival", *cost.SWEEPS}
    (rival,) = [job for job in jobs if job.table == "rival"]
    assert (rival.shape.frames, rival.shape.side, rival.group_frames) == (8, 24, 8)
    assert max(job.shape.slots for job in jobs) == 32
    assert max(job.shape.frames for job in jobs) == 256
    assert max(job.shape.side for job in jobs) == 64
