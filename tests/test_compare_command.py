"""`ssync-pl compare` from its words to its tables; runs are tiny, and a stand-in scores them."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from ssync_pl.cli import main
from ssync_pl.cli.compare_command import run_compare
from ssync_pl.compare.collect import read_results
from ssync_pl.compare.curves import read_curve
from ssync_pl.data.convert.locking import exclusive
from ssync_pl.errors import ConfigError

from .compare.conftest import standin_environment, tiny_config, write_tiny

ROOT = Path(__file__).resolve().parents[1]
STANDIN = "standin_recorder.StandIn"
SWITCHED_ON = 8  # half of the steps
TIMES = {"wall_seconds", "cpu_seconds", "shared_steps", "date"}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A comparison, first with a run that fails, then again."""
    root = tmp_path_factory.mktemp("compare")
    config = tiny_config(root / "data")
    config["model"]["init_args"] = {**config["model"]["init_args"], "slot_init": "gaussian"}
    config["trainer"]["callbacks"][0]["init_args"]["guard_window"] = 1
    (root / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    words = ["--config", str(root / "tiny.yaml"), "--out", str(root / "out"), "--seeds", "1", "--processes", "2"]
    words += ["--no-report", "--no-sharing"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", standin_environment())
        statuses = [run_compare(words, recorder="standin_recorder.Failing")]
        times = {path: path.stat().st_mtime_ns for path in root.rglob("run.json")}
        statuses.append(run_compare(words, recorder=STANDIN))
    return root / "out", words, statuses, times


def runs_of(out):
    return {path.parent.parent.name: path.parent for path in out.rglob("run.json")}


def test_a_failing_run_does_not_stop_the_others_and_is_tried_again(comparison):
    out, _, statuses, times = comparison
    assert statuses == [1, 0]
    assert [path.parent.parent.name for path in times] == ["without"]
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert set(runs_of(out)) == {"with", "without"}


def test_the_variants_of_a_seed_are_equal_until_ssync_switches_on(comparison):
    folders = runs_of(comparison[0])
    curves = {
        name: {int(row["step"]): row["train/loss"] for row in read_curve(folder / "metrics.csv") if "train/loss" in row}
        for name, folder in folders.items()
    }
    assert len(curves["with"]) == len(curves["without"]) == 16
    same = [step for step in curves["with"] if curves["with"][step] == curves["without"][step]]
    # SSync adds to the loss of its first step, and from the next on the weights differ as well.
    assert same[:SWITCHED_ON] == list(range(SWITCHED_ON))
    assert len(same) <= SWITCHED_ON + 1


def test_what_a_comparison_leaves(comparison):
    out, _, _, _ = comparison
    matrix = json.loads((out / "matrix.json").read_text())
    assert [one["name"] for one in matrix["variants"]] == ["with", "without"]
    assert (matrix["seeds"], matrix["slots"], matrix["sets"]) == ([0], [3], ["default"])
    rows = read_results(out / "results.csv")
    assert [row["variant"] for row in rows] == ["with", "without"]
    for row in rows:
        assert row["step"] == "16"
        assert row["untrained_video_mbo"]
        assert row["kmeans_rgb_video_mbo"]
        assert float(row["wall_seconds"]) > 0
    assert rows[0]["untrained_video_mbo"] == rows[1]["untrained_video_mbo"]
    for name, folder in runs_of(out).items():
        assert (folder / "checkpoints" / "last.ckpt").is_file()
        overlay = yaml.safe_load((folder / "overlay.yaml").read_text())
        assert ("callbacks" in overlay.get("trainer", {})) == (name == "without")
        facts = json.loads((folder / "run.json").read_text())
        assert facts["recipe"] == {row["variant"]: row["recipe"] for row in rows}[name]
        assert facts["device"].startswith("CPU")


def test_the_same_command_keeps_everything_and_prints_the_table(comparison, capsys):
    out, words, _, _ = comparison
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    assert main(["compare", *words]) == 0
    printed = capsys.readouterr()
    assert "with: video FG-ARI" in printed.out
    assert "one seed: no interval" in printed.out
    assert "k-means RGB" in printed.out
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--steps", "4"], "one with another steps"),
        (["--", "--trainer.precision=32"], "one with another extra"),
    ],
)
def test_the_folder_of_another_comparison_is_refused(comparison, capsys, change, message):
    assert main(["compare", *comparison[1], *change]) == 2
    assert message in capsys.readouterr().err


def test_a_run_of_another_recipe_is_refused(comparison, tmp_path, capsys):
    out, words, _, _ = comparison
    path = runs_of(out)["with"] / "run.json"
    kept = path.read_bytes()
    try:
        path.write_text(json.dumps({**json.loads(kept), "recipe": "another"}))
        assert main(["compare", *words]) == 2
    finally:
        path.write_bytes(kept)
    assert "one of another (recipe another" in capsys.readouterr().err


def test_a_folder_where_another_one_is_at_work_is_refused(comparison):
    out, words, _, _ = comparison
    with exclusive(out / ".lock"), pytest.raises(ConfigError, match="another `ssync-pl compare` is at work"):
        run_compare(words)


def test_without_matplotlib_the_table_comes_with_how_to_get_the_report(comparison, monkeypatch, capsys):
    import types

    def write_report(folder):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    module = types.ModuleType("ssync_pl.compare.report")
    module.write_report = write_report
    monkeypatch.setitem(sys.modules, "ssync_pl.compare.report", module)
    words = [word for word in comparison[1] if word != "--no-report"]
    assert run_compare(words) == 0
    printed = capsys.readouterr().out
    assert "with: video FG-ARI" in printed
    assert 'pip install "ssync-pl[bench]"' in printed


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
        (["--sets", "nope"], "Expected --sets to be among a, a_zoom, c, e, cluttered"),
        (["--seeds", "0"], "Expected --seeds to be a number of seeds from 1 on"),
        (["--slots", "0"], "Expected --slots to be whole numbers from 1 on"),
        (["--steps", "0"], "Expected --steps to be at least 1, but got 0"),
        (["--processes", "0"], "Expected --processes to be at least 1, but got 0"),
        (["--threads", "0"], "Expected --threads to be at least 1, but got 0"),
        (["--config", "none.yaml"], "there is no 'none.yaml'"),
    ],
)
def test_bad_words_are_one_line(tmp_path, capsys, words, message):
    config = write_tiny(tmp_path / "tiny.yaml", tmp_path / "data")
    assert main(["compare", "--config", str(config), "--out", str(tmp_path / "out"), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_configuration_without_data_is_refused(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("model: {class_path: SAVi, init_args: {num_slots: 3}}")
    assert main(["compare", "--config", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert "to have `data` with a `class_path`" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def stop(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("ssync_pl.cli.compare_command.run_compare", stop)
    assert main(["compare"]) == 130
    assert "The same command goes on where this one was stopped." in capsys.readouterr().err


def start(words, keep_steps=5):
    code = "import sys; from ssync_pl.cli import main; import ssync_pl.cli.compare_command as command\n"
    code += f"run = command.run_compare\ncommand.run_compare = lambda words: run(words, {STANDIN!r}, {keep_steps})\n"
    code += "sys.exit(main(['compare', *sys.argv[1:]]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env=standin_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(out, step, timeout=90):
    """Wait until a run is at least at this step, by its progress; False when it was faster."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for path in out.rglob("progress.json"):
            try:
                if json.loads(path.read_text())["step"] >= step:
                    return path.parent
            except (FileNotFoundError, json.JSONDecodeError):
                continue
        time.sleep(0.02)
    raise AssertionError(f"no run came to step {step}")


def alive(folder):
    """Processes whose command names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return [pid for pid in found if pid != os.getpid()]


def gone(folder, timeout=30):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not alive(folder):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes")
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGKILL, 2), (signal.SIGINT, 2), (signal.SIGKILL, 1)])
def test_a_killed_comparison_goes_on_to_the_same_scores(tmp_path, number, processes):
    """With one process, the run with SSync goes on from the warm-up of the other one."""
    config = write_tiny(tmp_path / "tiny.yaml", tmp_path / "data", max_steps=120)

    def words(name):
        return [
            "--config",
            str(config),
            "--out",
            str(tmp_path / name),
            "--seeds",
            "1",
            "--processes",
            str(processes),
            "--no-report",
        ]

    broken = start(words("broken"))
    wait_for_step(tmp_path / "broken", random.randint(1, 80))
    broken.send_signal(number)
    error = broken.communicate(timeout=60)[1]
    assert broken.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    if number == signal.SIGINT:
        assert "The same command goes on" in error
    assert gone(tmp_path / "broken")
    assert not list((tmp_path / "broken").rglob("run.json"))
    for name in ("broken", "whole"):
        process = start(words(name))
        error = process.communicate(timeout=170)[1]
        assert process.returncode == 0, error
    ours, theirs = (read_results(tmp_path / name / "results.csv") for name in ("broken", "whole"))
    assert len(ours) == 2
    assert [{k: v for k, v in row.items() if k not in TIMES} for row in ours] == [
        {k: v for k, v in row.items() if k not in TIMES} for row in theirs
    ]
    shared = json.loads((runs_of(tmp_path / "broken")["with"] / "run.json").read_text())["shared_steps"]
    assert shared > 0 or processes == 2
    for name, folder in runs_of(tmp_path / "broken").items():
        assert read_curve(folder / "metrics.csv") == read_curve(runs_of(tmp_path / "whole")[name] / "metrics.csv")


def test_a_shared_warmup_changes_no_number(comparison, tmp_path, monkeypatch):
    out, words, _, _ = comparison
    monkeypatch.setattr(os, "environ", standin_environment())
    words = [word for word in words if word != "--no-sharing"]
    words[words.index("--out") + 1] = str(tmp_path)
    words[words.index("--processes") + 1] = "1"
    assert run_compare(words, recorder=STANDIN) == 0
    ours, theirs = (read_results(folder / "results.csv") for folder in (tmp_path, out))
    assert len(ours) == 2
    assert [{k: v for k, v in row.items() if k not in TIMES} for row in ours] == [
        {k: v for k, v in row.items() if k not in TIMES} for row in theirs
    ]
    shared, apart = runs_of(tmp_path), runs_of(out)
    taken = {name: json.loads((folder / "run.json").read_text())["shared_steps"] for name, folder in shared.items()}
    assert taken["without"] == 0
    assert 1 <= taken["with"] < SWITCHED_ON
    # Its own rows begin where the other run's end; join_curves would hide a run that began anew.
    log = (shared["with"] / "log.txt").read_text()
    assert "Restored all states from the checkpoint" in log
    assert not list(out.rglob("warmup_*"))
    for name, folder in shared.items():
        assert read_curve(folder / "metrics.csv") == read_curve(apart[name] / "metrics.csv")
        states = [
            torch.load(one / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
            for one in (folder, apart[name])
        ]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def _quality():
    spec = importlib.util.spec_from_file_location("quality", ROOT / "benchmarks" / "quality.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("experiment", ["main", "slots", "ablation", "savi", "videosaur", "solv", "cluttered"])
def test_the_experiments_of_the_repository_fit_its_examples(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert _quality().main([experiment, "--seeds", "1", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "/without/seed_0/overlay.yaml" in printed
    assert "seed_1" not in printed  # the caller's options win
    assert not list(tmp_path.iterdir())


def test_an_experiment_that_is_done_leaves_its_table(comparison, tmp_path, monkeypatch, capsys):
    out, words, _, _ = comparison
    module = _quality()
    monkeypatch.setattr(module, "words_of", lambda experiment, folder, extra: ["compare", *words, *extra])
    assert module.main(["main", "--out", str(out), "--results", str(tmp_path)]) == 0
    assert (tmp_path / "quality_main.csv").read_bytes() == (out / "results.csv").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["quality_main.csv"]
