"""One process a shard: a lock on the temporary file under which the shard is written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ssync_pl.errors import ShardError

__all__ = ["Claim", "cannot_write", "claim"]

try:
    import fcntl
except ImportError:  # Windows has no such locks: there one process at a time must fill a folder
    fcntl = None  # type: ignore[assignment]


class Claim:
    """The temporary file of a shard, open for this process alone.

    Args:
        final: Name that the finished shard will have.
        stream: The temporary file, empty, for writing.

    Example:
        >>> Claim(Path("a.tar"), None).temporary
        PosixPath('.a.tar.tmp')
    """

    def __init__(self, final: Path, stream: Any) -> None:
        self.final = final
        self.temporary = _temporary(final)
        self.stream: BinaryIO = stream

    def finish(self) -> None:
        """Give the finished file its name.

        Raises:
            OSError: The file cannot be written or renamed.
        """
        self.stream.flush()
        if fcntl is None:
            self.stream.close()
        os.replace(self.temporary, self.final)


@contextlib.contextmanager
def claim(final: Path) -> Iterator[Claim | None]:
    """Open the temporary file of a shard, unless another process has it.

    The lock lies on the temporary file and goes with its process, so what a killed process left is taken over. A file
    that is not finished is removed.

    Args:
        final: Name that the finished shard will have.

    Yields:
        The claim; `None` when another process writes this shard.

    Raises:
        OSError: The file cannot be opened.

    Example:
        >>> import tempfile
        >>> final = Path(tempfile.mkdtemp(prefix="ssync-doctest-")) / "a.tar"
        >>> with claim(final) as mine:
        ...     with claim(final) as again:
        ...         again is None
        ...     _ = mine.stream.write(b"content")
        ...     mine.finish()
        True
        >>> [path.name for path in final.parent.iterdir()]
        ['a.tar']
    """
    temporary = _temporary(final)
    stream = open(temporary, "a+b")  # noqa: SIM115
    mine = False
    try:
        # Its owner may have renamed the file between opening and locking: then it is a finished shard.
        mine = _lock(stream) and _is_at(stream, temporary)
        if mine:
            stream.seek(0)
            stream.truncate()
        yield Claim(final, stream) if mine else None
    finally:
        if mine and not stream.closed and _is_at(stream, temporary):
            temporary.unlink()
        with contextlib.suppress(OSError):  # what did not go onto a full disk is removed anyway
            stream.close()


def cannot_write(out: Path, error: OSError) -> ShardError:
    """Say that a folder of features cannot be written.

    Args:
        out: The folder.
        error: What the system said.

    Returns:
        The error to raise.

    Example:
        >>> print(cannot_write(Path("features"), OSError("disk full")))
        Expected to write features to features, but could not (disk full). Finished shards are kept: make room, ...
    """
    return ShardError(
        f"Expected to write features to {out}, but could not ({error}). Finished shards are kept: make room, or take "
        "another --out, and run again."
    )


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def _is_at(stream: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(stream: BinaryIO) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # file systems without locks
        return True
    return True
