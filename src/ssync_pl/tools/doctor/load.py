"""The model and the batch that the user named."""

from __future__ import annotations

import importlib
import pickle
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, SSyncError
from ssync_pl.tools.official.checkpoints import public_globals, why_unreadable

__all__ = ["build_model", "load_weights", "parse_batch", "parse_settings", "working_folder_first"]


def build_model(target: str, settings: dict[str, Any] | None = None) -> nn.Module:
    """Import a model, or call the class or function that builds it."""
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
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
    if not isinstance(found, nn.Module):
        found = _call(found, target, settings or {})
    elif settings:
        raise ConfigError(
            f"Expected no --init for {target!r}, which is a model already, but got {', '.join(settings)}."
        )
    if not isinstance(found, nn.Module):
        raise ConfigError(f"Expected {target!r} to give a torch.nn.Module, but got {type(found).__name__}.")
    return found


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
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
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


def _call(build: Any, target: str, settings: dict[str, Any]) -> Any:
    if not callable(build):
        raise ConfigError(f"Expected {target!r} to be a class, a function or a model, but got {type(build).__name__}.")
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


def parse_settings(words: list[str]) -> dict[str, Any]:
    """Keyword arguments of a class."""
    settings = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"Expected --init as name=value, but got {word!r}.")
        try:
            settings[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"Expected the value of --init {name} to be YAML, but got {text!r}.") from error
    return settings


def parse_batch(words: list[str], as_dict: bool) -> Any:
    """A batch of random numbers in [0, 1)."""
    named: dict[str, Tensor] = {}
    plain: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for word in words:
        name, equals, text = word.rpartition("=")
        sizes = [int(size) for size in text.split(",") if size.strip().isdecimal() and int(size) > 0]
        if len(sizes) != len(text.split(",")) or (equals and not name):
            raise ConfigError(
                f"Expected --batch as sizes, e.g. 2,4,3,64,64 (B, T, 3, H, W) or video=2,4,3,64,64, but got {word!r}."
            )
        if name in named:
            raise ConfigError(f"Expected each name of --batch once, but got {name!r} again. Leave one out.")
        try:
            value = torch.rand(sizes, generator=generator)
        except (RuntimeError, TypeError, MemoryError) as error:  # more than memory, or than 64 bits
            raise ConfigError(f"Expected --batch to fit into memory, but got {word!r}. Give a smaller one.") from error
        if name:
            named[name] = value
        else:
            plain.append(value)
    if named and plain:
        raise ConfigError(f"Expected names for all shapes of --batch or for none, but got {', '.join(words)}.")
    if named:
        return named
    if as_dict and len(plain) == 1 and plain[0].ndim in (4, 5):
        return {"video" if plain[0].ndim == 5 else "image": plain[0]}
    return plain[0] if len(plain) == 1 else tuple(plain)


def load_weights(host: nn.Module, path: Path) -> None:
    """Put a checkpoint's weights into a model."""
    try:
        with public_globals():
            content = torch.load(path, map_location="cpu", weights_only=True)
        host.load_state_dict(content.get("state_dict", content))
    except FileNotFoundError as error:
        raise ConfigError(f"Expected a checkpoint at {path}, but there is none.") from error
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"Expected {path} to hold tensors and plain values only, but reading it failed ({why_unreadable(error)}). "
            "Save the model's state_dict() alone; no file is read in a way that could run what is in it."
        ) from error
    except Exception as error:
        text = str(error).strip().split("\n")
        raise ConfigError(
            f"Expected {path} to hold the weights of {type(host).__name__}, but {type(error).__name__}: "
            f"{' '.join(line.strip() for line in text[:2])[:300]}"
        ) from error


@contextmanager
def working_folder_first() -> Iterator[None]:
    """Find the user's own modules, as `python train.py` does."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
