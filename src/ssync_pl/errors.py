"""Exceptions of the package: each names what was expected, what came and what to do."""

from __future__ import annotations

__all__ = ["ConfigError", "HostError", "MissingShardError", "SSyncError", "ShapeError", "ShardError"]


class SSyncError(Exception):
    """Base of every exception that this package raises on purpose.

    Example:
        >>> issubclass(ShardError, SSyncError)
        True
    """


class ShapeError(SSyncError, ValueError):
    """A tensor's shape, dtype or values do not fit.

    Example:
        >>> issubclass(ShapeError, ValueError)
        True
    """


class ConfigError(SSyncError, ValueError):
    """A setting is out of range, or settings contradict each other.

    Example:
        >>> issubclass(ConfigError, ValueError)
        True
    """


class MissingShardError(ConfigError, FileNotFoundError):
    """A named shard does not exist.

    Example:
        >>> issubclass(MissingShardError, FileNotFoundError)
        True
    """


class HostError(SSyncError, RuntimeError):
    """The host model is not recognised, or its maps cannot be used.

    Example:
        >>> issubclass(HostError, RuntimeError)
        True
    """


class ShardError(SSyncError, RuntimeError):
    """A shard, a member or a data set on disk cannot be read or written.

    Example:
        >>> issubclass(ShardError, RuntimeError)
        True
    """
