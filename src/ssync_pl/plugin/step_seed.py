"""`StepSeed`: random numbers that depend on the step alone, so that a resumed run goes on as if never interrupted."""

import hashlib
import os
import random
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch

from ssync_pl.data.loader import accumulated_batches, mend_restart, mend_resume
from ssync_pl.errors import ConfigError


class StepSeed(L.Callback):
    """Seeds torch, NumPy and `random` before every batch with a hash of (seed, rank, stage, epoch, batch).

    Checkpoints hold no state of the random generators, and with several processes could only hold that of one. With
    this callback the numbers of a batch depend on its place alone, so nothing has to be saved: together with
    `ShardDataModule` a resumed run has the losses and weights of the uninterrupted one (bit for bit on a CPU).
    Validation draws the same numbers each time, which takes that noise out of its curves.

    Args:
        seed: The seed; None takes the one of `seed_everything`, or 0 when that was not called.

    Raises:
        ConfigError: The seed is negative; or a training is resumed between batches that are accumulated into one
            optimizer step, whose gradients no checkpoint holds.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        if seed is not None and seed < 0:
            raise ConfigError(f"Expected argument `seed` to be 0 or more, or None, but got {seed}.")
        self.seed = seed

    def number(self, stage: str, rank: int, epoch: int, batch: int) -> int:
        """Derives the 63-bit number that a batch is seeded with; ``epoch`` is 0 outside of training."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
        text = f"{seed}/{stage}/{rank}/{epoch}/{batch}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to resume where gradients of some batches of a step are lost."""
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
        done = progress.get("current", {}).get("processed", 0)
        accumulated = accumulated_batches(trainer, checkpoint.get("epoch", 0))
        if trainer.state.fn == "fit" and not progress.get("is_last_batch") and done % accumulated:
            raise ConfigError(
                f"Expected a checkpoint from between two optimizer steps, but this one was taken after "
                f"{done % accumulated} of {accumulated} accumulated batches, whose gradients it does not hold. Resume "
                "from another checkpoint, or leave StepSeed out (`seed_everything: false`) to go on without them."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps a resumed training from saving its first step again, in the middle of accumulated batches."""
        mend_restart(trainer)
        for callback in trainer.checkpoint_callbacks:
            if hasattr(callback, "_last_global_step_saved"):
                callback._last_global_step_saved = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seeds a training batch."""
        mend_resume(trainer)
        self._seed("fit", trainer, trainer.current_epoch, batch_idx)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seeds a batch of validation, test or `predict`."""
        stage = "test" if trainer.testing else "predict" if trainer.predicting else "validate"
        self._seed(f"{stage}{dataloader_idx}", trainer, 0, batch_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def _seed(self, stage: str, trainer: L.Trainer, epoch: int, batch: int) -> None:
        number = self.number(stage, trainer.global_rank, epoch, batch)
        torch.manual_seed(number)
        np.random.seed(number & 0xFFFFFFFF)  # noqa: NPY002 (hosts may draw from the global generator)
        random.seed(number)
