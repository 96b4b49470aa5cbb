"""Writing shards in the field's format: plain tar files, one video a sample, members `<key>.<field>.npy`."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from ssync_pl.data.decode import require_allowed
from ssync_pl.data.index import ShardEntry, read_index, scan_shard, write_index
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["ShardWriter", "encode_member"]


class ShardWriter:
    """Write samples to `<prefix>-000000.tar`, `<prefix>-000001.tar`, … and their `index.json`.

    Each shard is written under a temporary name and renamed when it is complete; the index is written when the
    writer closes without an error. Equal samples give equal bytes. Several writers with different prefixes may fill
    one folder one after the other: they share its `index.json`.

    Args:
        directory: Folder of the shards; made when absent.
        prefix: Start of the file names, for example `train`.
        samples_per_shard: Samples in every shard but the last.
        recipe: How the samples were made (any JSON values); merged into the recipe of the folder's index.

    Raises:
        ConfigError: `samples_per_shard` or `prefix` is out of range.
        ShardError: The folder already holds shards of this prefix.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ShardWriter(folder, "train", samples_per_shard=2) as writer:
        ...         for index in range(3):
        ...             writer.write(str(index), {"video.npy": np.zeros((4, 8, 8, 3), np.uint8)})
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['index.json', 'train-000000.tar', 'train-000001.tar']
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        prefix: str,
        samples_per_shard: int = 32,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        if samples_per_shard < 1:
            raise ConfigError(f"Expected argument `samples_per_shard` to be at least 1, but got {samples_per_shard}.")
        if not prefix or any(character in prefix for character in "/\\{}*?[]"):
            raise ConfigError(f"Expected argument `prefix` to be a plain file name part, but got {prefix!r}.")
        self.directory = Path(directory)
        self.prefix = prefix
        self.samples_per_shard = samples_per_shard
        self.recipe = dict(recipe or {})
        self.directory.mkdir(parents=True, exist_ok=True)
        existing = sorted(self.directory.glob(f"{prefix}-*.tar"))
        if existing:
            raise ShardError(
                f"Expected no shards `{prefix}-*.tar` in {self.directory}, but got {len(existing)} "
                f"({existing[0].name}, …). Delete them, or take another prefix."
            )
        self._keys: set[str] = set()
        self._entries: list[ShardEntry] = []
        self._tar: Any = None
        self._file: BinaryIO | None = None
        self._temporary: Path | None = None
        self._in_shard = 0
        self._closed = False

    def write(self, key: str, members: Mapping[str, Any]) -> None:
        """Add one sample.

        Args:
            key: Unique name of the sample, without dots and slashes; the field uses decimal numbers.
            members: Member name → array for `.npy` and `.npy.gz`, JSON value for `.json`, bytes for `.jpg`, `.png`
                and `.mp4` (bytes are accepted for every kind and stored as they are). Videos are (F, h, w, 3) uint8,
                masks (F, h, w, 1) uint8 ids or (F, h, w, N) uint8, one channel an object.

        Raises:
            ShardError: The key is taken or unusable, a member is refused, or the writer is closed.
        """
        if self._closed:
            raise ShardError(f"Expected an open writer, but the writer of `{self.prefix}` is closed.")
        if not key or any(character in key for character in "./\\") or key.startswith("__"):
            raise ShardError(f"Expected argument `key` to be a name without dots and slashes, but got {key!r}.")
        if key in self._keys:
            raise ShardError(f"Expected each key once, but got {key!r} twice for prefix `{self.prefix}`.")
        if not members:
            raise ShardError(f"Expected argument `members` to hold at least one member, but key {key!r} has none.")
        # Everything is encoded before the first byte is written, so that a refused member leaves no half sample.
        encoded = {name: encode_member(name, value, f"key {key}") for name, value in members.items()}
        self._open().write({"__key__": key, **encoded})
        self._keys.add(key)
        self._in_shard += 1
        if self._in_shard == self.samples_per_shard:
            self._finish_shard()

    def close(self) -> None:
        """Complete the last shard and write the index; a second call does nothing.

        Raises:
            ShardError: A shard vanished or changed since it was written.
        """
        if self._closed:
            return
        self._finish_shard()
        self._closed = True
        before = read_index(self.directory)
        known = before.shards if before else {}
        kept = {name: entry for name, entry in known.items() if (self.directory / name).exists()}
        kept.update((entry.name, entry) for entry in self._entries)
        write_index(self.directory, kept.values(), {**(before.recipe if before else {}), **self.recipe})

    def abort(self) -> None:
        """Remove the unfinished shard and close without writing an index; finished shards stay."""
        self._closed = True
        if self._file is not None and self._temporary is not None:
            try:
                with contextlib.suppress(OSError), self._file:  # a full disk refuses the end of the tar as well
                    self._tar.close()
            finally:
                self._temporary.unlink(missing_ok=True)
        self._tar = self._file = self._temporary = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _open(self) -> Any:
        from webdataset import TarWriter

        if self._tar is None:
            name = f"{self.prefix}-{len(self._entries):06d}.tar"
            self._temporary = self.directory / f".{name}.{os.getpid()}.tmp"
            self._file = self._temporary.open("wb")
            # Members are bytes already; a fixed time and no names make equal samples equal files.
            self._tar = TarWriter(self._file, user="", group="", encoder=False, mtime=0)
        return self._tar

    def _finish_shard(self) -> None:
        if self._file is None or self._temporary is None:
            return
        self._tar.close()
        self._file.close()
        final = self.directory / f"{self.prefix}-{len(self._entries):06d}.tar"
        os.replace(self._temporary, final)
        self._tar = self._file = self._temporary = None
        self._in_shard = 0
        self._entries.append(scan_shard(final))


def encode_member(member: str, value: Any, where: str = "") -> bytes:
    """Encode one member by its extension, to the same bytes every time.

    Args:
        member: Member name without the key, for example `video.npy`.
        value: Array, JSON value, or bytes that are stored as they are.
        where: Key, for the message.

    Returns:
        The member's bytes.

    Raises:
        ShardError: The extension is refused, the array holds objects, or the value does not fit the extension.

    Example:
        >>> encode_member("info.json", {"fps": 12})
        b'{"fps": 12}'
    """
    extension = require_allowed(member, where)
    if isinstance(value, bytes):
        return value
    if extension == "json":
        return json.dumps(value, sort_keys=True).encode()
    if extension not in ("npy", "npy.gz") or not isinstance(value, np.ndarray) or value.dtype.hasobject:
        got = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise ShardError(
            f"Expected member `{member}` of {where} to be a numeric array (.npy, .npy.gz), a JSON value (.json) or "
            f"bytes (.jpg, .png, .mp4), but got {got}."
        )
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(value), version=(1, 0), allow_pickle=False)
    data = buffer.getvalue()
    # GZIP stamps the time into its header unless told otherwise.
    return gzip.compress(data, compresslevel=6, mtime=0) if extension == "npy.gz" else data
