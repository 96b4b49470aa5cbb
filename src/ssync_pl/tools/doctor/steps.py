"""One training step of any model, plain or in a Trainer, to be run as often as it takes."""

from __future__ import annotations

import importlib
import inspect
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssync_pl.errors import HostError, SSyncError

Run = Callable[[], Tensor | None]

_ENDLESS = 100_000  # steps, so that schedules of the host do not end
_FOREIGN = ("site-packages", str(Path(__file__).parents[2] / "adapters"), str(Path(__file__).parent))


class StepError(HostError):
    """The model itself fails in its step."""


class _DoneError(Exception):
    """Ends a training that has served its purpose."""


def namespace(host: nn.Module) -> str | None:
    """Returns the module whose Trainer takes a LightningModule, since the other one refuses it; None for no such."""
    for cls in type(host).__mro__:
        if cls.__name__ == "LightningModule":
            top = cls.__module__.split(".")[0]
            return {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}.get(top)
    return None


def plain_step(host: nn.Module, batch: Any, method: str = "") -> Run:
    """Makes a step of a model that is trained by a loop of its user's own."""
    call = getattr(host, method, None) if method else host
    if not callable(call):
        raise HostError(f"Expected {type(host).__name__} to have a method '{method}', but it has none. Check --call.")
    host.train()
    arguments = batch if isinstance(batch, tuple) else (batch,)

    def run() -> Tensor | None:
        with _explained(host, batch):
            return _loss(call(*arguments))

    return run


def in_trainer(host: Any, data: Any, look: Callable[[Run, Any], None]) -> None:
    """Brings a LightningModule to its first training step, in a real Trainer, hands the step to `look`, and stops.

    `data` is a data module or a batch. No optimizer step is taken, and nothing is written.
    """
    lightning: Any = importlib.import_module(namespace(host) or "lightning.pytorch")

    class Stop(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            def run() -> Tensor | None:
                with _explained(host, batch):
                    return _loss(host.training_step(*_arguments(host, batch)))

            look(run, batch)
            raise _DoneError

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    counts = {"max_steps": _ENDLESS, "devices": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    source = data if hasattr(data, "train_dataloader") else DataLoader([data], batch_size=None)  # type: ignore[arg-type]
    with quiet(), _explained(host, data):
        try:
            # A data module may take the place of a loader.
            lightning.Trainer(callbacks=[Stop()], **counts, **dict.fromkeys(off, False)).fit(host, source)
        except _DoneError:
            return
    raise HostError(
        f"Expected the training data of {type(host).__name__} to have a batch, but there was none. Check the data, or "
        "give the shape of a batch with --batch."
    )


def _arguments(host: Any, batch: Any) -> tuple[Any, ...]:
    try:
        inspect.signature(host.training_step).bind(batch, 0)
    except TypeError:
        return (batch,)
    return (batch, 0)


def _loss(output: Any) -> Tensor | None:
    """Finds the loss in what a step gives; without one, the mean square of its tensors takes the place."""
    if output is None or (isinstance(output, Tensor) and output.ndim == 0):
        return output
    if isinstance(output, Mapping):
        scalars = {str(key): value for key, value in output.items() if isinstance(value, Tensor) and value.numel() == 1}
        losses = {key: value for key, value in scalars.items() if "loss" in key and value.requires_grad}
        if losses:
            return losses["loss"] if "loss" in losses else torch.stack([*losses.values()]).sum()
    tensors: list[Tensor] = []
    apply_to_collection(output, Tensor, tensors.append, allow_frozen=True)
    values = [value for value in tensors if value.is_floating_point()]
    values = [value for value in values if value.requires_grad] or values
    if not values:
        raise HostError(f"Expected the step to give a loss, or tensors, but got {type(output).__name__}.")
    return torch.stack([value.float().square().mean() for value in values]).sum()


@contextmanager
def _explained(host: nn.Module, batch: Any) -> Iterator[None]:
    try:
        yield
    except (SSyncError, _DoneError):
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        # The deepest line of the user's own code says more than one of a library, or of what listens.
        own = [one for one in frames if not any(part in one.filename for part in _FOREIGN)] or frames
        text = str(error).strip().split("\n")[0] or "no message"
        raise StepError(
            f"Expected {type(host).__name__} to run a training step on {describe_batch(batch)}, but it raised "
            f"{type(error).__name__}: {text} ({Path(own[-1].filename).name}, line {own[-1].lineno}). Give a batch as "
            "the model expects it, e.g. --batch video=2,4,3,64,64 for a dict, and --call METHOD where its loss has a "
            "method of its own."
        ) from error


def describe_batch(batch: Any) -> str:
    """Describes the shapes of a batch, and names the type of anything else."""
    if not isinstance(batch, (Tensor, Mapping, list, tuple)):
        return type(batch).__name__
    return str(apply_to_collection(batch, Tensor, lambda value: tuple(value.shape)))[:200]


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps back Lightning's notes on seeds, devices and workers, which are about trainings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
