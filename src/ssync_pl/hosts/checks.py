"""Checks of the options of hosts."""

from __future__ import annotations

from torch import Tensor

from ssync_pl.errors import ConfigError, ShapeError

__all__ = ["choose", "require", "require_shape"]


def require(ok: bool, expected: str, *got: object, advice: str = "") -> None:
    """Raise `ConfigError` unless options are as expected, with what came and what to do."""
    if not ok:
        found = " and ".join(map(str, got))
        raise ConfigError(f"Expected {expected}, but got {found}.{advice and ' ' + advice}")


def require_shape(ok: bool, expected: str, *got: Tensor | tuple[int, ...], advice: str = "") -> None:
    """Raise `ShapeError` unless tensors are as expected, with their shapes and what to do."""
    if not ok:
        found = " and ".join(str(tuple(x.shape if isinstance(x, Tensor) else x)) for x in got)
        raise ShapeError(f"Expected {expected}, but got {found}.{advice and ' ' + advice}")


def choose(argument: str, value: object, *choices: str) -> None:
    """Raise `ConfigError` unless an argument is one of some words."""
    words = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
    require(value in choices, f"argument `{argument}` to be {words}", repr(value))
