"""A training that is killed and goes on has the curve and the scores of one that was not."""

import json
import os
import subprocess
import sys
import time

import lightning.pytorch as L
import pytest
import torch
import yaml

from ssync_pl.cli import main
from ssync_pl.compare.curves import complete_curve, read_curve, set_curve_aside
from ssync_pl.compare.keeping import KeepRun
from ssync_pl.compare.processes import PIPE_VARIABLE
from ssync_pl.errors import ConfigError

from .conftest import write_tiny


class Crash(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def fit(config, folder, *more, after=()):
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": ""}}
    keeper = ["--trainer.callbacks+=ssync_pl.compare.keeping.KeepRun", f"--trainer.callbacks.folder={folder}"]
    words = ["fit", "--config", str(config), f"--trainer.logger={json.dumps(logger)}", *more, *keeper]
    return main([*words, "--trainer.callbacks.every_n_steps=1", "--trainer.enable_progress_bar=false", *after])


def test_a_killed_training_goes_on_with_a_whole_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    config = write_tiny(tmp_path / "tiny.yaml", tmp_path / "data")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert fit(config, whole) == 0
    crash = [f"--trainer.callbacks+={__name__}.Crash", "--trainer.callbacks.step=10"]
    with pytest.raises(RuntimeError, match="killed"):
        fit(config, broken, *crash)
    assert not (broken / "checkpoints" / "final.ckpt").exists()
    set_curve_aside(broken)
    assert fit(config, broken, "--ckpt_path", str(broken / "checkpoints" / "last.ckpt")) == 0
    resumed_from = int(read_curve(broken / "metrics.csv")[0]["step"])
    assert 8 <= resumed_from <= 10
    complete_curve(broken)
    assert read_curve(broken / "metrics.csv") == read_curve(whole / "metrics.csv")
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (broken, whole))
    assert ours["rows"] == theirs["rows"]
    assert {"untrained", "this run"} <= set(ours["rows"])
    state, other = (
        torch.load(folder / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"] for folder in (broken, whole)
    )
    assert all(torch.equal(state[name], other[name]) for name in other)
    progress = json.loads((broken / "progress.json").read_text())
    assert (progress["step"], progress["total"]) == (16, 16)
    assert progress["before"]["wall"] > 0


SWITCHES = [
    {"name": "warmup_0.5_1", "ratio": 0.5, "steps": None, "watch": 1},
    {"name": "warmup_12_steps_0", "ratio": 0.3, "steps": 12, "watch": 0},
    {"name": "warmup_0.1_50", "ratio": 0.1, "steps": None, "watch": 50},
]


def test_checkpoints_for_other_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    config = write_tiny(tmp_path / "tiny.yaml", tmp_path / "data")
    switches = f"--trainer.callbacks.switches={json.dumps(SWITCHES)}"
    assert fit(config, tmp_path / "run", after=[switches]) == 0
    kept = tmp_path / "run" / "checkpoints"
    # The first step of the window without a validation behind it; the third switch comes too early for a checkpoint.
    assert json.loads((kept / "warmup_0.5_1.json").read_text()) == {"step": 1, "total": 16}
    assert json.loads((kept / "warmup_12_steps_0.json").read_text()) == {"step": 5, "total": 16}
    assert sorted(path.name for path in kept.iterdir()) == [
        "final.ckpt",
        "last.ckpt",
        "warmup_0.5_1.ckpt",
        "warmup_0.5_1.csv",
        "warmup_0.5_1.json",
        "warmup_12_steps_0.ckpt",
        "warmup_12_steps_0.csv",
        "warmup_12_steps_0.json",
    ]
    curve = [row for row in read_curve(tmp_path / "run" / "metrics.csv") if int(row["step"]) < 5]
    assert read_curve(kept / "warmup_12_steps_0.csv") == curve
    for name, step in (("warmup_0.5_1", 1), ("warmup_12_steps_0", 5)):
        assert torch.load(kept / f"{name}.ckpt", weights_only=True)["global_step"] == step


@pytest.mark.parametrize(("warmup", "fits"), [(7, True), (5, False)])
def test_a_warmup_that_is_longer_than_ones_own_is_refused(tmp_path, monkeypatch, capsys, warmup, fits):
    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    config = write_tiny(tmp_path / "tiny.yaml", tmp_path / "data", max_steps=8)
    plain = tmp_path / "plain.yaml"
    plain.write_text("trainer: {callbacks: [{class_path: ValidationSummary}]}")
    switch = [{"name": "warmup_x", "ratio": 0.5, "steps": 6, "watch": 0}]
    switches = f"--trainer.callbacks.switches={json.dumps(switch)}"
    assert fit(config, tmp_path / "a", "--trainer.callbacks=null", "--config", str(plain), after=[switches]) == 0
    taken = json.loads((tmp_path / "a" / "checkpoints" / "warmup_x.json").read_text())["step"]
    ours = yaml.safe_load(config.read_text())
    ours["trainer"]["callbacks"][0]["init_args"] = {"warmup_steps": taken + warmup - 6, "guard_window": 1}
    config.write_text(yaml.safe_dump(ours))
    words = ["--ckpt_path", str(tmp_path / "a" / "checkpoints" / "warmup_x.ckpt")]
    assert fit(config, tmp_path / "b", *words) == (0 if fits else 2)
    assert ("Pass --no-sharing" in capsys.readouterr().err) == (not fits)


def test_bad_intervals_are_refused():
    with pytest.raises(ConfigError, match="to be above 0"):
        KeepRun("x", every_seconds=0)
    with pytest.raises(ConfigError, match="to be above 0"):
        KeepRun("x", every_n_steps=0)


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_a_process_ends_with_the_one_that_started_it():
    code = "import subprocess, sys, time; from ssync_pl.compare.keeping import die_with_parent; die_with_parent()\n"
    code += "print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, PIPE_VARIABLE: "1"},
        start_new_session=True,
    )
    grandchild = int(child.stdout.readline())
    child.stdin.close()  # as the operating system does when the parent is gone
    assert child.wait(timeout=20) != 0
    child.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(grandchild):
        time.sleep(0.1)
    assert not _runs(grandchild)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
