"""The script for a machine with a GPU runs on any machine, and says what went wrong."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(SCRIPT), *words], capture_output=True, text=True, timeout=400, env={**os.environ, "PATH": path}
    )


def test_every_part_runs_and_names_the_device_in_each_row(tmp_path):
    done = run("--device", "cpu", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "All parts finished" in done.stdout
    for name in ("cost_cpu.csv", "step_cpu.csv", "loader_cpu.csv"):
        with open(tmp_path / name, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows
        assert all(row["device"] and row["torch"] == torch.__version__ for row in rows), name


@pytest.mark.parametrize("words", [("--device", "tpu"), ("--quik",)])
def test_a_wrong_option_is_refused(words):
    done = run(*words)
    assert done.returncode == 2
    assert "Expected --device" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_type():
    done = run("--quick")
    assert done.returncode == 2
    assert "--device cpu --quick" in done.stderr
