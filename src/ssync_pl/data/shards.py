"""Local shards in the field's format: random access to their members, and writing them.

Plain tar files, one video per sample, members `<key>.<field>.npy`.
"""

import contextlib
import gzip
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.decode import MAX_MEMBER_BYTES, require_allowed
from ssync_pl.data.index import SampleEntry, ShardEntry, extend_index, header_fits, scan_shard
from ssync_pl.data.samples import Members
from ssync_pl.errors import require, require_shard

_BLOCK = 512


def sample_members(path: str, shard: ShardEntry, sample: SampleEntry, max_bytes: int = MAX_MEMBER_BYTES) -> Members:
    """Returns the members of one sample of a local shard, each read when it is asked for, where the index puts it."""
    sizes = {name: size for name, (_, size) in sample.members.items()}

    def read(member: str, start: int, length: int) -> bytearray:
        offset = sample.members[member][0]
        with io.BufferedReader(io.FileIO(path), 1) as file:  # next to no buffer: it would read ahead in vain
            size = os.fstat(file.fileno()).st_size
            header = read_at(file, offset - _BLOCK, _BLOCK)
            data = read_at(file, offset + start, length)
        expected = (
            f"{path} to have {shard.size} bytes, and `{member}` of key {sample.key} at byte {offset}, as its index says"
        )
        advice = "It was cut off, replaced or is still being copied: wait, or delete its index, it is built again."
        fits = (
            size == shard.size and len(data) == length and header_fits(header, f"{sample.key}.{member}", sizes[member])
        )
        require_shard(fits, expected, f"{size} bytes, or something else there", advice=advice)
        return data

    return Members(f"{path}, key {sample.key}", sizes, read, max_bytes)


def read_shard(path: str, shard: ShardEntry, max_bytes: int = MAX_MEMBER_BYTES) -> Iterator[tuple[str, Members]]:
    """Yields key and members of each sample of a local shard, in place; `stream_shard` does so for other shards."""
    for sample in shard.samples:
        yield sample.key, sample_members(path, shard, sample, max_bytes)


class ShardWriter:
    """Writes samples to shards of the field's format, with their index.

    Each shard is written under a temporary name and renamed when it is complete; the index is written when the
    writer closes without an error. Equal samples give equal bytes. Several writers with different prefixes may fill
    one folder one after the other: they share its index.

    Args:
        directory: Folder of the shards; made when absent.
        prefix: Start of the file names, for example `train`.
        samples_per_shard: Samples in every shard but the last.
        recipe: How the samples were made (any JSON values); merged into the recipe of the folder's index.

    Raises:
        ConfigError: `samples_per_shard` or `prefix` is out of range.
        ShardError: The folder already holds shards of this prefix.

    Examples:
        >>> with ShardWriter("shards", "train") as writer:  # doctest: +SKIP
        ...     writer.write("0", {"video.npy": video, "segmentations.npy.gz": masks})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        prefix: str,
        samples_per_shard: int = 32,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        require(samples_per_shard >= 1, "argument `samples_per_shard` to be at least 1", samples_per_shard)
        plain = bool(prefix) and not any(character in prefix for character in "/\\{}*?[]")
        require(plain, "argument `prefix` to be a plain file name part", repr(prefix))
        self.directory, self.prefix = Path(directory), prefix
        self.samples_per_shard, self.recipe = samples_per_shard, dict(recipe or {})
        self.directory.mkdir(parents=True, exist_ok=True)
        existing = [path.name for path in sorted(self.directory.glob(f"{prefix}-*.tar"))]
        expected = f"no shards `{prefix}-*.tar` in {self.directory}"
        got = f"{len(existing)} ({', '.join(existing[:1])}, …)"
        require_shard(not existing, expected, got, advice="Delete them, or take another prefix.")
        self._keys: set[str] = set()
        self._entries: list[ShardEntry] = []
        self._file: Any = None  # the unfinished shard, under its temporary name
        self._tar: Any = None
        self._closed = False

    def write(self, key: str, members: Mapping[str, Any]) -> None:
        """Adds one sample.

        Args:
            key: Unique name of the sample, without dots and slashes; the field uses decimal numbers.
            members: Member name → array for `.npy` and `.npy.gz`, JSON value for `.json`, bytes for `.jpg`, `.png`
                and `.mp4` (bytes are accepted for every kind and stored as they are). Videos are (F, h, w, 3) uint8,
                masks (F, h, w, 1) uint8 ids or (F, h, w, N) uint8, one channel per object.

        Raises:
            ShardError: The key is taken or unusable, a member is refused, or the writer is closed.
        """
        from webdataset import TarWriter

        require_shard(not self._closed, "an open writer", f"the closed writer of `{self.prefix}`")
        plain = bool(key) and not any(character in key for character in "./\\")
        plain = plain and not key.startswith("__") and key.encode("utf-8", "replace").decode() == key
        require_shard(plain, "argument `key` to be a name without dots and slashes", repr(key))
        require_shard(key not in self._keys, "each key once", f"{key!r} twice for prefix `{self.prefix}`")
        require_shard(bool(members), "argument `members` to hold at least one member", f"none for key {key!r}")
        # Everything is encoded before the first byte is written, so that a refused member leaves no half sample.
        encoded = {name: encode_member(name, value, f"key {key}") for name, value in members.items()}
        if self._file is None:
            self._file = (self.directory / f".{self._name()}.tmp").open("wb")
            # Members are bytes already; a fixed time and no names make equal samples equal files.
            self._tar = TarWriter(self._file, user="", group="", encoder=False, mtime=0)
        self._tar.write({"__key__": key, **encoded})
        self._keys.add(key)
        if len(self._keys) % self.samples_per_shard == 0:
            self._finish_shard()

    def close(self) -> None:
        """Completes the last shard and writes the index; a second call does nothing."""
        if not self._closed:
            self._finish_shard()
            self._closed = True
            extend_index(self.directory, self._entries, self.recipe)

    def abort(self) -> None:
        """Removes the unfinished shard and closes without writing an index; finished shards stay."""
        self._closed = True
        if self._file is not None:
            with contextlib.suppress(OSError), self._file:  # a full disk refuses the end of the tar as well
                self._tar.close()
            Path(self._file.name).unlink(missing_ok=True)
        self._file = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _name(self) -> str:
        return f"{self.prefix}-{len(self._entries):06d}.tar"

    def _finish_shard(self) -> None:
        if self._file is not None:
            with self._file:
                self._tar.close()
            os.replace(self._file.name, self.directory / self._name())
            self._file = None
            self._entries.append(scan_shard(self.directory / self._name()))


def encode_member(member: str, value: Any, where: str = "") -> bytes:
    """Encodes one member by its extension, to the same bytes every time."""
    extension = require_allowed(member, where)
    if isinstance(value, bytes):
        return value
    if extension == "json":
        return json.dumps(value, sort_keys=True).encode()
    if extension not in ("npy", "npy.gz") or not isinstance(value, np.ndarray) or value.dtype.hasobject:
        got = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        kinds = "a numeric array (.npy, .npy.gz), a JSON value (.json) or bytes (.jpg, .png, .mp4)"
        require_shard(False, f"member `{member}` of {where} to be {kinds}", got)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(value), version=(1, 0), allow_pickle=False)
    data = buffer.getvalue()
    # GZIP stamps the time into its header unless told otherwise.
    return gzip.compress(data, compresslevel=6, mtime=0) if extension == "npy.gz" else data


def read_at(file: Any, offset: int, length: int) -> bytearray:
    """Reads bytes at a place; fewer where the file ends."""
    data = bytearray(length)
    file.seek(offset)
    del data[file.readinto(data) :]
    return data
