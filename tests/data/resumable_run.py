"""Small training runs that note every step and can kill themselves, each in a process of its own.

`python resumable_run.py '[{"folder": …}, …]'` prints how each of them ended.
"""

import hashlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from ssync_pl import SSyncCallback
from ssync_pl.data import ShardDataModule
from ssync_pl.hosts import SAVi
from ssync_pl.plugin.step_seed import StepSeed


class Notes(L.Callback):
    """Write keys, loss and weights of each step, and die in the middle of one."""

    def __init__(self, path: Path, kill_at: int | None) -> None:
        self.path, self.kill_at = path, kill_at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch * trainer.num_training_batches + batch_idx == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        weights = b"".join(value.numpy().tobytes() for value in pl_module.state_dict().values())
        note = {
            "place": trainer.current_epoch * trainer.num_training_batches + batch_idx,
            "step": trainer.global_step,
            "keys": batch["__key__"],
            "loss": float(outputs["loss"]).hex(),
            "weights": hashlib.sha256(weights).hexdigest(),
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")


def main(settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    L.seed_everything(3, verbose=False)
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    channels = {"encoder_channels": [8, 8], "decoder_channels": [8, 8], "decoder_strides": [2, 2]}
    sizes = {"slot_dim": 8, "feature_dim": 8, "encoder_mlp_hidden": 8, "corrector_mlp_hidden": 8}
    sizes |= {"predictor_mlp_hidden": 8, "decoder_broadcast": [4, 4], "encoder_strides": [2, 2], **channels}
    model = SAVi(num_slots=3, slot_init="gaussian", learning_rate=1e-2, warmup_steps=2, **sizes)
    workers = settings["workers"]
    data = ShardDataModule(settings["train"], settings["validation"], batch_size=2, clip_length=2, num_workers=workers)
    trainer = L.Trainer(
        max_epochs=3,
        accumulate_grad_batches=settings["accumulate"],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            StepSeed(),
            SSyncCallback(relative_weight=0.2, warmup_ratio=0.3, guard_window=2),
            ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=settings["every"]),
            Notes(folder / settings["notes"], settings.get("kill_at")),
        ],
    )
    saved = sorted(folder.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    trainer.fit(model, datamodule=data, ckpt_path=saved[-1] if saved else None)


if __name__ == "__main__":
    codes = []
    for run in json.loads(sys.argv[1]):
        child = os.fork()  # spares the imports
        if child == 0:
            try:
                main(run)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.stdout.write(json.dumps(codes))
