"""Configurations as plain dicts, merged as LightningCLI merges its files."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssync_pl.errors import ConfigError

__all__ = ["callback_name", "callbacks_of", "class_of", "merge", "merge_all", "read_yaml"]


def read_yaml(path: str | Path, option: str = "--config") -> dict[str, Any]:
    """Read a configuration file.

    Args:
        path: The YAML file.
        option: What named it, for the message.

    Returns:
        Its content; an empty file gives an empty dict.

    Raises:
        ConfigError: There is no such file, or it holds no mapping.

    Example:
        >>> read_yaml("none.yaml")
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected --config to name a YAML file, but there is no 'none.yaml'.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"Expected {option} to name a YAML file, but there is no {str(path)!r}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"Expected {option} {path} to hold YAML, but it does not: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"Expected {option} {path} to hold keys with values, but got {type(content).__name__}.")
    return content


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one configuration over another.

    Mappings are merged key by key, lists and values of the later one replace those before, a key with `+` appends to a
    list, and options of a class go when the later file names another class.

    Args:
        base: The configuration so far.
        over: What is laid over it.

    Returns:
        A new configuration.

    Example:
        >>> merge({"a": {"x": 1, "list": [1]}}, {"a": {"y": 2, "list+": [2]}})
        {'a': {'x': 1, 'list': [1, 2], 'y': 2}}
        >>> merge({"class_path": "A", "init_args": {"x": 1}}, {"class_path": "B"})
        {'class_path': 'B'}
    """
    merged = copy.deepcopy(dict(base))
    if "class_path" in over and merged.get("class_path") not in (None, over["class_path"]):
        merged.pop("init_args", None)
    for key, value in over.items():
        if key.endswith("+"):
            name = key[:-1]
            before = merged.get(name) or []
            before = before if isinstance(before, list) else [before]
            merged[name] = [*before, *copy.deepcopy(value if isinstance(value, list) else [value])]
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        elif isinstance(value, Mapping):
            merged[key] = merge({}, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def merge_all(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge configurations, the later ones over the earlier ones.

    Args:
        parts: The configurations in order.

    Returns:
        A new configuration.

    Example:
        >>> merge_all([{"a": 1}, {"b": 2}, {"a": 3}])
        {'a': 3, 'b': 2}
    """
    merged: dict[str, Any] = {}
    for part in parts:
        merged = merge(merged, part)
    return merged


def callbacks_of(config: Mapping[str, Any]) -> list[Any]:
    """List the callbacks of a merged configuration.

    Args:
        config: The configuration.

    Returns:
        Its callbacks as they are written there.

    Example:
        >>> callbacks_of({"trainer": {"callbacks": {"class_path": "SSyncCallback"}}})
        [{'class_path': 'SSyncCallback'}]
    """
    trainer = config.get("trainer")
    found = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    if found is None:
        return []
    return list(found) if isinstance(found, Sequence) and not isinstance(found, str) else [found]


def callback_name(callback: Any) -> str:
    """Name the class of a callback, without its module.

    Args:
        callback: A mapping with `class_path`, or the class path alone.

    Returns:
        The last part of the class path; empty when there is none.

    Example:
        >>> callback_name({"class_path": "ssync_pl.SSyncCallback"}), callback_name("SSyncPictures")
        ('SSyncCallback', 'SSyncPictures')
    """
    path = callback.get("class_path") if isinstance(callback, Mapping) else callback
    return str(path or "").rsplit(".", 1)[-1]


def class_of(config: Mapping[str, Any], part: str) -> tuple[str, dict[str, Any]]:
    """Name the class of the model or the data, and its options.

    Args:
        config: A merged configuration.
        part: `model` or `data`.

    Returns:
        The class name without its module, and its `init_args`.

    Raises:
        ConfigError: The configuration has no such part, or names no class.

    Example:
        >>> class_of({"model": {"class_path": "SAVi", "init_args": {"num_slots": 8}}}, "model")
        ('SAVi', {'num_slots': 8})
    """
    found = config.get(part)
    if isinstance(found, str):
        return callback_name(found), {}
    if not isinstance(found, Mapping) or "class_path" not in found:
        got = "nothing" if found is None else repr(found)[:80]
        raise ConfigError(
            f"Expected the configuration to have `{part}` with a `class_path`, but got {got}. Add a --config that "
            f"names the {part}."
        )
    options = found.get("init_args")
    return callback_name(found), dict(options) if isinstance(options, Mapping) else {}
