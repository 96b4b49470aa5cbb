"""Loads what the user named: a model, its weights, a batch."""

from __future__ import annotations

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

__all__ = ["build_model", "load_weights", "parse_batch", "working_folder_first"]


def build_model(target: str, settings: Mapping[str, Any] | None = None) -> nn.Module:
    """Imports the model `package.module:name`, or calls the class or function of that name with `settings`."""
    settings = settings or {}
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ConfigError(
            f"Expected a model as 'package.module:name', but got {target!r}. The name is a class, a function that "
            "builds the model, or the model itself."
        )
    found = _import(module_name, target)
    for part in name.split("."):
        if not hasattr(found, part):
            names = sorted(one for one, value in vars(found).items() if callable(value) and not one.startswith("_"))
            raise ConfigError(
                f"Expected '{part}' in '{module_name}' for {target!r}, but it is not there. Its names: "
                f"{', '.join(names[:12]) or 'none'}."
            )
        found = getattr(found, part)
    if isinstance(found, nn.Module) and settings:
        raise ConfigError(
            f"Expected no --init for {target!r}, which is a model already, but got {', '.join(settings)}."
        )
    model = found if isinstance(found, nn.Module) or not callable(found) else _call(found, target, settings)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"Expected {target!r} to be a torch.nn.Module, or a class or function that gives one, but got "
            f"{type(model).__name__}."
        )
    return model


def _import(name: str, target: str) -> Any:
    if name.endswith(".py") or "/" in name or name.startswith("."):
        dotted = name.removesuffix(".py").strip("./").replace("/", ".")
        raise ConfigError(
            f"Expected a module for {target!r} as `import` names it, but got '{name}'. Write e.g. '{dotted}', and run "
            "this in the folder where that can be imported."
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"Expected a module '{name}' for {target!r}, but there is none. Run this in the folder of your code, "
                "or install it."
            ) from error
        raise ConfigError(
            f"Expected to import '{name}', but it needs '{error.name}', which is not installed."
        ) from error
    except SystemExit as error:  # such as a script that reads its own command line
        raise ConfigError(
            f"Expected to import '{name}', but it ended the program (exit {error.code}). Put what it does as a script "
            "below `if __name__ == '__main__':`."
        ) from error
    except Exception as error:
        raise ConfigError(f"Expected to import '{name}', but it raised {type(error).__name__}: {error}.") from error


def _call(build: Any, target: str, settings: Mapping[str, Any]) -> Any:
    try:
        return build(**settings)
    except SSyncError:
        raise
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items()) or "no arguments"
        raise ConfigError(
            f"Expected {target!r} to build a model from {given}, but it raised {type(error).__name__}: {error}. Give "
            "its arguments as --init name=value."
        ) from error


def parse_batch(words: Sequence[str]) -> Any:
    """Makes random numbers in [0, 1): a tensor, a tuple of tensors for several shapes, a dict for shapes with names."""
    values: dict[str | int, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for place, word in enumerate(words):
        name, equals, text = word.rpartition("=")
        sizes = text.split(",")
        if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes) or (equals and not name):
            raise ConfigError(
                f"Expected --batch as sizes, e.g. 2,4,3,64,64 (B, T, 3, H, W) or video=2,4,3,64,64, but got {word!r}."
            )
        if name in values:
            raise ConfigError(f"Expected each name of --batch once, but got {name!r} again. Leave one out.")
        try:
            values[name or place] = torch.rand([int(size) for size in sizes], generator=generator)
        except (RuntimeError, TypeError, MemoryError) as error:  # more than memory, or than 64 bits
            raise ConfigError(f"Expected --batch to fit into memory, but got {word!r}. Give a smaller one.") from error
    kinds = {type(name) for name in values}
    if len(kinds) > 1:
        raise ConfigError(f"Expected names for all shapes of --batch or for none, but got {', '.join(words)}.")
    if kinds == {str}:
        return values
    return values[0] if len(values) == 1 else tuple(values.values())


def load_weights(host: nn.Module, path: Path) -> None:
    """Puts the weights of a checkpoint or a state dict into a model."""
    state = read_checkpoint(path).state
    try:
        host.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"Expected {path} to hold the weights of {type(host).__name__}, but: {reason[:300]}"
        ) from error


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
