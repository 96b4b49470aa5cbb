"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["write_bytes"]


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file under a temporary name, then rename it, so that no reader ever sees half of it.

    Args:
        path: Where the file goes; missing folders are made.
        content: Its bytes.

    Returns:
        The path.

    Example:
        >>> folder = tempfile.mkdtemp(prefix="ssync-doctest-")
        >>> write_bytes(Path(folder) / "new" / "a.txt", b"text").read_bytes()
        b'text'
    """
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
