"""What several commands do with their words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssync_pl.errors import ConfigError

__all__ = ["key_values", "refuse_existing"]


def key_values(words: Sequence[str], option: str) -> dict[str, Any]:
    """Reads words like `num_slots=7`, whose values are YAML."""
    import yaml

    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"Expected {option} NAME=VALUE, such as {option} num_slots=7, but got {word!r}.")
        try:
            values[name] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise ConfigError(f"Expected {option} {name}= with a YAML value, but got {text!r}.") from error
    return values


def refuse_existing(path: Path, option: str, force: bool) -> None:
    """Refuses a file that exists, unless it is one and may be replaced."""
    if path.exists() and not (force and path.is_file()):
        raise ConfigError(f"Expected {option} to be a new file, but {path} exists. Add --force to replace a file.")
