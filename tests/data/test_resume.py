"""A run that is killed and resumed equals the one that was not, bit for bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("resumable_run.py")


def _run(folder: Path, **settings: object) -> int:
    words = {"folder": str(folder), "every": 2, "workers": 0, **settings}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(words)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def _notes(path: Path) -> dict[int, dict]:
    return {note["place"]: note for note in map(json.loads, path.read_text("utf-8").splitlines())}


# 5 batches per epoch; the last two: killed at the first batch of an epoch, then at the next, in an accumulation
@pytest.mark.parametrize(
    ("accumulate", "workers", "kills"), [(1, (0, 2, 0), None), (2, (2, 0, 0), None), (2, (0, 0, 0), (10, 11))]
)
def test_a_run_that_is_killed_twice_goes_on_exactly(make_shards, tmp_path, accumulate, workers, kills):
    settings = {
        "train": make_shards("train", count=11, per_shard=3, size=(16, 16)),
        "validation": make_shards("validation", count=2, size=(16, 16)),
        "accumulate": accumulate,
    }
    assert _run(tmp_path / "whole", notes="notes", workers=workers[0], **settings) == 0
    whole = _notes(tmp_path / "whole" / "notes")
    assert sorted(whole) == list(range(15))
    assert len({note["weights"] for note in whole.values()}) == (15 if accumulate == 1 else 10)  # 9 steps and the start
    # Other batches each time the test runs; the message of a failure names them.
    kills = kills or sorted(random.sample(range(5, 15), 2))
    folder, saved = tmp_path / "killed", None
    for number, kill_at in enumerate([*kills, None]):
        run = {"notes": f"notes{number}", "workers": workers[number], "kill_at": kill_at, "resume": saved, **settings}
        assert _run(folder, **run) == (0 if kill_at is None else -signal.SIGKILL)
        notes = _notes(folder / f"notes{number}")
        last = 15 if kill_at is None else kill_at
        assert notes == {place: whole[place] for place in range(min(notes, default=last), last)}, f"kills={kills}"
        saved = str(max(folder.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns))
    assert sorted(_notes(folder / "notes2"))[-1] == 14
