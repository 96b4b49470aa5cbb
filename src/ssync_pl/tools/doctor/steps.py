"""A model and a batch as the user names them, and one training step, to be run as often as it takes."""

import functools
import importlib
import inspect
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssync_pl.errors import ConfigError, HostError, SSyncError, explained, require
from ssync_pl.plugin.wrapped_step import loss_of

Run = Callable[[], Tensor]

_FOREIGN = ("site-packages", str(Path(__file__).parents[2] / "adapters"), str(Path(__file__).parent))


class StepError(SSyncError, RuntimeError):
    """The model itself fails in its step."""


class _DoneError(Exception):
    """Ends a training that has served its purpose, with what was asked of it."""


def build_model(target: str, settings: Mapping[str, Any]) -> nn.Module:
    """Imports the model `package.module:name`, or calls the class or function of that name with `settings`."""
    module, _, name = target.partition(":")
    given = f" with {', '.join(f'{key}={value!r}' for key, value in settings.items())}" if settings else ""
    expected = f"{target!r}{given} to be a model or to build one"
    advice = "Write package.module:name as `import` does, in the folder of your code, and --init name=value."
    # A script may read its own command line and exit.
    with explained(expected, Exception, SystemExit, advice=advice, kind=ConfigError):
        found: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        model = found if isinstance(found, nn.Module) and not settings else found(**settings)
        if not isinstance(model, nn.Module):
            raise TypeError(f"it gives {type(model).__name__} and no torch.nn.Module")
    return model


def parse_batch(words: Sequence[str]) -> Any:
    """Makes random numbers in [0, 1): a tensor, a tuple for several shapes, a dict for names, nested by their dots."""
    values: dict[str, Tensor] = {}
    for place, word in enumerate(words):
        name, equals, text = word.rpartition("=")
        valid = re.fullmatch(r"0*[1-9]\d*(,0*[1-9]\d*)*", text, re.ASCII) and bool(name) == bool(equals)
        require(bool(valid), "--batch as sizes, e.g. 2,4,3,64,64 (B, T, 3, H, W) or video=2,4,3,64,64", repr(word))
        kinds, advice = (RuntimeError, TypeError, ValueError, MemoryError), "Give a smaller one."
        with explained(f"--batch {word} to fit into memory", *kinds, advice=advice, kind=ConfigError):
            sizes = [int(size) for size in text.split(",")]  # may be more than memory has, or 64 bits count
            values[name or str(place)] = torch.rand(sizes, generator=torch.Generator().manual_seed(place))
    named = sum("=" in word for word in words)
    alike = named in (0, len(words)) and len(values) == len(words)
    inside = any(name.startswith(f"{other}.") for name in values for other in values)
    require(alike and not inside, "--batch with one name per shape or without names", ", ".join(words))
    if not named:
        return values["0"] if len(values) == 1 else tuple(values.values())
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        functools.reduce(lambda inner, key: inner.setdefault(key, {}), parents, nested)[last] = value
    return nested


def describe_batch(batch: Any) -> str:
    """Describes the shapes of a batch, and names the type of anything else."""
    if not isinstance(batch, (Tensor, Mapping, list, tuple)):
        return type(batch).__name__
    return str(apply_to_collection(batch, Tensor, lambda value: tuple(value.shape)))[:200]


def tensors_of(values: Any) -> list[Tensor]:
    """Lists the tensors in nested dicts, sequences and dataclasses."""
    found: list[Tensor] = []
    apply_to_collection(values, Tensor, found.append, allow_frozen=True)
    return found


def namespace(host: nn.Module) -> str | None:
    """Returns the module whose Trainer takes a LightningModule, since the other one refuses it; None for no such."""
    tops = [cls.__module__.split(".")[0] for cls in type(host).__mro__ if cls.__name__ == "LightningModule"]
    return {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}.get(tops[0]) if tops else None


def plain_step(host: nn.Module, batch: Any, method: str = "") -> Run:
    """Makes a step of a model that is trained by a loop of its user's own."""
    call = getattr(host, method, None) if method else host
    if not callable(call):
        raise HostError(f"Expected {type(host).__name__} to have a method '{method}', but it has none. Check --call.")
    host.train()
    return _step(host, call, batch, batch if isinstance(batch, tuple) else (batch,), _find_loss)


def in_trainer(host: Any, data: Any, look: Callable[[Run, Any], Any]) -> Any:
    """Brings a LightningModule to its first training step on a data module or batch; returns what `look` says of it."""
    lightning: Any = importlib.import_module(namespace(host) or "lightning.pytorch")

    class Stop(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            arguments: tuple[Any, ...] = (batch, 0)
            try:
                inspect.signature(host.training_step).bind(*arguments)
            except TypeError:
                arguments = (batch,)
            raise _DoneError(look(_step(host, host.training_step, batch, arguments, loss_of), batch))

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    # So many steps that schedules of the host do not end.
    counts = {"max_steps": 100_000, "devices": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    source = data if hasattr(data, "train_dataloader") else DataLoader([data], batch_size=None)  # type: ignore[arg-type]
    with quiet(), _explained(host, data):
        try:
            # A data module may take the place of a loader.
            lightning.Trainer(callbacks=[Stop()], **counts, **dict.fromkeys(off, False)).fit(host, source)
        except _DoneError as done:
            return done.args[0]
    raise HostError(
        f"Expected the training data of {type(host).__name__} to have a batch, but there was none. Check the data, or "
        "give the shape of a batch with --batch."
    )


def _step(host: nn.Module, call: Any, batch: Any, arguments: tuple[Any, ...], find: Callable[[Any], Any]) -> Run:
    def run() -> Tensor:
        with _explained(host, batch):
            output = call(*arguments)
            loss = find(output)
            if isinstance(loss, Tensor) and loss.numel() == 1:
                return loss
        given = describe_batch(output)
        raise HostError(f"Expected the step to give a loss of one number, but this batch gave {given}. Was it skipped?")

    return run


def _find_loss(output: Any) -> Tensor | None:
    """Finds the loss in what a step gives; without one, the mean square of its tensors takes the place."""
    if isinstance(output, Tensor) and output.numel() == 1:
        return output
    if isinstance(output, Mapping):
        losses = {name: value for name, value in output.items() if "loss" in str(name) and isinstance(value, Tensor)}
        terms = {name: value.sum() for name, value in losses.items() if value.numel() == 1 and value.requires_grad}
        if terms:
            return terms.get("loss", terms.get("total_loss", torch.stack([*terms.values()]).sum()))
    floats = [value for value in tensors_of(output) if value.is_floating_point()]
    values = [value for value in floats if value.requires_grad] or floats
    if not values:
        return None
    warnings.warn("No loss came back: the mean square of the output takes its place. Name one by --call.", stacklevel=1)
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
            "the model expects it, e.g. --batch video=2,4,3,64,64 for a dict, and --call METHOD for another method."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps back Lightning's notes on seeds, devices and workers, which are about trainings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
