"""Values of a public configuration by dotted key, taken so that no key goes unnoticed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partialmethod
from typing import Any

from ssync_pl.errors import ConfigError, require

__all__ = ["Keys"]

_NOTHING = object()


class Keys:
    """Takes values one by one; `refuse_unread` finds those that nothing took. A value of `null` is as good as none."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.values = dict(_leaves(tree, ""))
        self.left_out: dict[str, str] = {}
        self._read: set[str] = set()

    def below(self, section: str) -> list[str]:
        """Names of the entries of a section; none without it."""
        start = f"{section}."
        return list(dict.fromkeys(key[len(start) :].partition(".")[0] for key in self.values if key.startswith(start)))

    def take(self, key: str, default: Any = _NOTHING) -> Any:
        """Takes a value; a missing one is the default, or an error where there is none."""
        self._read.add(key)
        value = self.values.get(key, default)
        require(value is not _NOTHING, f"{key} to have a value", "none", advice="Add it.")
        return value

    def number(self, key: str, default: Any = _NOTHING, kind: type = float) -> Any:
        """Takes a finite number, a whole one where `kind` is `int`."""
        value = self.take(key, default)
        known = type(value) in (int, float) and math.isfinite(value) and value == kind(value)
        require(known or value is default, f"{key} to be a {'whole ' * (kind is int)}number", repr(value))
        return default if value is default else kind(value)

    integer = partialmethod(number, kind=int)

    def choose(self, key: str, *choices: Any, default: Any = _NOTHING) -> Any:
        """Takes a value of which the package has only some counterparts."""
        value = self.take(key, default)
        # `1 == True` in Python, but no configuration means that.
        if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices):
            raise ConfigError(
                f"Expected {key} to be {' or '.join(map(repr, choices))}, as this package has no other and sizes have "
                f"to agree, but got {value!r}. Change it, or write the configuration by hand."
            )
        return value

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Takes all values whose keys match (`*` for any part), which are not translated, and notes the reasons."""
        for key in self.values:
            for pattern, reason in reasons.items():
                if fnmatchcase(key, pattern):
                    self._read.add(key)
                    self.left_out |= {key: reason} if reason else {}

    def refuse_unread(self, *sections: str) -> None:
        """Refuses values of some sections that nothing took, and notes those of others."""
        unread = [key for key in self.values if key not in self._read]
        refused = [key for key in unread if key.partition(".")[0] in sections]
        if refused:
            raise ConfigError(
                f"Expected keys that have a counterpart in this package, but got {', '.join(refused)}. Leave out those "
                f"that do not matter, for example by --set {refused[0]}=null"
            )
        self.left_out |= dict.fromkeys(unread, "nothing is known about it")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, child in value.items():
            require("." not in str(name), "keys without dots", repr(name))
            yield from _leaves(child, f"{key}.{name}".removeprefix("."))
    elif value is not None:
        yield key, value
