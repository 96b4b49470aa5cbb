"""The sidecar `index.json`: which samples a folder's shards hold and where their members lie.

An uncompressed tar stores each member as one run of bytes, so an offset and a size are enough to read any member, or
a slice of it, without reading the shard from its start. The index is a cache: it is rebuilt by scanning the tar
headers wherever it is absent or does not fit the shard.
"""

from __future__ import annotations

import json
import logging
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ssync_pl.data.decode import read_npy_header
from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ShardError

__all__ = [
    "INDEX_NAME",
    "FolderIndex",
    "SampleEntry",
    "ShardEntry",
    "header_fits",
    "load_shards",
    "parse_index",
    "read_index",
    "scan_packed",
    "scan_shard",
    "split_member_name",
    "write_index",
]

INDEX_NAME = "index.json"
"""File name of the sidecar, beside the shards."""

_FORMAT = "ssync_pl.shards"
_VERSION = 1
_BLOCK = tarfile.BLOCKSIZE
_HEADER_BYTES = 1 << 16
_VIDEO_MEMBERS = ("video.npy", "video.npy.gz")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleEntry:
    """One sample of a shard.

    Args:
        key: The sample's key: the member names up to their first dot.
        members: Member name without the key → (offset, size) in bytes.
        frames: Frames of the video, or `None` when the header does not say (mp4, pictures).

    Example:
        >>> SampleEntry("7", {"video.npy": (512, 640)}, frames=4).members["video.npy"]
        (512, 640)
    """

    key: str
    members: dict[str, tuple[int, int]]
    frames: int | None = None


@dataclass(frozen=True)
class ShardEntry:
    """One shard and its samples.

    Args:
        name: File name without folder.
        size: Bytes of the file, by which a stale entry is recognised.
        samples: The samples in the order of the file.

    Example:
        >>> ShardEntry("train-000000.tar", 10240, ()).size
        10240
    """

    name: str
    size: int
    samples: tuple[SampleEntry, ...]


@dataclass(frozen=True)
class FolderIndex:
    """The content of one `index.json`; it may cover several prefixes (training and validation).

    Args:
        shards: File name → entry.
        recipe: How the shards were made: any JSON values.

    Example:
        >>> FolderIndex({}, {"seed": 0}).recipe
        {'seed': 0}
    """

    shards: dict[str, ShardEntry] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)


def split_member_name(name: str) -> tuple[str, str] | None:
    """Split a tar member's name into the sample's key and the member's own name, as webdataset does.

    Args:
        name: Name in the tar, for example `clips/7.video.npy`.

    Returns:
        Key and member name, split at the first dot after the last slash; `None` for names that belong to no sample
        (no dot, leading dot, webdataset's `__meta__` names).

    Example:
        >>> split_member_name("clips/7.segmentations.npy.gz")
        ('clips/7', 'segmentations.npy.gz')
        >>> split_member_name("__info__/7.video.npy") is None
        True
    """
    found = re.match(r"^((?:.*/)?[^./]+)\.([^/]+)$", name)
    if found is None or re.match(r"__[^/]*__(?:$|/)", name):
        return None
    return found.group(1), found.group(2).lower()


def scan_shard(path: str | os.PathLike[str]) -> ShardEntry:
    """Build a shard's entry from its tar headers; member contents are not read, except the heads of the videos.

    Args:
        path: An uncompressed tar.

    Returns:
        Keys, offsets, sizes and frame counts.

    Raises:
        FileNotFoundError: There is no such file.
        ShardError: The tar is truncated, compressed, damaged, or holds a member twice.

    Example:
        >>> scan_shard("/nowhere/train-000000.tar")
        Traceback (most recent call last):
        FileNotFoundError: ...
    """
    path = Path(path)
    size = path.stat().st_size
    groups: list[tuple[str, dict[str, tuple[int, int]]]] = []
    with path.open("rb") as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for info in tar:
                    if not info.isreg():
                        continue
                    if info.issparse():
                        raise ShardError(f"Expected plain members in {path}, but got the sparse member `{info.name}`.")
                    _add_member(groups, info, path)
                end = tar.offset
            # tarfile takes a file that was cut between two members for a whole one.
            stream.seek(end)
            if stream.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("no end-of-archive mark")
        except tarfile.TarError as error:
            raise ShardError(
                f"Expected {path} to be a whole uncompressed tar, but got a damaged one ({error}; {size} bytes). The "
                "file is truncated, compressed or no tar: copy it again, or unpack it with gunzip."
            ) from error
        samples = tuple(SampleEntry(key, members, _frames(stream, path, key, members)) for key, members in groups)
    return ShardEntry(path.name, size, samples)


def scan_packed(path: str | os.PathLike[str]) -> ShardEntry:
    """Build the entry of a compressed tar, which can be streamed but not mapped, by unpacking it once in passing.

    Args:
        path: A tar packed by gzip, bzip2 or xz.

    Returns:
        Keys, sizes and frame counts; offsets are those of the unpacked tar.

    Raises:
        FileNotFoundError: There is no such file.
        ShardError: The file is truncated or damaged, or holds a member twice.

    Example:
        >>> scan_packed("/nowhere/train-000000.tar.gz")
        Traceback (most recent call last):
        FileNotFoundError: ...
    """
    path = Path(path)
    size = path.stat().st_size
    groups: list[tuple[str, dict[str, tuple[int, int]]]] = []
    heads: dict[str, bytes] = {}
    try:
        with tarfile.open(path, mode="r|*") as tar:
            for info in tar:
                if not info.isreg():
                    continue
                _add_member(groups, info, path)
                parts = split_member_name(info.name)
                stream = tar.extractfile(info) if parts is not None and parts[1] in _VIDEO_MEMBERS else None
                if parts is not None and stream is not None and parts[0] not in heads:
                    heads[parts[0]] = stream.read(min(info.size, _HEADER_BYTES))
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ShardError(
            f"Expected {path} to be a whole compressed tar, but got a damaged one ({error}; {size} bytes). Copy it "
            "again."
        ) from error
    samples = []
    for key, members in groups:
        member = next((name for name in _VIDEO_MEMBERS if name in members), None)
        frames = None if member is None else _head_frames(heads[key], member, f"{path}, key {key}")
        samples.append(SampleEntry(key, members, frames))
    return ShardEntry(path.name, size, tuple(samples))


def read_index(directory: str | os.PathLike[str]) -> FolderIndex | None:
    """Read a folder's `index.json`.

    Args:
        directory: The folder.

    Returns:
        The index, or `None` when there is none or it does not parse (it is only a cache).

    Example:
        >>> read_index("/nowhere") is None
        True
    """
    path = Path(directory, INDEX_NAME)
    try:
        return parse_index(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ShardError) as error:
        _logger.warning("Ignoring %s: %s", path, error)
        return None


def parse_index(text: bytes | str) -> FolderIndex:
    """Parse the text of an `index.json`.

    Args:
        text: JSON.

    Returns:
        The index.

    Raises:
        ShardError: The text is no index of this version.

    Example:
        >>> parse_index('{"format": "ssync_pl.shards", "version": 1, "recipe": {}, "shards": []}').shards
        {}
    """
    try:
        raw = json.loads(text)
        if raw["format"] != _FORMAT or raw["version"] != _VERSION:
            raise ValueError(f"format {raw['format']!r}, version {raw['version']!r}")
        shards = [_entry_from_json(item) for item in raw["shards"]]
        return FolderIndex({entry.name: entry for entry in shards}, dict(raw["recipe"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"Expected `{INDEX_NAME}` to have format {_FORMAT!r}, version {_VERSION}, but got {error!r}. Delete the "
            "file: it is built again from the shards."
        ) from error


def write_index(
    directory: str | os.PathLike[str], shards: Iterable[ShardEntry], recipe: Mapping[str, Any] | None = None
) -> Path:
    """Write a folder's `index.json` in one step (temporary name, then rename).

    Args:
        directory: The folder of the shards.
        shards: Entries of all shards of the folder.
        recipe: How the shards were made: any JSON values.

    Returns:
        Path of the file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_index(folder, [], {"seed": 0}).name
        'index.json'
    """
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "recipe": dict(recipe or {}),
        "shards": [_entry_to_json(entry) for entry in sorted(shards, key=lambda entry: entry.name)],
    }
    text = json.dumps(content, separators=(",", ":"), sort_keys=True)
    return write_bytes(Path(directory, INDEX_NAME), text.encode())


def load_shards(paths: Sequence[str | os.PathLike[str]], *, save: bool = True) -> list[ShardEntry]:
    """Return the entries of some shards: from the sidecars where they fit, by scanning elsewhere.

    An entry is used only if the file still has the recorded size and its first and last sample lie where the entry
    says; readers check each member's header again when they open it.

    Args:
        paths: Local shards.
        save: Write what was scanned back to `index.json` (left out silently in read-only folders).

    Returns:
        One entry a path, in the order of `paths`.

    Raises:
        FileNotFoundError: A shard is missing.
        ShardError: A shard cannot be scanned.

    Example:
        >>> load_shards([])
        []
    """
    resolved = [Path(path) for path in paths]
    known = {folder: read_index(folder) or FolderIndex() for folder in dict.fromkeys(p.parent for p in resolved)}
    changed: set[Path] = set()
    entries: list[ShardEntry] = []
    for path in resolved:
        entry = known[path.parent].shards.get(path.name)
        if entry is None or not _fits(entry, path):
            entry = scan_shard(path)
            known[path.parent].shards[path.name] = entry
            changed.add(path.parent)
        entries.append(entry)
    for folder in changed if save else ():
        index = known[folder]
        present = [entry for entry in index.shards.values() if (folder / entry.name).exists()]
        try:
            write_index(folder, present, index.recipe)
        except OSError as error:
            _logger.debug("Keeping the index of %s in memory only: %s", folder, error)
    return entries


def header_fits(header: bytes | memoryview, name: str, size: int) -> bool:
    """Say whether the 512 bytes before a member are the tar header of that member.

    Args:
        header: The 512 bytes before the member's first byte.
        name: Full name in the tar: key, dot, member name.
        size: Size that the index gives, in bytes.

    Returns:
        Whether name and size agree (names of 100 bytes and more are stored elsewhere and are not compared).

    Example:
        >>> header_fits(tarfile.TarInfo("7.video.npy").tobuf(), "7.video.npy", 0)
        True
    """
    try:
        info = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    name_agrees = len(name.encode()) >= 100 or info.name.lower() == name.lower()
    return name_agrees and (info.size == size or size >= 8**11)  # sizes of 8 GiB and more are stored elsewhere


def _add_member(groups: list[tuple[str, dict[str, tuple[int, int]]]], info: tarfile.TarInfo, path: Path) -> None:
    parts = split_member_name(info.name)
    if parts is None:
        return
    key, member = parts
    if not groups or groups[-1][0] != key:
        groups.append((key, {}))
    if member in groups[-1][1]:
        raise ShardError(f"Expected each member once, but {path}, key {key} holds `{member}` twice. Build it again.")
    groups[-1][1][member] = (info.offset_data, info.size)


def _frames(stream: BinaryIO, path: Path, key: str, members: Mapping[str, tuple[int, int]]) -> int | None:
    member = next((name for name in _VIDEO_MEMBERS if name in members), None)
    if member is None:
        return None
    offset, size = members[member]
    stream.seek(offset)
    return _head_frames(stream.read(min(size, _HEADER_BYTES)), member, f"{path}, key {key}")


def _head_frames(head: bytes, member: str, where: str) -> int | None:
    try:
        shape = read_npy_header(head, member, where).shape
    except ShardError:
        return None  # the reader refuses the member by name when, and only when, the sample is used
    return shape[0] if shape else None


def _fits(entry: ShardEntry, path: Path) -> bool:
    if path.stat().st_size != entry.size:
        return False
    if not entry.samples:
        return False
    with path.open("rb") as stream:
        for sample in (entry.samples[0], entry.samples[-1]):
            for member, (offset, size) in sample.members.items():
                stream.seek(offset - _BLOCK)
                if not header_fits(stream.read(_BLOCK), f"{sample.key}.{member}", size):
                    return False
    return True


def _entry_to_json(entry: ShardEntry) -> dict[str, Any]:
    samples = [{"key": s.key, "members": s.members, "frames": s.frames} for s in entry.samples]
    return {"name": entry.name, "size": entry.size, "samples": samples}


def _entry_from_json(item: Mapping[str, Any]) -> ShardEntry:
    size = int(item["size"])
    samples = []
    for sample in item["samples"]:
        members = {str(name): (int(start), int(length)) for name, (start, length) in sample["members"].items()}
        ranges = members.values()
        if not members or any(start < _BLOCK or length < 0 or start + length > size for start, length in ranges):
            raise ValueError(f"offsets outside of shard {item['name']!r}")
        frames = sample.get("frames")
        samples.append(SampleEntry(str(sample["key"]), members, None if frames is None else int(frames)))
    return ShardEntry(str(item["name"]), size, tuple(samples))
