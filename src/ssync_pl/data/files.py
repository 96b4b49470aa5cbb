"""Files that appear complete or not at all, and the lock of those who write them."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
        lock.acquire(timeout=timeout)
    except Timeout as error:
        raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path)) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
