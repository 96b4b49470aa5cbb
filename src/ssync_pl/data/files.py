"""Files that appear complete or not at all, and the lock of those who write them."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssync_pl.errors import ConfigError, require

_logger = logging.getLogger(__name__)


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """Reads a plain file of at most `most` bytes; anything else, as a pipe, which never ends, is an `OSError`."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > most:
        raise OSError(errno.EINVAL, f"no plain file of at most {most} bytes", str(path))
    return Path(path).read_bytes()


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """Reads a file of PyTorch or safetensors; nothing in it is executed or unpacked. `ConfigError` if it cannot be."""
    import torch

    require(os.path.isfile(path), f"weights at {str(path)!r}", "no such file", advice="Correct the path.")
    try:
        if Path(path).suffix == ".safetensors":
            return importlib.import_module("safetensors.torch").load_file(path)
        require_unpacked(path, os.path.getsize(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise ConfigError(
            f"Expected {str(path)!r} to be a checkpoint of PyTorch or safetensors with tensors and plain values only, "
            f"but reading it failed ({reason}). Take another file; none is read in a way that could run what is in it."
        ) from error


def require_unpacked(path: Any, most: int) -> None:
    """Raises `ConfigError` where the members of a file that is a zip take more than `most` bytes when unpacked."""
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
