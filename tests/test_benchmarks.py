"""Benchmarks run, and what README prints is what their result files hold."""

from __future__ import annotations

import csv
import importlib.util
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHORT = [
    "--data.init_args.num_train=8",
    "--data.init_args.num_validation=2",
    "--trainer.max_epochs=2",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.accelerator=cpu",
]


def _load(name="example_seeds"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_prints_the_committed_results_of_savi():
    with open(ROOT / "benchmarks" / "results" / "savi_synthetic.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    page = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    lines = page.partition("## The SAVi example")[2].partition("\n## ")[0].splitlines()
    for arm, start in (("with", "| with SSync |"), ("without", "| without |")):
        (line,) = [text for text in lines if text.startswith(start)]
        cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
        for cell, key in zip(cells, ("video_fg_ari", "video_ari", "video_mbo"), strict=False):
            values = [float(row[key]) for row in rows if row["arm"] == arm]
            assert len(values) >= 3
            assert cell == f"{statistics.median(values):.3f} ({min(values):.3f} – {max(values):.3f})"


def test_the_tables_of_quality_are_those_of_the_committed_results(capsys):
    assert _load("tables").main(["--check"]) == 0, capsys.readouterr().out


def test_a_table_that_is_out_of_date_is_found_and_mended(tmp_path, monkeypatch, capsys):
    module = _load("tables")
    (page,) = [path for path in module.PAGES if path.parent == ROOT]
    text = page.read_text("utf-8")
    (wanted,) = [line for line in text.splitlines() if line.startswith("| paired difference |")]
    with open(ROOT / "benchmarks" / "results" / "quality_main.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    arms = [
        {int(row["seed"]): float(row["video_mbo"]) for row in rows if row["variant"] == variant}
        for variant in ("with", "without")
    ]
    assert len(arms[0]) >= 5
    # Worked out here once more: the mean of the differences, and 2.776 standard errors of five of them.
    found = [arms[0][seed] - arms[1][seed] for seed in arms[0]]
    mean, error = statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5
    assert f"+{mean:.3f} ± {2.7764 * error:.3f}" in wanted

    copy = tmp_path / "README.md"
    copy.write_text(text.replace(wanted, wanted.replace("± 0.0", "± 0.1")), "utf-8")
    monkeypatch.setattr(module, "PAGES", (copy,))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert module.main(["--check"]) == 1
    assert capsys.readouterr().out == "README.md: out of date\n"
    assert module.main([]) == 0
    assert copy.read_text("utf-8") == text


def test_runs_of_another_configuration_are_refused(tmp_path):
    module = _load()
    folder = tmp_path / "runs" / "with" / "seed_0"
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text('{"recipe": "another"}', encoding="utf-8")
    with pytest.raises(SystemExit, match="another configuration"):
        module.main(["--seeds", "1", "--runs", str(tmp_path / "runs"), "--processes", "1"])


@pytest.mark.slow
def test_both_arms_run_and_a_second_call_keeps_them(tmp_path, capsys):
    words = [
        "--seeds",
        "1",
        "--runs",
        str(tmp_path / "runs"),
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "r.csv"),
    ]
    _load().main([*words, *SHORT])
    first = capsys.readouterr().out
    assert "| with SSync" in first
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    assert len(times) == 2
    _load().main([*words, *SHORT])
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")} == times


def test_the_loader_benchmark_runs_and_its_table_is_that_of_the_committed_results(tmp_path):
    words = ["--videos", "16", "--frames", "8", "--resolution", "16", "--image-size", "24", "--batch-size", "4"]
    words += ["--per-shard", "4", "--workers", "0", "--warmup", "1", "--seconds", "0.2", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "loader.py"), *words, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert "mmap + transform" in done.stdout
    with open(tmp_path / "loader_cpu.csv", encoding="utf-8", newline="") as file:
        assert {row["loader"] for row in csv.DictReader(file)} == {
            "reference",
            "mmap",
            "webdataset",
            "mmap + transform",
        }
    with open(ROOT / "benchmarks" / "results" / "loader_cpu.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    text = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    for start, loader in (
        ("| `reference` |", "reference"),
        ("| ours, `mmap` |", "mmap"),
        ("| ours, `webdataset` |", "webdataset"),
        ("| ours, `mmap`, with", "mmap + transform"),
    ):
        (line,) = [line for line in text.splitlines() if line.startswith(start)]
        cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
        for cell, workers in zip(cells, ("0", "2"), strict=False):
            rates = [float(row["clips_per_s"]) for row in rows if (row["loader"], row["workers"]) == (loader, workers)]
            assert cell == f"{statistics.median(rates):.0f} ({min(rates):.0f} – {max(rates):.0f})"
