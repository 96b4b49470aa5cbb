"""`EpochLines`: a line per epoch where no terminal can show a progress bar."""

import math
import sys
import time
from datetime import timedelta

import lightning.pytorch as L
from lightning.pytorch.callbacks import ProgressBar
from typing_extensions import override


class EpochLines(ProgressBar):
    """Prints losses and the time left at the end of each training epoch; takes the place of a progress bar."""

    def __init__(self) -> None:
        super().__init__()
        self._shown = True
        self._begun, self._first = 0.0, 0

    @override
    def disable(self) -> None:
        self._shown = False  # of all processes but the first

    @override
    def enable(self) -> None:
        self._shown = True

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begun, self._first = time.monotonic(), trainer.global_step

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        if not self._shown:
            return
        values = self.get_metrics(trainer, pl_module).items()
        losses = ", ".join(f"{name} {value:.4g}" for name, value in values if isinstance(value, float))
        words = [f"epoch {trainer.current_epoch + 1}", f"step {step}"]
        if 0 < total < math.inf:
            words[1] += f" of {int(total)}"
            left = (time.monotonic() - self._begun) * (total - step) / max(1, step - self._first)
            words += [f"{timedelta(seconds=round(left))} left"] if step < total else []
        sys.stdout.write(f"{', '.join(words)}: {losses}\n")
        sys.stdout.flush()
