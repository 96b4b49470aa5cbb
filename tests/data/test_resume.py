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
    return {note["step"]: note for note in map(json.loads, path.read_text("utf-8").splitlines())}


@pytest.mark.parametrize(("accumulate", "workers"), [(1, (0, 2)), (2, (2, 0))])
def test_a_killed_run_goes_on_exactly(make_shards, tmp_path, accumulate, workers):
    patterns = {
        "train": make_shards("train", count=11, per_shard=3, size=(16, 16)),
        "validation": make_shards("validation", count=2, size=(16, 16)),
        "accumulate": accumulate,
    }
    assert _run(tmp_path / "whole", notes="notes", workers=workers[0], **patterns) == 0
    whole = _notes(tmp_path / "whole" / "notes")
    assert sorted(whole) == list(range(1, 16))
    assert len({note["weights"] for note in whole.values()}) == 15
    # Another step each time the test runs; the message of a failure names it.
    kill_at = random.randrange(3, 15)
    folder = tmp_path / "killed"
    assert _run(folder, notes="before", workers=workers[0], kill_at=kill_at, **patterns) == -signal.SIGKILL
    saved = max(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    first = int(saved.stem.split("=")[1]) + 1
    assert first <= kill_at + 1
    assert _run(folder, notes="after", workers=workers[1], resume=str(saved), **patterns) == 0
    assert _notes(folder / "before") == {step: whole[step] for step in range(1, kill_at + 1)}, f"kill_at={kill_at}"
    assert _notes(folder / "after") == {step: whole[step] for step in range(first, 16)}, f"kill_at={kill_at}"
