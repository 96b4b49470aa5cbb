import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from ssync_pl.cli import main
from ssync_pl.compare.results import load_comparison, read_results

SWITCHED_ON = 8  # half of the steps
OWN = ["wall_seconds", "cpu_seconds", "shared_steps", "date"]


class Here:
    """Stands for submitit's executor: a job runs in this process at once."""

    def __init__(self, folder, cluster):
        assert cluster == "local"

    def update_parameters(self, **options):
        pass

    def submit(self, function, folder):
        words = json.loads((Path(folder) / "job.json").read_text())["command"][3:]
        with open(Path(folder) / "log.txt", "w") as log, contextlib.redirect_stdout(log):
            main(words)
        return SimpleNamespace(done=lambda: True, stderr=lambda: "")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, write_config):
    """Three variants of one seed, with a shared warm-up and without."""
    root = tmp_path_factory.mktemp("compare")
    words = ["--config", str(write_config(root)), "--variants", "with,without,warmup-0.25", "--seeds", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("submitit.AutoExecutor", Here)
        patch.setattr(sys, "argv", ["ssync-pl"])
        assert main(["compare", *words, "--out", str(root / "shared")]) == 0
        patch.setattr("ssync_pl.compare.report.write_report", lambda out: out / "report")
        assert main(["compare", *words, "--out", str(root / "apart"), "--no-sharing"]) == 0
    return root, words


@pytest.fixture
def shared(comparison, monkeypatch):
    """The finished comparison and its words; a call makes no report, and cannot start a run."""
    monkeypatch.setattr("ssync_pl.compare.report.write_report", lambda out: out / "report")
    monkeypatch.setattr("submitit.AutoExecutor", None)
    root, words = comparison
    return root / "shared", [*words, "--out", str(root / "shared")]


def test_what_a_comparison_leaves(comparison):
    out = comparison[0] / "shared"
    rows = read_results(out / "results.csv")
    assert rows["variant"].tolist() == ["with", "without", "warmup-0.25"]
    assert rows["step"].tolist() == [16] * 3
    for name in ("video_mbo", "boundary_f", "encoder_video_mbo", "kmeans_rgb_video_mbo"):
        assert rows[name].notna().all(), name
    assert rows["untrained_video_mbo"].notna().tolist() == [False, True, False]  # the others start at its warm-up
    for folder in out.glob("runs/*/*/*"):
        assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 16
        assert (folder / "pictures" / "step-000016.png").is_file()
    page = (out / "report" / "index.html").read_text("utf-8")
    assert "SSync switches on" in page
    assert "Pictures of with, seed 0" in page


def test_a_shared_warmup_changes_no_number(comparison):
    shared, apart = (load_comparison(comparison[0] / name) for name in ("shared", "apart"))
    steps = {key.variant: record.row["shared_steps"] for key, record in shared.records.items()}
    assert steps["without"] == 0
    assert 0 < steps["warmup-0.25"] <= steps["with"] < SWITCHED_ON
    for key, record in shared.records.items():
        other = apart.records[key]
        assert other.row["shared_steps"] == 0
        for name, value in record.row.items():
            assert name in OWN or value == pytest.approx(other.row[name], abs=0, nan_ok=True), name
        own = [name for name in other.curves if name.startswith(("train/", "val/"))]
        assert record.curves[own].equals(other.curves[own])
        assert record.curves["train/loss"].notna().sum() == 16
        states = [
            torch.load(key.folder(comparison[0] / one) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
            for one in ("shared", "apart")
        ]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    # SSync adds to the loss of its first step, and from the next on the weights differ as well.
    with_, without = (apart.records[key].curves["train/loss"].dropna() for key in [*apart.records][:2])
    same = (with_ == without).tolist()
    assert same[:SWITCHED_ON] == [True] * SWITCHED_ON
    assert not any(same[SWITCHED_ON + 1 :])


def test_the_same_command_keeps_everything_and_prints_the_table(shared, capsys):
    out, words = shared
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    assert main(["compare", *words]) == 0
    printed = capsys.readouterr().out
    told = ("video FG-ARI", "1 seed, baseline", "one seed: no interval", "k-means on RGB")
    assert all(text in printed for text in told)
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")} == before


def test_damaged_runs_and_failures_are_named_and_the_others_are_shown(shared, capsys):
    out, words = shared
    path = out / "runs" / "slots_3" / "with" / "seed_0" / "evaluation.json"
    kept = path.read_bytes()
    try:
        path.write_bytes(kept[:40])
        assert main(["compare", *words]) == 1
    finally:
        path.write_bytes(kept)
    printed = capsys.readouterr()
    assert all(text in printed.err for text in ("3 slots, with, seed 0", "evaluation.json is damaged"))
    assert "warmup-0.25" in printed.out


def test_what_is_not_this_comparison_is_refused(shared, tmp_path, capsys):
    out, words = shared
    assert main(["compare", *words, "--", "--trainer.precision=32"]) == 2
    assert "one with another extra" in capsys.readouterr().err
    with FileLock(out / ".lock"):
        assert main(["compare", *words]) == 2
    assert "another process holds the lock" in capsys.readouterr().err
    (tmp_path / "chapter.tex").touch()
    assert main(["compare", *words, "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} to be empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["chapter.tex"]


BAD_WORDS = [
    (["--variants", "with"], "name another one by --baseline"),
    (["--processes", "0"], "--processes"),
    (["--slurm", "account"], "Expected --slurm NAME=VALUE"),
    (["--config", "none.yaml"], "'none.yaml', which is none"),
    (["--seeds", "1"], "submitit"),
]


@pytest.mark.parametrize(("words", "message"), BAD_WORDS)
def test_bad_words_are_refused_with_what_was_expected(tmp_path, write_config, capsys, monkeypatch, words, message):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["compare", "--config", str(write_config(tmp_path)), "--out", str(tmp_path / "out"), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert len(lines) == 1 or lines[0].startswith("usage: ssync-pl compare")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_commands_and_writes_nothing(tmp_path, write_config, capsys):
    words = ["--config", str(write_config(tmp_path)), "--out", str(tmp_path / "out")]
    words += ["--seeds", "3,4", "--slots", "3,5"]
    assert main(["compare", *words, "--dry-run", "--", "--trainer.precision=32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert len(commands) == 8
    assert all(command.endswith(" --trainer.precision=32") for command in commands)
    assert lines[-1].startswith("# 8 runs")
    assert not (tmp_path / "out").exists()


def test_the_experiments_of_the_repository_fit_its_examples(shared, tmp_path, monkeypatch, capsys):
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "quality.py"
    spec = importlib.util.spec_from_file_location("quality", path)
    quality = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quality)
    monkeypatch.chdir(tmp_path)
    for experiment in quality.EXPERIMENTS:
        assert quality.main([experiment, "--seeds", "1", "--dry-run"]) == 0
        printed = capsys.readouterr().out
        assert "/without/seed_0/overlay.yaml" in printed
        assert "seed_1" not in printed  # the caller's options win
    assert not list(tmp_path.iterdir())
    out, words = shared
    monkeypatch.setattr(quality, "words_of", lambda *args: ["compare", *words])
    assert quality.main(["savi", "--out", str(out), "--results", str(tmp_path)]) == 0
    assert (tmp_path / "quality_savi.csv").read_bytes() == (out / "results.csv").read_bytes()
