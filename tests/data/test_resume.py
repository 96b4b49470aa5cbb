import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("resumable_run.py")


def _run(runs: list[dict]) -> list[int]:
    words = [sys.executable, str(SCRIPT), json.dumps(runs)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _notes(path: Path) -> dict[int, dict]:
    return {note["place"]: note for note in map(json.loads, path.read_text("utf-8").splitlines())}


# 5 batches per epoch; the first: killed at the first batch of an epoch, then at the next, in an accumulation
@pytest.mark.parametrize(
    ("accumulate", "workers", "kills"),
    [
        (2, (0, 0, 0), (10, 11)),
        pytest.param(1, (0, 2, 0), None, marks=pytest.mark.slow),
        pytest.param(2, (2, 0, 0), None, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_twice_goes_on_exactly(make_shards, tmp_path, accumulate, workers, kills):
    settings = {
        "train": make_shards("train", count=11, per_shard=3, size=(16, 16)),
        "validation": make_shards("validation", count=2, size=(16, 16)),
        "accumulate": accumulate,
        "every": 2,
    }
    # Other batches each time the slow tests run; the message of a failure names them.
    kills = kills or sorted(random.sample(range(5, 15), 2))
    runs = [{"folder": str(tmp_path / "whole"), "notes": "notes", "workers": workers[0], **settings}]
    for number, kill_at in enumerate([*kills, None]):
        place = {"folder": str(tmp_path / "killed"), "notes": f"notes{number}", "workers": workers[number]}
        runs.append({**place, "kill_at": kill_at, **settings})
    assert _run(runs) == [0, -signal.SIGKILL, -signal.SIGKILL, 0]
    whole = _notes(tmp_path / "whole" / "notes")
    assert sorted(whole) == list(range(15))
    assert len({note["weights"] for note in whole.values()}) == (15 if accumulate == 1 else 10)  # 9 steps and the start
    for number, last in enumerate([*kills, 15]):
        notes = _notes(tmp_path / "killed" / f"notes{number}")
        assert notes == {place: whole[place] for place in range(min(notes, default=last), last)}, f"kills={kills}"
    assert sorted(notes)[-1] == 14
