"""Progress bars that show the training loss."""

from __future__ import annotations

import importlib.util
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from torch import Tensor

__all__ = ["progress_bar"]

# Full names are wider than a terminal.
_SHORT = {"train/loss": "loss", "ssync/boundary_loss": "boundary", "ssync/interior_loss": "interior"}


class _ShowsLoss(ProgressBar):
    """Adds the loss of the last step (divided by accumulated batches), which Lightning 2 leaves out of its bar."""

    _last_loss: Any = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self._last_loss = loss.detach() if isinstance(loss, Tensor) else None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        metrics = {_SHORT.get(name, name): value for name, value in metrics.items()}
        if trainer.training and self._last_loss is not None and "loss" not in metrics:
            return {"loss": round(float(self._last_loss), 5), **metrics}
        return metrics


class _RichBar(_ShowsLoss, RichProgressBar):
    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning subtracts 1 from max_epochs, which is -1 where only max_steps is given.
        return str(super()._get_train_description(current_epoch)).replace("/-2", "")


class _TQDMBar(_ShowsLoss, TQDMProgressBar):
    pass


def progress_bar() -> ProgressBar:
    """Build the progress bar: Rich's where rich is installed, otherwise the plain one."""
    # Each refresh reads numbers off the device, so not in every step.
    rich = importlib.util.find_spec("rich") is not None
    return _RichBar(refresh_rate=10) if rich else _TQDMBar(refresh_rate=10)
