"""The memory benchmark runs, and its committed numbers are what the package promises."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def _load():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("benchmark_memory", BENCHMARKS / "memory.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def _read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_benchmark_measures_every_subject_and_draws_it(tmp_path):
    pytest.importorskip("matplotlib")
    words = ["--quick", "--rounds", "1", "--threads", "1", "--memory", "0.5", "2", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "memory.py"), *words], capture_output=True, text=True, timeout=300, check=True
    )
    rows = _read(tmp_path / "memory_cpu.csv")
    assert [(row["subject"], row["batch"], row["layout"]) for row in rows] == [
        (subject, batch, layout)
        for subject in ("decoder", "slotcontrast", "solv")
        for batch in ("1", "2")
        for layout in ("plain", "memory_efficient")
    ]
    for row in rows:
        assert float(row["peak_mib"]) > 0
        assert (row["median_ms"] == "") == (row["subject"] != "decoder")
        assert row["device"]
        assert row["date"]
        assert row["torch"] == torch.__version__
    batches = _read(tmp_path / "memory_batches_cpu.csv")
    assert len(batches) == 3 * 2 * 2
    for small, large in zip(batches[::2], batches[1::2], strict=True):
        assert 0 < int(small["largest_batch"]) < int(large["largest_batch"])
    assert "| solv | 2 GiB |" in done.stdout
    assert (tmp_path / "memory_cpu.png").stat().st_size > 10_000


def test_peaks_are_those_of_what_a_step_holds():
    memory = _load()
    shape = (1024, 256)  # a MiB
    kept = []

    def step():
        kept.clear()
        first = torch.ones(shape)
        second = torch.ones(shape)
        del first
        third = torch.ones(shape)
        kept.append(second + third)

    found = memory.peak_bytes(step, torch.device("cpu"))
    assert found == pytest.approx(3 * 2**20, rel=0.01)


def test_the_largest_batch_lies_on_the_line():
    memory = _load()
    rows = [{"batch": 1, "peak_mib": 300.0}, {"batch": 3, "peak_mib": 700.0}]
    # 100 MiB and 200 MiB a clip
    assert memory.fitted_batch(rows, 1) == 4
    assert memory.fitted_batch(rows, 0.2) == 0


def test_one_batch_size_is_refused(capsys):
    with pytest.raises(SystemExit):
        _load().main(["--batches", "2"])
    assert "two sizes or more" in capsys.readouterr().err


def test_committed_numbers_hold_the_promise():
    rows = {(row["subject"], row["batch"], row["layout"]): row for row in _read(BENCHMARKS / "results/memory_cpu.csv")}
    for batch in ("1", "2"):
        plain, efficient = (rows["decoder", batch, layout] for layout in ("plain", "memory_efficient"))
        assert float(efficient["peak_mib"]) <= 0.4 * float(plain["peak_mib"])
        assert float(plain["median_ms"]) >= 1.3 * float(efficient["median_ms"])
