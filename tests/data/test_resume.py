import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_hosts import make_trainer

from ssync_pl import SSyncCallback, StepSeed
from ssync_pl.data import ShardDataModule
from ssync_pl.hosts import SAVi
from tiny_run import TINY_SAVI


class Notes(L.Callback):
    """Writes keys, loss and weights of each step, and dies in the middle of one."""

    def __init__(self, path: Path, kill_at: int | None) -> None:
        self.path, self.kill_at = path, kill_at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch * trainer.num_training_batches + batch_idx == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        weights = b"".join(value.numpy().tobytes() for value in pl_module.state_dict().values())
        note = {"place": trainer.current_epoch * trainer.num_training_batches + batch_idx, "keys": batch["__key__"]}
        note |= {"loss": float(outputs["loss"]).hex(), "weights": hashlib.sha256(weights).hexdigest()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**note, "step": trainer.global_step}) + "\n")


def _train(folder: Path, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    L.seed_everything(3, verbose=False)
    folder.mkdir(parents=True, exist_ok=True)
    model = SAVi(**TINY_SAVI | {"slot_init": "gaussian", "learning_rate": 1e-2, "warmup_steps": 2})
    options = {"batch_size": 2, "clip_length": 2, "num_workers": settings["workers"]}
    data = ShardDataModule(settings["train"], settings["validation"], **options)
    callbacks = [StepSeed(), SSyncCallback(relative_weight=0.2, warmup_ratio=0.3, guard_window=2)]
    callbacks += [ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=2)]
    callbacks += [Notes(folder / settings["notes"], settings.get("kill_at"))]
    options = {"max_epochs": 3, "accumulate_grad_batches": settings["accumulate"], "enable_checkpointing": True}
    saved = sorted(folder.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    trainer = make_trainer(*callbacks, steps=-1, **options)
    trainer.fit(model, datamodule=data, ckpt_path=saved[-1] if saved else None)


def _run(runs: list[dict]) -> list[int]:
    words, paths = [sys.executable, __file__, json.dumps(runs)], os.pathsep.join(sys.path)
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "IterableDataset" not in done.stderr  # Lightning doubts the lengths of such sets; ours are exact
    return json.loads(done.stdout.splitlines()[-1])


def _notes(path: Path) -> dict[int, dict]:
    return {note["place"]: note for note in map(json.loads, path.read_text("utf-8").splitlines())}


WITH_WORKERS = [(1, (0, 2, 0)), (2, (2, 0, 0))]


# 5 batches per epoch; the first: killed at the first batch of an epoch, then at the next, in an accumulation
@pytest.mark.parametrize(
    ("accumulate", "workers", "kills"),
    [(2, (0, 0, 0), (10, 11)), *(pytest.param(*one, None, marks=pytest.mark.slow) for one in WITH_WORKERS)],
)
def test_a_run_that_is_killed_twice_goes_on_exactly(make_shards, tmp_path, accumulate, workers, kills):
    counts = {"train": 11, "validation": 2}
    settings = {split: make_shards(split, count=count, per_shard=3, size=(16, 16)) for split, count in counts.items()}
    settings["accumulate"] = accumulate
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


if __name__ == "__main__":
    codes = []
    for run in json.loads(sys.argv[1]):
        child = os.fork()  # spares the imports
        if child == 0:
            try:
                _train(Path(run["folder"]), run)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.stdout.write(json.dumps(codes))
