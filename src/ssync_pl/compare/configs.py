"""Configurations as plain dicts, merged as LightningCLI merges its files."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssync_pl.errors import ConfigError, require

__all__ = ["callback_name", "callbacks_of", "class_of", "merge", "options_of", "read_yaml"]


def read_yaml(path: str | Path, option: str = "--config") -> dict[str, Any]:
    """Reads a configuration file that `option` names, and refuses one without keys, with the file's name."""
    import yaml

    path = Path(path)
    require(path.is_file(), f"{option} to name a YAML file", f"{str(path)!r}, which is none")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        json.dumps(content, sort_keys=True, default=str)  # refuses what holds itself, and keys of several kinds
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        expected = f"Expected {option} {path} to hold YAML in UTF-8"
        raise ConfigError(f"{expected}, but reading it failed: {reason}.") from error
    got = "nothing" if content is None else type(content).__name__
    require(isinstance(content, dict), f"{option} {path} to hold keys with values", got)
    trainer = content.get("trainer") or {}
    require(isinstance(trainer, dict), f"`trainer` in {path} to hold keys with values", type(trainer).__name__)
    return dict(content)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lays one configuration over another.

    Mappings are merged key by key, lists and values of the later one replace those before, a key with `+` appends to a
    list, and the options of a class go when the later configuration names another class.
    """
    merged = copy.deepcopy(dict(base))
    if "class_path" in over and merged.get("class_path") not in (None, over["class_path"]):
        merged.pop("init_args", None)
    for key, value in over.items():
        if isinstance(key, str) and key.endswith("+"):
            before = merged.get(key[:-1]) or []
            before = before if isinstance(before, list) else [before]
            merged[key[:-1]] = [*before, *copy.deepcopy(value if isinstance(value, list) else [value])]
        elif isinstance(value, Mapping):
            merged[key] = merge(merged[key] if isinstance(merged.get(key), Mapping) else {}, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def callbacks_of(config: Mapping[str, Any]) -> list[Any]:
    """Returns the callbacks of a merged configuration, as they are written there."""
    trainer = config.get("trainer")
    found = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    if found is None:
        return []
    return list(found) if isinstance(found, Sequence) and not isinstance(found, str) else [found]


def callback_name(callback: Any) -> str:
    """Returns the class name of a callback without its module; empty when there is none."""
    path = callback.get("class_path") if isinstance(callback, Mapping) else callback
    return str(path or "").rsplit(".", 1)[-1]


def class_of(config: Mapping[str, Any], part: str) -> tuple[str, dict[str, Any]]:
    """Returns the class name of `model` or `data` without its module, and its `init_args`."""
    found = config.get(part)
    known = isinstance(found, str) or (isinstance(found, Mapping) and "class_path" in found)
    expected = f"the configuration to have `{part}` with a `class_path`"
    require(known, expected, repr(found)[:80], advice=f"Add a --config that names the {part}.")
    return callback_name(found), options_of(found)


def options_of(part: Any) -> dict[str, Any]:
    """Returns the `init_args` of a class in a configuration."""
    options = part.get("init_args") if isinstance(part, Mapping) else None
    return dict(options) if isinstance(options, Mapping) else {}
