"""Conversions in processes of their own that are killed, interrupted or doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import convert_jobs
import pytest

from ssync_pl.errors import ShardError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

_HERE = Path(__file__).parent


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    running: list[subprocess.Popen[bytes]] = []

    def start(out: Path, workers: int, hang: float = 600.0) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join([str(_HERE), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, str(_HERE / "convert_jobs.py"), str(out), str(workers)],
            env={
                **os.environ,
                "PYTHONPATH": paths,
                "CONVERT_JOBS_HANG_FROM": "6",
                "CONVERT_JOBS_HANG_SECONDS": str(hang),
            },
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _shards(out: Path) -> list[Path]:
    return sorted(out.glob("*.tar"))


def _group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_where_it_stopped(
    tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]], workers: int
) -> None:
    out, clean = tmp_path / "out", tmp_path / "clean"
    process = start(out, workers)
    # a finished shard, and another one half-written
    _wait_for(lambda: bool(_shards(out)) and any(out.glob(".colors-train-*.tmp")))
    if workers == 0:
        with pytest.raises(ShardError, match="only process"):
            convert_jobs.run(out)
    process.kill()
    process.wait()
    _wait_for(lambda: _group_is_gone(process.pid))  # workers do not outlive it
    finished = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in _shards(out)}
    assert 0 < len(finished) < 4
    assert not (out / "index.json").exists()
    assert list(out.glob(".*.tmp"))
    report = convert_jobs.run(out)
    assert report.kept == len(finished)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished} == finished
    convert_jobs.run(clean)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in clean.iterdir()
    }


def test_control_c_stops_the_workers_and_leaves_a_resumable_folder(
    tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = start(tmp_path, 2, hang=5.0)  # workers end the video that they are at
    _wait_for(lambda: len(list(tmp_path.glob(".*.tmp"))) == 2)  # both workers are up
    _wait_for(lambda: bool(_shards(tmp_path)))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count(b"KeyboardInterrupt") == 1  # the workers print nothing of their own
    _wait_for(lambda: _group_is_gone(process.pid))
    assert not list(tmp_path.glob(".*.tmp"))
    assert 0 < len(_shards(tmp_path)) < 4
    report = convert_jobs.run(tmp_path)
    assert (report.videos, report.kept > 0) == (12, True)
