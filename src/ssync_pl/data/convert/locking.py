"""A lock between processes that goes away with its holder, however that one ends."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["exclusive"]

_BUSY = frozenset({errno.EACCES, errno.EAGAIN, errno.EDEADLK})
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
_PAUSE = 0.05

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive(path: str | os.PathLike[str], *, timeout: float = 0.0) -> Iterator[int]:
    """Hold a lock file while the block runs; the operating system frees the lock of a killed process.

    On disks without locks the block runs unlocked, and a warning is logged.

    Args:
        path: The lock file; it is made, and removed at the end.
        timeout: Seconds to wait for another holder.

    Yields:
        The handle of the lock file; a process that inherits it holds the lock as well.

    Raises:
        BlockingIOError: Another process or thread still holds the lock.
        OSError: The file cannot be made.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with exclusive(f"{folder}/.lock"):
        ...         try:
        ...             with exclusive(f"{folder}/.lock"):
        ...                 pass
        ...         except BlockingIOError:
        ...             print("held")
        held
    """
    path = Path(path)
    handle = _acquire(path, time.monotonic() + timeout)
    try:
        yield handle
    finally:
        # Removed while it is held: whoever opened it meanwhile sees that the file is gone and makes a new one.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _acquire(path: Path, deadline: float) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _lock(handle):
                if _is_same(handle, path):
                    return handle
            elif time.monotonic() >= deadline:
                raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path))
            else:
                time.sleep(_PAUSE)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _lock(handle: int) -> bool:
    """Lock without waiting; False when another one holds it."""
    try:
        if os.name == "nt":
            windows: Any = importlib.import_module("msvcrt")
            windows.locking(handle, windows.LK_NBLCK, 1)
        else:
            unix: Any = importlib.import_module("fcntl")
            unix.flock(handle, unix.LOCK_EX | unix.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            _logger.warning("This disk has no locks (%s): do not run the same conversion twice at once.", error)
            return True
        if error.errno in _BUSY:
            return False
        raise
    return True
