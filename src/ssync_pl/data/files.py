"""Files that appear complete or not at all, and the lock of those who write them."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ssync_pl.errors import require

_logger = logging.getLogger(__name__)


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """Reads a plain file of at most `most` bytes; anything else, as a pipe, which never ends, is an `OSError`."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > most:
        raise OSError(errno.EINVAL, f"no plain file of at most {most} bytes", str(path))
    return Path(path).read_bytes()


def require_unpacked(path: str | os.PathLike[str], most: int) -> None:
    """Raises `ConfigError` unless it is a plain file whose members, if it is a zip, take `most` bytes unpacked."""
    require(os.path.isfile(path), f"a plain file at {str(path)!r}", "none", advice="Correct the path.")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        require(size <= most, f"the members of {path} to take at most {most} bytes unpacked", size)


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Writes a file under a temporary name, then renames it, so that no reader sees half; makes missing folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)  # mkstemp keeps others from reading
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


@contextlib.contextmanager
def exclusive(path: Path, *, timeout: float = 0.0) -> Iterator[None]:
    """Holds a lock file while the block runs; the operating system frees that of a killed process.

    Waits `timeout` seconds for another holder, for ever with -1, then raises `BlockingIOError`.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if timeout == 0:
                raise
            _logger.warning("Waiting for another process, which holds %s", path)
            lock.acquire(timeout=timeout)
    except Timeout as error:
        raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path)) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
