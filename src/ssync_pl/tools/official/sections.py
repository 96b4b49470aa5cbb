"""Mappings of a configuration, read so that no key goes unnoticed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ssync_pl.errors import ConfigError

__all__ = ["Findings", "Section"]

_NOTHING = object()


@dataclass
class Findings:
    """What a translation has to tell.

    Attributes:
        left_out: Key → why it has no counterpart.
        unknown: Keys that nobody asked for.

    Example:
        >>> findings = Findings()
        >>> section = Section({"size": 3, "colour": "red"}, "model", findings)
        >>> section.integer("size")
        3
        >>> section.close()
        >>> findings.unknown
        ['model.colour']
    """

    left_out: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def leave(self, key: str, reason: str) -> None:
        """Note that a key is not translated.

        Args:
            key: Dotted key.
            reason: Why, as a clause.
        """
        self.left_out[key] = reason


class Section:
    """A mapping whose keys are taken one by one; what nobody took is reported by `close`.

    Args:
        values: The mapping; `None` for one that is not there.
        path: Its dotted key, for messages.
        findings: Where unknown keys go.

    Raises:
        ConfigError: `values` is no mapping.

    Example:
        >>> Section({"lr": "fast"}, "optimizer", Findings()).number("lr")
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected optimizer.lr to be a number, but got 'fast'. Correct it.
    """

    def __init__(self, values: Mapping[str, Any] | None, path: str, findings: Findings) -> None:
        if values is not None and not isinstance(values, Mapping):
            raise ConfigError(f"Expected {path or 'the file'} to be a mapping, but got {values!r}. Correct it.")
        self.values = dict(values or {})
        self.path = path
        self.findings = findings
        self.present = values is not None
        self._taken: set[str] = set()
        self._children: list[Section] = []

    def key(self, name: str) -> str:
        """Dotted key of an entry.

        Args:
            name: Its key here.

        Returns:
            The key from the root.
        """
        return f"{self.path}.{name}" if self.path else name

    def take(self, name: str, default: Any = _NOTHING) -> Any:
        """Take a value.

        Args:
            name: Key.
            default: What a missing value or `null` means; without it the value has to be there.

        Returns:
            The value.

        Raises:
            ConfigError: It is missing.
        """
        self._taken.add(name)
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _NOTHING:
            raise ConfigError(f"Expected {self.key(name)} to have a value, but got none. Add it.")
        return default

    def integer(self, name: str, default: Any = _NOTHING) -> int:
        """Take a whole number.

        Args:
            name: Key.
            default: What a missing value means.

        Returns:
            The number; a default that is none as it is.

        Raises:
            ConfigError: It is something else.
        """
        value = self.take(name, default)
        if value is default and default is not _NOTHING:
            return default
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())  # no inf, no NaN
        if isinstance(value, bool) or not whole:
            raise ConfigError(f"Expected {self.key(name)} to be a whole number, but got {value!r}. Correct it.")
        return int(value)

    def number(self, name: str, default: Any = _NOTHING) -> float:
        """Take a number.

        Args:
            name: Key.
            default: What a missing value means.

        Returns:
            The number; a default that is none as it is.

        Raises:
            ConfigError: It is something else.
        """
        value = self.take(name, default)
        if value is default and default is not _NOTHING:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"Expected {self.key(name)} to be a number, but got {value!r}. Correct it.")
        return float(value)

    def need(self, name: str, *allowed: Any, default: Any = _NOTHING, why: str) -> Any:
        """Take a value of which only some have a counterpart.

        Args:
            name: Key.
            *allowed: Values that have one.
            default: What a missing value means.
            why: What the hosts of this package do, as a sentence.

        Returns:
            The value.

        Raises:
            ConfigError: It is another one.
        """
        value = self.take(name, default)
        # `1 == True` in Python, but no configuration means that.
        if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in allowed):
            choices = " or ".join(repr(choice) for choice in allowed)
            raise ConfigError(f"Expected {self.key(name)} to be {choices}, but got {value!r}. {why}")
        return value

    def section(self, name: str) -> Section:
        """Take a mapping.

        Args:
            name: Key.

        Returns:
            The section; `present` tells whether it is there.
        """
        child = Section(self.take(name, None), self.key(name), self.findings)
        self._children.append(child)
        return child

    def leave(self, reason: str, *names: str) -> None:
        """Note that entries are not translated, where they are set.

        Args:
            reason: Why, as a clause.
            *names: Keys.
        """
        for name in names:
            if self.values.get(name) is not None:
                self.findings.leave(self.key(name), reason)
            self._taken.add(name)

    def close(self) -> None:
        """Report entries that nobody took, here and in the sections below."""
        self.findings.unknown += [self.key(name) for name in self.values if name not in self._taken]
        for child in self._children:
            child.close()
