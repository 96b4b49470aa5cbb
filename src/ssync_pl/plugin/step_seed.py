"""`StepSeed`: random numbers that depend on the step alone, so that a resumed run goes on as if never interrupted."""

from __future__ import annotations

import hashlib
import os
import random
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch

from ssync_pl.errors import ConfigError

__all__ = ["StepSeed"]


class StepSeed(L.Callback):
    """Seed torch, NumPy and `random` before every batch with a hash of (seed, rank, stage, pass, batch).

    Checkpoints hold no state of the random generators, and with several processes could only hold that of one. A host
    that draws slots or noise at random would therefore go on otherwise after a resume. With this callback the numbers
    of a batch are a function of the batch's place, so nothing has to be saved: together with `ShardDataModule` a
    resumed run has the losses and weights of the uninterrupted one (bit for bit on a CPU). Validation draws the same
    numbers each time, which takes that noise out of its curves.

    Args:
        seed: The seed; `None` takes the one of `seed_everything`, or 0 when that was not called.

    Raises:
        ConfigError: The seed is negative.

    Example:
        >>> StepSeed(seed=3).number("fit", rank=0, epoch=1, batch=7) == StepSeed(3).number("fit", 0, 1, 7)
        True
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        if seed is not None and seed < 0:
            raise ConfigError(f"Expected argument `seed` to be 0 or more, or None, but got {seed}.")
        self.seed = seed

    def number(self, stage: str, rank: int, epoch: int, batch: int) -> int:
        """Derive the number that a batch is seeded with.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.
            rank: This process.
            epoch: Number of the pass; 0 outside of training.
            batch: Number of the batch in the pass.

        Returns:
            63 bits.
        """
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
        text = f"{seed}/{stage}/{rank}/{epoch}/{batch}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed a training batch."""
        self._seed(self.number("fit", trainer.global_rank, trainer.current_epoch, batch_idx))

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed a validation batch."""
        self._seed(self.number(f"validate{dataloader_idx}", trainer.global_rank, 0, batch_idx))

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed a test batch."""
        self._seed(self.number(f"test{dataloader_idx}", trainer.global_rank, 0, batch_idx))

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed a batch of `predict`."""
        self._seed(self.number(f"predict{dataloader_idx}", trainer.global_rank, 0, batch_idx))

    @staticmethod
    def _seed(number: int) -> None:
        torch.manual_seed(number)
        np.random.seed(number & 0xFFFFFFFF)  # noqa: NPY002 (hosts may draw from the global generator)
        random.seed(number)
