"""`KeepCheckpoints`: the checkpoints of a run of a comparison."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from ssync_pl.plugin.schedule import steps_of

__all__ = ["KeepCheckpoints"]

# A shared checkpoint may be taken this much earlier than needed, because a validation follows some steps.
_EARLIER_STEPS = 8


class KeepCheckpoints(Checkpoint):
    """Saves `last.ckpt` at the end of the training, and one checkpoint for each switch that other runs start from.

    Such a checkpoint is taken after a step before the switch that no validation follows, since a run that starts from
    it would skip that validation. In a job of a comparison the training ends when the job is gone.
    """

    def __init__(self, folder: str, switches: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.switches = tuple(switches)
        self.last_model_path = ""
        self._latest: dict[str, int] = {}
        self._job = os.getppid() if "SUBMITIT_EXECUTOR" in os.environ else None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        latest = {one["name"]: steps_of(one["ratio"], one["steps"], total) - one["watch"] for one in self.switches}
        self._latest = {name: step for name, step in latest.items() if step > 0}

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._job not in (None, os.getppid()):
            raise SystemExit("The job that started this training is gone.")

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # no checkpoint holds gradients that are being gathered
        step = trainer.global_step
        due = [name for name, latest in self._latest.items() if latest - _EARLIER_STEPS < step <= latest]
        if due and not _validation_may_follow(trainer, batch_idx):
            for name in due:
                trainer.save_checkpoint(self.folder / f"{name}.ckpt")
                del self._latest[name]

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last_model_path = str(self.folder / "last.ckpt")
        trainer.save_checkpoint(self.last_model_path)


def _validation_may_follow(trainer: L.Trainer, batch_idx: int) -> bool:
    if trainer.is_last_batch or trainer.global_step >= trainer.estimated_stepping_batches:
        return True
    interval = trainer.val_check_batch
    if not isinstance(interval, int) or interval < 1:
        return False
    whole = trainer.check_val_every_n_epoch is None
    return ((trainer.fit_loop.total_batch_idx if whole else batch_idx) + 1) % interval == 0
