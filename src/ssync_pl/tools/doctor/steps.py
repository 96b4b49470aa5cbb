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
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssync_pl.errors import HostError, SSyncError

__all__ = ["Run", "StepError", "describe_batch", "in_trainer", "is_lightning", "plain_step", "quiet"]

Run = Callable[[], Tensor | None]

_LONG_TRAINING = 100_000
_FOREIGN = ("site-packages", str(Path(__file__).parents[2] / "adapters"), str(Path(__file__).parent))


class StepError(HostError):
    """The model itself fails in its step."""


class _DoneError(Exception):
    """Ends a training that has served its purpose."""


def is_lightning(host: nn.Module) -> bool:
    """Tells whether a model is a LightningModule of either namespace."""
    return any(
        cls.__name__ == "LightningModule" and cls.__module__.split(".")[0] in ("lightning", "pytorch_lightning")
        for cls in type(host).__mro__
    )


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
    # The host's own namespace: a Trainer of the other one refuses it.
    other = any(cls.__module__.startswith("pytorch_lightning") for cls in type(host).__mro__)
    lightning: Any = importlib.import_module("pytorch_lightning" if other else "lightning.pytorch")

    class Stop(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            def run() -> Tensor | None:
                with _explained(host, batch):
                    return _loss(host.training_step(*_arguments(host, batch)), stand_in=False)

            look(run, batch)
            raise _DoneError

    with quiet():
        trainer = lightning.Trainer(
            max_steps=_LONG_TRAINING,
            devices=1,
            callbacks=[Stop()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        source = data if hasattr(data, "train_dataloader") else DataLoader([data], batch_size=None)  # type: ignore[arg-type]
        try:
            trainer.fit(host, source)  # takes a data module in the place of a loader, too
        except _DoneError:
            return
        except SSyncError:
            raise
        except Exception as error:
            raise HostError(
                f"Expected a Trainer to bring {type(host).__name__} to its first step, but {_reason(error)}."
            ) from error
    raise HostError(
        f"Expected the training data of {type(host).__name__} to have a batch, but there was none. Check the data, or "
        "give the shape of a batch with --batch."
    )


def _arguments(host: Any, batch: Any) -> tuple[Any, ...]:
    parameters = inspect.signature(host.training_step).parameters.values()
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    several = len(positional) > 1 or any(one.kind is one.VAR_POSITIONAL for one in parameters)
    return (batch, 0) if several else (batch,)


def _loss(output: Any, stand_in: bool = True) -> Tensor | None:
    """Finds the loss in what a step gives; `stand_in` allows the mean square of any tensors to take its place."""
    if output is None or (isinstance(output, Tensor) and output.ndim == 0):
        return output
    if isinstance(output, Mapping):
        named = {key: value for key, value in output.items() if "loss" in str(key) and _is_scalar(value)}
        if named:
            total = named.get("loss")
            return torch.stack([*named.values()]).sum() if total is None else total
    values = [value for value in _tensors(output) if value.is_floating_point()]
    values = [value for value in values if value.requires_grad] or values
    if not stand_in or not values:
        wanted = "a loss, or tensors" if stand_in else "a 0-dim tensor or a dict with 'loss'"
        raise HostError(f"Expected the step to give {wanted}, but got {type(output).__name__}.")
    return torch.stack([value.float().square().mean() for value in values]).sum()


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(one)


@contextmanager
def _explained(host: nn.Module, batch: Any) -> Iterator[None]:
    try:
        yield
    except SSyncError:
        raise
    except (Exception, SystemExit) as error:
        raise StepError(
            f"Expected {type(host).__name__} to run a training step on {describe_batch(batch)}, but {_reason(error)}. "
            "Give a batch as the model expects it, e.g. --batch video=2,4,3,64,64 for a dict, and --call METHOD where "
            "its loss has a method of its own."
        ) from error


def _reason(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    # The deepest line of the user's own code says more than one of a library, or of what listens.
    frame = next((one for one in reversed(frames) if not any(part in one.filename for part in _FOREIGN)), frames[-1])
    text = str(error).strip().split("\n")[0] or "no message"
    return f"it raised {type(error).__name__}: {text} ({Path(frame.filename).name}, line {frame.lineno})"


def describe_batch(batch: Any) -> str:
    """Describes the shapes of a batch."""
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        shapes = [f"{key} {tuple(value.shape)}" for key, value in batch.items() if isinstance(value, Tensor)]
        return ", ".join(shapes) or f"a dict of {', '.join(map(str, batch))}"
    if isinstance(batch, (list, tuple)):
        return ", ".join(describe_batch(one) for one in batch)
    return type(batch).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps back Lightning's notes on seeds, devices and workers, which are about trainings."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
