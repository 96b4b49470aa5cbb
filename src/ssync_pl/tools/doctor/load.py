"""Loads what the user named: a model, its weights, a batch."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, SSyncError
from ssync_pl.tools.official.checkpoints import read_checkpoint


def build_model(target: str, settings: Mapping[str, Any] | None = None) -> nn.Module:
    """Imports the model `package.module:name`, or calls the class or function of that name with `settings`."""
    settings = settings or {}
    module, _, name = target.partition(":")
    try:
        found: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        model = found if isinstance(found, nn.Module) and not settings else found(**settings)
        if not isinstance(model, nn.Module):
            raise TypeError(f"it gives {type(model).__name__} and no torch.nn.Module")
    except SSyncError:
        raise
    except (Exception, SystemExit) as error:  # a script may read its own command line and exit
        given = f" with {', '.join(f'{key}={value!r}' for key, value in settings.items())}" if settings else ""
        raise ConfigError(
            f"Expected {target!r}{given} to be a model or to build one, but got {type(error).__name__}: {error}. Write "
            "package.module:name as `import` does, in the folder of your code, and arguments as --init name=value."
        ) from error
    return model


def parse_batch(words: Sequence[str]) -> Any:
    """Makes random numbers in [0, 1): a tensor, a tuple of tensors for several shapes, a dict for shapes with names."""
    values: dict[str | int, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for place, word in enumerate(words):
        name, equals, text = word.rpartition("=")
        sizes = [int(size) if size.strip().isdecimal() else 0 for size in text.split(",")]
        if min(sizes) < 1 or (equals and not name):
            raise ConfigError(
                f"Expected --batch as sizes, e.g. 2,4,3,64,64 (B, T, 3, H, W) or video=2,4,3,64,64, but got {word!r}."
            )
        try:
            values[name or place] = torch.rand(sizes, generator=generator)
        except (RuntimeError, TypeError, MemoryError) as error:  # more than memory, or than 64 bits
            raise ConfigError(f"Expected --batch to fit into memory, but got {word!r}. Give a smaller one.") from error
    if len(values) < len(words) or len({type(name) for name in values}) > 1:
        raise ConfigError(f"Expected --batch with one name per shape or without names, but got {', '.join(words)}.")
    if isinstance(next(iter(values)), str):
        return values
    return values[0] if len(values) == 1 else tuple(values.values())


def load_weights(host: nn.Module, path: Path) -> None:
    """Puts the weights of a checkpoint or a state dict into a model."""
    state = read_checkpoint(path).state
    try:
        host.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"Expected {path} to hold the weights of {type(host).__name__}, but: {reason}") from error


@contextmanager
def working_folder_first() -> Iterator[None]:
    """Finds the user's own modules, as `python train.py` does."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
