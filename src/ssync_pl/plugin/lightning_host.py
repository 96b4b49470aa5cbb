"""`LightningHost`: a plain PyTorch model as a LightningModule, so that `SSyncCallback` can serve it."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ssync_pl.errors import HostError

LossFunction = Callable[[nn.Module, Any], Any]


class LightningHost(L.LightningModule):
    """Trains a model with a loss function of yours.

    Its state dict is the model's with ``model.`` before each key. `SSyncCallback` looks inside it for the modules that
    it knows; paths that you name begin with ``model.``.

    Args:
        model: The model.
        training_loss: Called as ``training_loss(model, batch)``; gives a 0-dim loss, or a dict with ``loss``, whose
            other 0-dim tensors are logged.
        optimizer: Makes the optimizer of the parameters that are trained. None takes Adam at 2e-4.
        scheduler: Makes a scheduler of the optimizer, stepped after each optimizer step. None keeps the rate.
        validation_loss: As ``training_loss``, for validation batches. None leaves validation out.
    """

    def __init__(
        self,
        model: nn.Module,
        training_loss: LossFunction,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        validation_loss: LossFunction | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._training_loss = training_loss
        self._validation_loss = validation_loss
        self._make_optimizer = optimizer or functools.partial(torch.optim.Adam, lr=2e-4)
        self._make_scheduler = scheduler

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        return self.model(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the 0-dim loss of a batch; raises `HostError` where ``training_loss`` gives something else."""
        return self._logged("train", self._training_loss(self.model, batch), batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the validation loss, where there is one."""
        if self._validation_loss is not None:
            self._logged("val", self._validation_loss(self.model, batch), batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Makes the optimizer and, where there is one, the scheduler."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = self._make_optimizer(parameters)
        if self._make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._make_scheduler(optimizer), "interval": "step"},
        }

    def _logged(self, stage: str, output: Any, batch: Any) -> Tensor:
        values = dict(output) if isinstance(output, Mapping) else {"loss": output}
        loss = values.get("loss")
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise HostError(
                f"Expected the loss function to give a 0-dim tensor, or a dict with one under 'loss', but got {got}."
            )
        numbers = {name: value for name, value in values.items() if isinstance(value, Tensor) and value.ndim == 0}
        for name, value in numbers.items():
            self.log(f"{stage}/{name}", value.detach(), prog_bar=name == "loss", batch_size=_batch_size(batch))
        return loss


def _batch_size(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 1)
