"""Exceptions that name what was expected, what came and what to do; and checks that raise them."""

import contextlib
import importlib.util
import os
import zipfile
from collections.abc import Iterator
from typing import Any


def printable(text: str) -> str:
    """Escapes what a terminal would obey or cannot show, in names of files and answers of servers; line breaks too."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


class SSyncError(Exception):
    """Base of every exception that this package raises on purpose; its message is one printable line."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ShapeError(SSyncError, ValueError):
    """A tensor's shape, dtype or values do not fit."""


class ConfigError(SSyncError, ValueError):
    """A setting is out of range, or settings contradict each other."""


class MissingShardError(ConfigError, FileNotFoundError):
    """A named shard does not exist."""


class HostError(SSyncError, RuntimeError):
    """The host model is not recognised, or its maps cannot be used."""


class ShardError(SSyncError, RuntimeError):
    """A shard, a member or a data set on disk cannot be read or written."""


def require(ok: bool, expected: str, *got: object, advice: str = "") -> None:
    """Raises `ConfigError` unless options are as expected, with what came and what to do."""
    if not ok:
        found = " and ".join(map(str, got))
        raise ConfigError(f"Expected {expected}, but got {found}.{advice and ' ' + advice}")


def require_shard(ok: bool, expected: str, *got: object, advice: str = "") -> None:
    """Raises `ShardError` unless data are as expected, with what came and what to do."""
    if not ok:
        found = " and ".join(map(str, got))
        raise ShardError(f"Expected {expected}, but got {found}.{advice and ' ' + advice}")


def require_shape(ok: bool, expected: str, *got: Any, advice: str = "") -> None:
    """Raises `ShapeError` unless tensors are as expected, with their shapes, dtypes and what to do."""
    if not ok:
        found = " and ".join(f"{tuple(x.shape)} {x.dtype}" if hasattr(x, "dtype") else str(tuple(x)) for x in got)
        raise ShapeError(f"Expected {expected}, but got {found}.{advice and ' ' + advice}")


@contextlib.contextmanager
def explained(
    expected: str, *errors: type[BaseException], advice: str, kind: type[SSyncError] = ShardError
) -> Iterator[None]:
    """Turns some errors in the block into one that says what was expected, what came and what to do."""
    try:
        yield
    except SSyncError:
        raise
    except errors as error:
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise kind(f"Expected {expected}, but got {got}. {advice}") from error


def require_packages(extra: str, *modules: str) -> None:
    """Raises `ConfigError` unless the packages of an extra are installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    advice = f'Run `pip install "ssync-pl[{extra}]"`.'
    require(not missing, f"{', '.join(missing)} to be installed", "none", advice=advice)


def require_unpacked(path: str | os.PathLike[str], most: int) -> None:
    """Raises `ConfigError` unless it is a plain file whose members, if it is a zip, take `most` bytes unpacked."""
    require(os.path.isfile(path), f"a plain file at {str(path)!r}", "none", advice="Correct the path.")
    if zipfile.is_zipfile(path):
        # A damaged directory may lead to whatever error.
        with explained(f"{path} to be a whole archive", Exception, advice="Write it again.", kind=ConfigError):
            size = sum(member.file_size for member in zipfile.ZipFile(path).infolist())
        require(size <= most, f"the members of {path} to take at most {most} bytes unpacked", size)


def choose(argument: str, value: object, *choices: str) -> None:
    """Raises `ConfigError` unless an argument is one of some words."""
    words = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
    require(value in choices, f"argument `{argument}` to be {words}", repr(value))
