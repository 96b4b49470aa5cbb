"""Files that appear complete or not at all, the mark of our own, and the lock of those who write them."""

import contextlib
import errno
import importlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ssync_pl.errors import ConfigError, explained, require, require_unpacked


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """Reads a file of PyTorch or safetensors; nothing in it is executed or unpacked. `ConfigError` if it cannot be."""
    import torch

    require_unpacked(path, os.path.getsize(path) if os.path.exists(path) else 0)
    expected = f"{str(path)!r} to be a checkpoint of PyTorch or safetensors with tensors and plain values only"
    advice = "Take another; none is read in a way that could run what is in it."
    with explained(expected, Exception, advice=advice, kind=ConfigError):
        if Path(path).suffix == ".safetensors":
            return importlib.import_module("safetensors.torch").load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def write_bytes(path: str | Path, content: bytes | Iterable[bytes]) -> Path:
    """Writes a file under a temporary name, then renames it, so that no reader sees half; makes missing folders."""
    path = Path(path)
    if path.is_symlink():
        raise FileExistsError(errno.EEXIST, "a link stands there, which is not replaced: move it away", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.writelines([content] if isinstance(content, bytes) else content)
        os.chmod(temporary, 0o644)  # mkstemp keeps others from reading
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def refuse_foreign(path: Path, mark: str) -> None:
    """Raises ConfigError where there is anything but a file with the mark of its kind near its start."""
    if os.path.lexists(path):
        head = b""
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as stream:
                head = stream.read(200)
        known, advice = mark.encode() in head, "Move it away."
        require(known, f"{path} to be absent or of this kind and written by ssync_pl", "another file", advice=advice)


def write_owned_json(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Writes a JSON file with the mark `"ssync_pl <kind>"`; raises ConfigError where there is another file."""
    refuse_foreign(path, f'"ssync_pl {kind}"')
    write_bytes(path, f"{json.dumps({'written_by': f'ssync_pl {kind}', **content}, indent=2)}\n".encode())


@contextlib.contextmanager
def exclusive(path: Path, *, timeout: float = 0.0) -> Iterator[None]:
    """Holds a lock file while the block runs; waits for another holder `timeout` seconds, for ever with -1."""
    from filelock import FileLock, Timeout

    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or path.stat().st_size):
        raise FileExistsError(errno.EEXIST, "a file that is no lock stands there: move it away", str(path))
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if timeout == 0:
                raise
            logging.getLogger(__name__).warning("Waiting for another process, which holds %s", path)
            lock.acquire(timeout=timeout)
    except Timeout as error:
        raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path)) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
