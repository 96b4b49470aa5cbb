"""Mappings of a public configuration, read so that no key goes unnoticed."""

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
    """What a translation leaves out: dotted key → reason, and keys that nothing is known about."""

    left_out: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


class Section:
    """A mapping whose keys are taken one by one; `close` reports those that were not taken.

    Args:
        values: The mapping; `None` for one that is not there.
        path: Its dotted key, for messages.
        findings: Where unknown keys go.
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
        """Dotted key of an entry, from the root."""
        return f"{self.path}.{name}" if self.path else name

    def take(self, name: str, default: Any = _NOTHING) -> Any:
        """Takes a value; a missing value or `null` means the default, or is an error where there is none."""
        self._taken.add(name)
        value = self.values.get(name)
        if value is None and default is _NOTHING:
            raise ConfigError(f"Expected {self.key(name)} to have a value, but got none. Add it.")
        return default if value is None else value

    def integer(self, name: str, default: Any = _NOTHING) -> int:
        """Takes a whole number."""
        value = self.take(name, default)
        if value is default:
            return default
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())  # no inf, no NaN
        if isinstance(value, bool) or not whole:
            raise ConfigError(f"Expected {self.key(name)} to be a whole number, but got {value!r}. Correct it.")
        return int(value)

    def number(self, name: str, default: Any = _NOTHING) -> float:
        """Takes a number."""
        value = self.take(name, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"Expected {self.key(name)} to be a number, but got {value!r}. Correct it.")
        return float(value)

    def integers(self, name: str) -> list[int]:
        """Takes a list of whole numbers."""
        values = self.take(name)
        if not isinstance(values, list) or any(type(value) is not int for value in values):
            raise ConfigError(f"Expected {self.key(name)} to be a list of whole numbers, but got {values!r}.")
        return values

    def need(self, name: str, *allowed: Any, default: Any = _NOTHING, why: str) -> Any:
        """Takes a value of which only those in `allowed` have a counterpart; `why` is a sentence about the hosts."""
        value = self.take(name, default)
        # `1 == True` in Python, but no configuration means that.
        if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in allowed):
            choices = " or ".join(repr(choice) for choice in allowed)
            raise ConfigError(f"Expected {self.key(name)} to be {choices}, but got {value!r}. {why}")
        return value

    def fixed(self, why: str, **values: Any) -> None:
        """Takes entries that may be missing, but must not differ from the values given."""
        for name, value in values.items():
            self.need(name, value, default=value, why=why)

    def section(self, name: str) -> Section:
        """Takes a mapping; `present` tells whether it is there."""
        child = Section(self.take(name, None), self.key(name), self.findings)
        self._children.append(child)
        return child

    def leave(self, reason: str, *names: str) -> None:
        """Notes why entries are not translated, for those that are set."""
        for name in names:
            self._taken.add(name)
            if self.values.get(name) is not None:
                self.findings.left_out[self.key(name)] = reason

    def note(self, reason: str) -> None:
        """Notes what is translated differently in this section."""
        self.findings.left_out[self.path] = reason

    def skip(self, *names: str) -> None:
        """Takes entries that mean nothing to the hosts."""
        self._taken.update(names)

    def close(self) -> None:
        """Reports entries that were not taken, here and in the sections below."""
        self.findings.unknown += [self.key(name) for name in self.values if name not in self._taken]
        for child in self._children:
            child.close()
