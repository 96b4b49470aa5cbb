"""`ssync-pl compare` from its words to its tables, on tiny runs."""

from __future__ import annotations

import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from tiny_comparison import tiny_config, write_tiny

from ssync_pl.cli import main
from ssync_pl.cli.trainer import run_trainer
from ssync_pl.compare.matrix import Asked, build_matrix
from ssync_pl.compare.results import load_comparison, read_results
from ssync_pl.compare.runs import Failure

ROOT = Path(__file__).resolve().parents[2]
SWITCHED_ON = 8  # half of the steps
TIMES = ["wall_seconds", "cpu_seconds", "shared_steps", "date"]


def write_config(path: Path, root: Path, **trainer) -> Path:
    config = tiny_config(root)
    config["model"]["init_args"] = {**config["model"]["init_args"], "slot_init": "gaussian"}
    config["trainer"]["callbacks"][0]["init_args"]["guard_window"] = 1
    config["trainer"] |= trainer
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Two variants, two seeds."""
    root = tmp_path_factory.mktemp("compare")
    config = write_config(root / "tiny.yaml", root / "data")
    words = ["--config", str(config), "--out", str(root / "out"), "--seeds", "2", "--processes", "2"]
    assert main(["compare", *words]) == 0
    return root / "out", words


def test_what_a_comparison_leaves(comparison):
    out, _ = comparison
    rows = read_results(out / "results.csv")
    assert [*zip(rows["variant"], rows["seed"], strict=True)] == [
        ("with", 0),
        ("without", 0),
        ("with", 1),
        ("without", 1),
    ]
    assert rows["step"].tolist() == [16] * 4
    for name in ("video_mbo", "boundary_f", "encoder_video_mbo", "untrained_video_mbo", "kmeans_rgb_video_mbo"):
        assert rows[name].notna().all(), name
    assert rows["untrained_video_mbo"].nunique() == 2  # variants of a seed share their first weights
    assert (rows["wall_seconds"] > 0).all()
    with_, without = (rows[rows["variant"] == name]["shared_steps"].tolist() for name in ("with", "without"))
    assert without == [0, 0]
    assert all(1 <= steps < SWITCHED_ON for steps in with_)
    for folder in out.glob("runs/*/*/*/*"):
        state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        assert state["global_step"] == 16
    assert "SSync switches on" in (out / "report" / "index.html").read_text("utf-8")


def test_the_same_command_keeps_everything_and_prints_the_table(comparison, capsys):
    out, words = comparison
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    assert main(["compare", *words, "--no-report"]) == 0
    printed = capsys.readouterr().out
    assert "video FG-ARI" in printed
    assert "2 seeds, baseline" in printed
    assert "within noise" in printed
    assert "k-means on RGB" in printed
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")} == before


def test_a_damaged_run_is_named_and_the_others_are_shown(comparison, capsys):
    out, words = comparison
    path = out / "runs" / "default" / "slots_3" / "with" / "seed_1" / "evaluation.json"
    kept = path.read_bytes()
    try:
        path.write_bytes(kept[:40])
        assert main(["compare", *words, "--no-report"]) == 1
    finally:
        path.write_bytes(kept)
    printed = capsys.readouterr()
    assert "damaged: default, 3 slots, with, seed 1: evaluation.json" in printed.err
    assert "one seed: no interval" in printed.out


def test_failures_are_shown_with_the_end_of_their_logs(comparison, capsys, monkeypatch):
    def fail(runs, launcher, show):
        return [Failure(runs[0], "  RuntimeError: oh")]

    monkeypatch.setattr("ssync_pl.compare.runs.run_all", fail)
    assert main(["compare", *comparison[1], "--no-report"]) == 1
    error = capsys.readouterr().err
    assert "failed: default, 3 slots, with, seed 0" in error
    assert "RuntimeError: oh" in error


@pytest.mark.parametrize("change", [["--steps", "4"], ["--", "--trainer.precision=32"]], ids=["steps", "extra"])
def test_the_folder_of_another_comparison_is_refused(comparison, capsys, change, request):
    assert main(["compare", *comparison[1], *change]) == 2
    assert f"one with another {request.node.callspec.id}" in capsys.readouterr().err


def test_a_folder_where_another_one_is_at_work_is_refused(comparison, capsys):
    out, words = comparison
    with FileLock(out / ".lock"):
        assert main(["compare", *words]) == 2
    assert "another `ssync-pl compare` is at work" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused_before_work_begins(tmp_path, capsys):
    config = write_tiny(tmp_path / "tiny.yaml", tmp_path / "data")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    assert main(["compare", "--config", str(config), "--out", str(tmp_path / "thesis")]) == 2
    assert f"{tmp_path / 'thesis'} to be empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_without_the_extra_one_line_names_it(tmp_path, capsys, monkeypatch):
    config = write_tiny(tmp_path / "tiny.yaml", tmp_path / "data")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "submitit" else find(name))
    assert main(["compare", "--config", str(config), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert 'submitit is not installed. Run: pip install "ssync-pl[bench]"' in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_commands_and_writes_nothing(tmp_path, capsys):
    config = write_tiny(tmp_path / "tiny.yaml", tmp_path / "data")
    words = ["--config", str(config), "--out", str(tmp_path / "out"), "--seeds", "3,4", "--slots", "3,5", "--dry-run"]
    assert main(["compare", *words, "--steps", "8", "--device", "cpu", "--", "--trainer.precision=32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert len(commands) == 8
    for command in commands:
        assert "--trainer.max_steps=8" in command
        assert command.endswith("--trainer.accelerator=cpu --trainer.precision=32")
    assert lines[-1].startswith("# 8 runs")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "nope"], "among without, with, published"),
        (["--variants", ","], "Expected --variants to name variants"),
        (["--variants", "with"], "name another one by --baseline"),
        (["--sets", "nope"], "Expected --sets to be among a, a_zoom, c,"),
        (["--seeds", "0"], "Expected --seeds to be a number of seeds from 1 on"),
        (["--slots", "0"], "Expected --slots to be whole numbers from 1 on"),
        (["--steps", "0"], "--steps: expected a whole number from 1 on"),
        (["--processes", "x"], "--processes: expected a whole number from 1 on"),
        (["--slurm", "account"], "Expected --slurm to be KEY=VALUE"),
        (["--config", "none.yaml"], "there is no 'none.yaml'"),
    ],
)
def test_bad_words_are_refused_with_what_was_expected(tmp_path, capsys, words, message):
    config = write_tiny(tmp_path / "tiny.yaml", tmp_path / "data")
    assert main(["compare", "--config", str(config), "--out", str(tmp_path / "out"), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert len(lines) == 1 or lines[0].startswith("usage: ssync-pl compare")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def stop(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("ssync_pl.cli.compare_command.run_compare", stop)
    assert main(["compare"]) == 130
    assert "The same command goes on where this one was stopped." in capsys.readouterr().err


def train(matrix, share=True):
    """Makes runs in this process, sources first, and writes their records as their jobs would."""
    for run in sorted(matrix.runs, key=lambda run: run.source or ""):
        run.folder.mkdir(parents=True)
        for name, content in run.files.items():
            (run.folder / name).write_text(yaml.safe_dump(json.loads(json.dumps(content))))
        shared = share and run.checkpoint is not None
        run_trainer([*run.command[3:], *(["--ckpt_path", str(run.checkpoint)] if shared else [])])
        (run.folder / "run.json").write_text(json.dumps({"source": run.source if shared else None}))
    (matrix.asked.out / "matrix.json").write_text(json.dumps(matrix.to_json()))
    return load_comparison(matrix.asked.out)


def test_a_shared_warmup_changes_no_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    config = write_config(tmp_path / "tiny.yaml", tmp_path / "data")
    shared, apart = (
        train(build_matrix(Asked((config,), tmp_path / name, ("with", "without", "warmup-0.25"))), name == "shared")
        for name in ("shared", "apart")
    )
    steps = {key.variant: record.row["shared_steps"] for key, record in shared.records.items()}
    assert steps["without"] == 0
    assert 0 < steps["warmup-0.25"] <= steps["with"] < SWITCHED_ON
    for key, record in shared.records.items():
        other = apart.records[key]
        assert {k: v for k, v in record.row.items() if k not in TIMES} == {
            k: v for k, v in other.row.items() if k not in TIMES
        }
        own = [name for name in other.curves if name.startswith(("train/", "val/"))]
        assert record.curves[own].equals(other.curves[own])
        assert record.curves["train/loss"].notna().sum() == 16
        states = [
            torch.load(
                folder / "runs" / "default" / "slots_3" / key.variant / "seed_0" / "checkpoints" / "last.ckpt",
                weights_only=True,
            )["state_dict"]
            for folder in (shared.folder, apart.folder)
        ]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    # SSync adds to the loss of its first step, and from the next on the weights differ as well.
    with_, without = (apart.records[key].curves["train/loss"].dropna() for key in [*apart.records][:2])
    same = (with_ == without).tolist()
    assert same[:SWITCHED_ON] == [True] * SWITCHED_ON
    assert not any(same[SWITCHED_ON + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_comparison_goes_on_to_the_same_scores(tmp_path, number):
    config = write_config(tmp_path / "tiny.yaml", tmp_path / "data", max_steps=120)

    def start(name):
        words = ["--config", str(config), "--out", str(tmp_path / name), "--seeds", "1", "--no-report"]
        return subprocess.Popen([sys.executable, "-m", "ssync_pl", "compare", *words], stdout=subprocess.DEVNULL)

    broken = start("broken")
    try:
        deadline = time.monotonic() + 600
        while not list((tmp_path / "broken").rglob("metrics.csv")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(random.random())
        broken.send_signal(number)
        assert broken.wait(timeout=60) == (-number if number == signal.SIGKILL else 143)
    finally:
        broken.kill()
    assert not list((tmp_path / "broken").rglob("runs/**/run.json"))
    for name in ("broken", "whole"):
        assert start(name).wait(timeout=900) == 0
    ours, theirs = (read_results(tmp_path / name / "results.csv").drop(columns=TIMES) for name in ("broken", "whole"))
    assert len(ours) == 2
    assert ours.equals(theirs)


def _quality():
    spec = importlib.util.spec_from_file_location("quality", ROOT / "benchmarks" / "quality.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("experiment", ["main", "slots", "ablation", "savi", "videosaur", "solv", "crowded"])
def test_the_experiments_of_the_repository_fit_its_examples(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert _quality().main([experiment, "--seeds", "1", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "/without/seed_0/overlay.yaml" in printed
    assert "seed_1" not in printed  # the caller's options win
    assert not list(tmp_path.iterdir())


def test_an_experiment_that_is_done_leaves_its_table(comparison, tmp_path, monkeypatch):
    out, words = comparison
    module = _quality()
    monkeypatch.setattr(module, "words_of", lambda *args: ["compare", *words, "--no-report"])
    assert module.main(["savi", "--out", str(out), "--results", str(tmp_path)]) == 0
    assert (tmp_path / "quality_savi.csv").read_bytes() == (out / "results.csv").read_bytes()
