"""Scheduling, locks and failures, on processes that only write what a training would leave."""

import dataclasses
import itertools
import json
import os
import sys
import time
from pathlib import Path

import pytest

from ssync_pl.compare import runner
from ssync_pl.compare.matrix import Run
from ssync_pl.compare.runner import is_finished, run_all
from ssync_pl.data.convert.locking import exclusive
from ssync_pl.errors import ConfigError

SCORES = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
(folder / "evaluation.json").write_text("{}")
(folder / "progress.json").write_text(json.dumps({"step": 4, "total": 4, "before": {"wall": 1000.0, "cpu": 500.0}}))
"""


def make_run(tmp_path, seed, code=SCORES, recipe="r"):
    folder = tmp_path / f"seed_{seed}"
    return Run("default", 3, "with", seed, folder, {"a": 1}, {}, (sys.executable, "-c", code, str(folder)), recipe)


def test_one_that_fails_leaves_the_others_and_the_end_of_its_log(tmp_path):
    bad = make_run(tmp_path, 1, "print('line'); raise SystemExit(3)")
    silent = make_run(tmp_path, 2, "pass")
    shown = []
    slow = make_run(tmp_path, 0, SCORES + "import time; time.sleep(1)")
    failures = run_all([slow, bad, silent, make_run(tmp_path, 3)], 2, 1, shown.append)
    assert {failure.run.seed: failure.reason for failure in failures} == {
        1: "ended with status 3",
        2: "ended without evaluation.json",
    }
    assert [failure.tail for failure in failures if failure.run.seed == 1] == ["  line"]
    assert sorted(path.parent.name for path in tmp_path.rglob("run.json")) == ["seed_0", "seed_3"]
    assert shown[-1] == "runs 2/4 done, 2 failed"
    assert any("default/3/with/0" in line for line in shown)
    assert not list(tmp_path.rglob(".lock"))


def test_no_more_than_asked_at_a_time(tmp_path):
    code = SCORES + "import time; start = time.time(); time.sleep(0.5)\n"
    code += "(folder / 'times.json').write_text(json.dumps([start, time.time()]))"
    run_all([make_run(tmp_path, seed, code) for seed in range(3)], 1, 1, lambda text: None)
    spans = sorted(json.loads(path.read_text()) for path in tmp_path.rglob("times.json"))
    assert len(spans) == 3
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_seconds_of_the_run_before_are_counted(tmp_path):
    run_all([make_run(tmp_path, 0)], 1, 1, lambda text: None)
    facts = json.loads((tmp_path / "seed_0" / "run.json").read_text())
    assert 1000 <= facts["wall_seconds"] < 1100
    assert 500 <= facts["cpu_seconds"] < 600


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    code = SCORES + "(folder / 'words.json').write_text(json.dumps(sys.argv[2:]))"
    run = make_run(tmp_path, 0, code)
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "checkpoints" / "last.ckpt").write_bytes(b"x")
    (run.folder / "started.json").write_text('{"recipe": "r"}')
    (run.folder / "log.txt").write_text("before\n")
    run_all([run], 1, 1, lambda text: None)
    words = json.loads((run.folder / "words.json").read_text())
    assert words == ["--ckpt_path", str(run.folder / "checkpoints" / "last.ckpt")]
    assert (run.folder / "log.txt").read_text().startswith("before")


WARM = """
import time
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "checkpoints" / "last.ckpt").write_bytes(b"x")
(folder / "checkpoints" / "warmup_x.csv").write_text("step,loss\\n0,1\\n1,2\\n")
(folder / "checkpoints" / "warmup_x.json").write_text('{"step": 2, "total": 4}')
(folder / "checkpoints" / "warmup_x.ckpt").write_bytes(b"x")
"""
NOTE = "(folder / 'words.json').write_text(json.dumps([sys.argv[2:], time.time()]))\n"


def test_a_run_waits_for_the_warmup_of_another_one_and_goes_on_from_it(tmp_path):
    code = "import time\n" + SCORES + NOTE
    source = make_run(tmp_path, 1, code + "time.sleep(0.5)\n" + WARM + "time.sleep(2)")
    other = make_run(tmp_path, 2, code + "time.sleep(1.5)")
    child = make_run(tmp_path, 0, code)
    shared = source.folder / "checkpoints" / "warmup_x.ckpt"
    child = dataclasses.replace(child, shared=shared)
    shown = []
    assert run_all([child, source, other], 2, 1, shown.append) == []
    found = {seed: json.loads((tmp_path / f"seed_{seed}" / "words.json").read_text()) for seed in range(3)}
    assert found[0][0] == ["--ckpt_path", str(shared)]
    assert found[1][0] == found[2][0] == []
    assert found[0][1] > max(found[1][1], found[2][1])  # the others began, and it came when there was room
    assert (child.folder / "metrics.csv").read_text().split() == ["loss,step", "1,0", "2,1"]
    facts = json.loads((child.folder / "run.json").read_text())
    assert facts["shared_steps"] == 2
    assert json.loads((source.folder / "run.json").read_text())["shared_steps"] == 0


def test_no_process_idles_for_a_warmup(tmp_path):
    code = "import time\n" + SCORES + NOTE
    source = make_run(tmp_path, 1, code + "time.sleep(1)\n" + WARM)
    child = dataclasses.replace(make_run(tmp_path, 0, code), shared=source.folder / "checkpoints" / "warmup_x.ckpt")
    assert run_all([child, source], 2, 1, lambda text: None) == []
    assert json.loads((child.folder / "words.json").read_text())[0] == []


def test_runs_that_others_wait_for_come_first(tmp_path):
    code = "import time\n" + SCORES + NOTE + WARM
    runs = []
    for seed in range(3):
        source = make_run(tmp_path, seed, code)
        shared = source.folder / "checkpoints" / "warmup_x.ckpt"
        runs += [dataclasses.replace(make_run(tmp_path, 10 + seed, code), shared=shared), source]
    assert run_all(runs, 1, 1, lambda text: None) == []
    order = sorted(tmp_path.rglob("words.json"), key=lambda path: json.loads(path.read_text())[1])
    # No process idles: the first run cannot wait for anything but the sources, which begin before what goes on.
    assert [path.parent.name for path in order[:3]] == ["seed_0", "seed_1", "seed_2"]
    assert all(json.loads(path.read_text())[0] for path in order[3:])


def test_the_time_that_is_left_ends_at_nothing(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(runner, "_left", lambda now, left, seconds: told.append(left) or "?")
    code = "import time\n" + SCORES + WARM
    source = make_run(tmp_path, 1, code)
    child = dataclasses.replace(make_run(tmp_path, 0, code), shared=source.folder / "checkpoints" / "warmup_x.ckpt")
    assert run_all([child, source], 1, 1, lambda text: None) == []
    assert max(told) <= 2.0
    assert 0.5 in told  # the source is done, and half of the other run is, too
    assert told[-1] == 0.0


def test_a_shared_run_that_fails_says_what_to_try(tmp_path):
    source = make_run(tmp_path, 1, "import time\n" + SCORES + WARM)
    child = make_run(tmp_path, 0, "raise SystemExit(3)")
    child = dataclasses.replace(child, shared=source.folder / "checkpoints" / "warmup_x.ckpt")
    (failure,) = run_all([child, source], 1, 1, lambda text: None)
    assert "--no-sharing" in failure.reason


def test_a_run_that_begins_anew_takes_its_old_checkpoints_away(tmp_path):
    run = make_run(tmp_path, 0)
    (run.folder / "checkpoints").mkdir(parents=True)
    for name in ("warmup_x.json", "warmup_x.csv", "warmup_x.ckpt"):
        (run.folder / "checkpoints" / name).write_text("{}")
    assert run_all([run], 1, 1, lambda text: None) == []
    assert not list(run.folder.glob("checkpoints/warmup_*"))


@pytest.mark.parametrize("name", ["run.json", "started.json"])
def test_another_recipe_is_refused(tmp_path, name):
    run = make_run(tmp_path, 0)
    run.folder.mkdir()
    (run.folder / name).write_text('{"recipe": "other"}')
    with pytest.raises(ConfigError, match="recipe other, now r"):
        is_finished(run)


def test_a_folder_at_work_is_refused_and_a_stale_lock_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_ORPHAN_SECONDS", 0.2)
    run = make_run(tmp_path, 0)
    run.folder.mkdir()
    with exclusive(run.folder / ".lock"), pytest.raises(ConfigError, match="another process is at work in it"):
        run_all([run], 1, 1, lambda text: None)
    (run.folder / ".lock").write_bytes(b"")  # of a process that was killed
    assert run_all([run], 1, 1, lambda text: None) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks for open files")
def test_a_process_that_outlives_its_parent_keeps_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_ORPHAN_SECONDS", 0.2)
    run = make_run(tmp_path, 0, "import time; time.sleep(60)")
    child = runner._launch(run, 1)
    kept = child.locks.pop_all()
    lock = run.folder / ".lock"
    try:
        # What a killed parent leaves: the file stays, and its own handle of it is closed.
        (handle,) = [entry.name for entry in Path("/proc/self/fd").iterdir() if os.path.realpath(entry) == str(lock)]
        os.close(int(handle))
        with pytest.raises(ConfigError, match="another process"), runner._lock(run):
            pass
        assert lock.exists()
        runner.end_processes([child.process])
        with runner._lock(run):
            pass
    finally:
        runner.end_processes([child.process])
        with pytest.raises(OSError):
            kept.close()


def test_an_interrupt_ends_the_processes(tmp_path):
    run = make_run(tmp_path, 0, "import time; time.sleep(60)")
    begun = time.monotonic()

    def show(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all([run], 1, 1, show)
    assert time.monotonic() - begun < 20
    assert not (run.folder / ".lock").exists()
    assert not is_finished(run)
