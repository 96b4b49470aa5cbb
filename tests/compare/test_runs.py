import contextlib
import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssync_pl.compare.matrix import Run, RunKey
from ssync_pl.compare.runs import Launcher, is_finished, log_lines, run_all
from ssync_pl.errors import ConfigError

BEGINS = """import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / 'config.yaml').touch()
(folder / 'words.json').write_text(json.dumps([sys.argv[2:], time.time()]))
"""
ENDS = "(folder / 'evaluation.json').write_text('{}')\n"
KEEPS = (
    BEGINS
    + "(folder / 'checkpoints').mkdir(exist_ok=True); (folder / 'checkpoints' / 'x.ckpt').touch(); time.sleep(1)\n"
    + ENDS
)


def make_run(tmp_path: Path, seed: int, code: str = BEGINS + ENDS, **changes) -> Run:
    folder = tmp_path / f"seed_{seed}"
    command = (sys.executable, "-c", code, str(folder))
    key = RunKey(3, "with", seed)
    return dataclasses.replace(Run(key, folder, {"overlay.yaml": {}}, command, "r"), **changes)


def launch(tmp_path, runs, at_once=2, **options):
    return run_all(runs, Launcher(tmp_path / "jobs", at_once=at_once, **options))


def words_of(run):
    return json.loads((run.folder / "words.json").read_text())


def test_one_that_fails_leaves_the_others_and_the_end_of_its_log(tmp_path):
    bad = make_run(tmp_path, 1, "print('line'); raise SystemExit(3)")
    waits = BEGINS + "time.sleep(1)\n" + ENDS
    first, last = make_run(tmp_path, 0, waits), make_run(tmp_path, 2, waits)
    launch(tmp_path, [first, bad, last], at_once=1)
    assert log_lines(bad.folder) == ["line"]
    assert sorted(path.parent.name for path in tmp_path.rglob("evaluation.json")) == ["seed_0", "seed_2"]
    assert words_of(last)[1] > words_of(first)[1] + 1  # one at a time


def test_the_first_run_makes_the_data_alone(tmp_path):
    first, second = make_run(tmp_path, 0, "import time; time.sleep(1)\n" + BEGINS + ENDS), make_run(tmp_path, 1)
    launch(tmp_path, [first, second])
    assert words_of(first)[1] < words_of(second)[1]


def test_a_run_starts_from_the_checkpoint_of_another_one_while_that_goes_on(tmp_path):
    source = make_run(tmp_path, 1, KEEPS)
    checkpoint = source.folder / "checkpoints" / "x.ckpt"
    first = make_run(tmp_path, 0, source="without", checkpoint=checkpoint)
    # What a killed comparison left of the source is made again, and nothing starts from its old checkpoint.
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("old")
    (checkpoint.parent / "notes.txt").write_text("mine")
    (source.folder / "job.json").write_text(json.dumps({"recipe": "r"}))
    lost = make_run(tmp_path, 2, source="without", checkpoint=tmp_path / "none" / "checkpoints" / "x.ckpt")
    launch(tmp_path, [first, source, lost])
    words, begun = words_of(first)
    assert words == ["--ckpt_path", str(checkpoint)]
    assert (checkpoint.read_text(), (checkpoint.parent / "notes.txt").read_text()) == ("", "mine")
    assert begun > words_of(source)[1]
    assert json.loads((first.folder / "job.json").read_text())["source"] == "without"
    assert words_of(lost)[0] == []  # nobody makes it, so it trains all itself


def test_finished_runs_are_kept_and_what_is_no_run_of_this_comparison_is_refused(tmp_path):
    done, other = make_run(tmp_path, 0), make_run(tmp_path, 1)
    launch(tmp_path, [done])
    before = words_of(done)
    launch(tmp_path, [done])
    assert words_of(done) == before
    with pytest.raises(ConfigError, match=r"recipe other.*recipe r"):
        is_finished(dataclasses.replace(done, recipe="other"))
    other.folder.mkdir()
    (other.folder / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="seed_1 to be empty"):
        launch(tmp_path, [done, other])
    assert (other.folder / "thesis.tex").exists()


SLEEPS = BEGINS + "import subprocess\nsubprocess.Popen(['sleep', '100']); time.sleep(100)\n"
LAUNCH = """import pathlib, sys
sys.path.insert(0, sys.argv[1])
import test_runs
place = pathlib.Path(sys.argv[2])
test_runs.launch(place, [test_runs.make_run(place, 0, test_runs.SLEEPS)])
"""


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def no_process_names(folder):
    """Whether no command names the folder; what such a process started is in its process group."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if str(folder).encode() in path.read_bytes():
                return False
    return True


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_trainings_end_with_the_comparison(tmp_path, number):
    words = [sys.executable, "-c", LAUNCH, str(Path(__file__).parent), str(tmp_path)]
    comparison = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        wait_for((tmp_path / "seed_0" / "words.json").exists)
        comparison.send_signal(number)
        assert comparison.wait(timeout=30) in (128 + number if number == signal.SIGTERM else -number, 1)
        wait_for(lambda: no_process_names(tmp_path))
    finally:
        comparison.kill()
    assert not (tmp_path / "seed_0" / "evaluation.json").exists()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Slurm whose `sbatch` keeps the script and runs it at once, as job 1, 2, …"""
    folder = tmp_path / "cluster"
    folder.mkdir()
    stubs = {
        "srun": """while [[ $1 == --* ]]; do [[ $1 == --output || $1 == --error ]] && shift; shift; done
exec "$@" """,
        "sbatch": f"""id=$(($(ls {folder}/*.sh 2>/dev/null | wc -l) + 1)); cp $1 {folder}/$id.sh
export SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
(sleep 0.5; bash {folder}/$id.sh > {folder}/$id.out 2>&1; echo $id >> {folder}/ended) > /dev/null 2>&1 &
echo "Submitted batch job $id" """,
        "sacct": f"""echo 'JobID|State|NodeList'
for script in {folder}/*.sh; do id=$(basename $script .sh)
grep -qx $id {folder}/ended 2>/dev/null && echo "$id|COMPLETED|n" || echo "$id|RUNNING|n"; done""",
        "scancel": f"echo $@ >> {folder}/cancelled",
    }
    for name, text in stubs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


SLURM = {"slurm": True, "at_once": None, "threads": 3, "gpus": 1, "hours": 2.0}


def test_slurm_gets_a_script_per_run(tmp_path, cluster):
    runs = [make_run(tmp_path, seed) for seed in (0, 1)]
    launch(tmp_path, runs, **SLURM, options={"partition": "gpu", "account": "lab"})
    assert all(is_finished(run) for run in runs)
    script = (cluster / "1.sh").read_text()
    for line in ("partition=gpu", "account=lab", "gpus-per-node=1", "time=120", "cpus-per-task=3", "ntasks-per-node=1"):
        assert f"#SBATCH --{line}\n" in script
    assert sorted(path.name for path in cluster.glob("*.sh")) == ["1.sh", "2.sh"]


def test_a_job_that_is_in_the_queue_already_is_waited_for(tmp_path, cluster):
    run = make_run(tmp_path, 0, BEGINS + "time.sleep(2)\n" + ENDS)
    Launcher(tmp_path / "jobs", **SLURM).submit(run, 0)  # and the comparison is killed
    launch(tmp_path, [run], **SLURM)
    assert is_finished(run)
    assert not (cluster / "2.sh").exists()


def test_an_interrupt_cancels_slurm_jobs(tmp_path, cluster, monkeypatch):
    def interrupt(*what, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.set_postfix_str", interrupt)
    with pytest.raises(KeyboardInterrupt):
        launch(tmp_path, [make_run(tmp_path, 0)], **SLURM)
    assert (cluster / "cancelled").read_text().split() == ["1"]
