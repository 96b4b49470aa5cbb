"""Which samples a folder's shards hold and where their members lie; kept in a sidecar file beside the shards.

An uncompressed tar stores each member as one run of bytes, so an offset and a size are enough to read any member, or
a slice of it. The index is a cache: it is built again by scanning the tar headers wherever it does not fit a shard.
"""

import contextlib
import json
import logging
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssync_pl.data.decode import parse_json
from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ShardError, explained, require_shard

INDEX_NAMES = ("index.json", "ssync_index.json")  # the second is taken where another program wrote the first
MOST_BYTES = 1 << 28  # of a sidecar
_FORMAT, _VERSION = "ssync_pl.shards", 1
_BLOCK = tarfile.BLOCKSIZE
_LONG_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, b"g", b"X")
_LONGEST_HEADER, _LARGEST = 1 << 20, 1 << 36  # bytes of names and attributes, of a member
_DAMAGE = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, OverflowError, LookupError)
_ERRORS = "backslashreplace"  # names that are not UTF-8 are read with escapes, so that they can be printed and written

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleEntry:
    """One sample of a shard."""

    key: str  # the member names up to their first dot
    members: dict[str, tuple[int, int]]  # name without the key → (offset, size) in bytes


@dataclass(frozen=True)
class ShardEntry:
    """One shard and its samples, in the order of the file."""

    name: str
    size: int  # bytes of the file, by which a stale entry is recognised
    samples: tuple[SampleEntry, ...]
    ignored: tuple[str, ...] = ()  # members that are no plain files: links, special files


@dataclass(frozen=True)
class FolderIndex:
    """The content of one sidecar: entries by file name, and how the shards were made (any JSON values)."""

    shards: dict[str, ShardEntry] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)


class _StrictHeader(tarfile.TarInfo):
    """A member's header, which must be whole: tarfile takes a damaged or missing one for the end of the archive."""

    @classmethod
    def frombuf(cls, *args: Any) -> Any:
        """Reads a header; refuses sizes below 0, which lead in circles, and names that fill the memory."""
        info = super().frombuf(*args)
        if info.size < 0 or (info.type in _LONG_HEADERS and info.size > _LONGEST_HEADER):
            raise tarfile.InvalidHeaderError(f"a header of {info.size} bytes")  # type: ignore[attr-defined]
        return info

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, and no end-of-archive mark") from error


@contextlib.contextmanager
def open_tar(stream: Any, mode: Any, where: str) -> Iterator[tarfile.TarFile]:
    """Opens a tar whose end must be whole; every error inside becomes a `ShardError` that names `where`."""
    advice = "The file is damaged, cut off, packed or no tar: copy, unpack or build it again."
    how: Any = {"mode": mode, "tarinfo": _StrictHeader, "encoding": "utf-8", "errors": _ERRORS}
    expected = f"{where} to be a whole tar"
    with explained(expected, *_DAMAGE, RecursionError, advice=advice), tarfile.open(fileobj=stream, **how) as tar:
        yield tar


def list_members(tar: tarfile.TarFile, ignored: list[str]) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Lists header, key, and name without key of each member, as webdataset does; others go on the list `ignored`."""
    for info in tar:
        if not 0 <= info.size <= _LARGEST:  # a stream is read on and on for what is promised
            raise tarfile.ReadError(f"a member of {info.size} bytes")
        plain, parts = info.isreg() and not info.issparse(), re.match(r"^((?:.*/)?[^./]+)\.([^/]+)$", info.name, re.S)
        if plain and parts is not None and not re.match(r"__[^/]*__(?:$|/)", info.name):
            yield info, parts.group(1), parts.group(2).lower()
        elif not (plain or info.isdir()):
            ignored.append(info.name)


def warn_ignored(where: str, names: Sequence[str]) -> None:
    """Names the links and special files that are left out of a shard."""
    if names:
        text = "Leaving out %d members of %r that are no plain files (pack links with `tar --dereference"
        _logger.warning(f"{text} --hard-dereference`): %s", len(names), where, names[:5])


def scan_shard(path: str | os.PathLike[str], *, packed: bool = False) -> ShardEntry:
    """Builds a shard's entry from its tar headers."""
    path = Path(path)
    samples: list[SampleEntry] = []
    ignored: list[str] = []
    with path.open("rb") as stream, open_tar(stream, "r|*" if packed else "r:", str(path)) as tar:
        for info, key, member in list_members(tar, ignored):
            if not samples or samples[-1].key != key:
                samples.append(SampleEntry(key, {}))
            members, expected = samples[-1].members, f"each member of {path}, key {key} once"
            require_shard(member not in members, expected, f"`{member}` twice", advice="Build the shard again.")
            members[member] = (info.offset_data, info.size)
    return ShardEntry(path.name, path.stat().st_size, tuple(samples), tuple(ignored))


def read_index(directory: str | os.PathLike[str]) -> FolderIndex | None:
    """Reads a folder's sidecar; `None` when there is none of ours, or it does not parse (it is only a cache)."""
    for name in INDEX_NAMES:
        with contextlib.suppress(OSError, ShardError):
            if Path(directory, name).is_file():  # a pipe never ends
                return parse_index(Path(directory, name).read_bytes())
    return None


def _is_free(path: Path) -> bool:
    """Whether nothing is there, or an index of ours in any version."""
    try:
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            return False
        return bool(parse_json(path.read_bytes(), path.name, dict).get("format") == _FORMAT)
    except FileNotFoundError:
        return True
    except (OSError, ShardError):
        return False


def parse_index(text: bytes) -> FolderIndex:
    """Parses the text of a sidecar; raises `ShardError` when it is no index of this version."""
    expected, advice = f"`{INDEX_NAMES[0]}` to have format {_FORMAT!r}, version {_VERSION}", "Nothing of it is used."
    kinds = (ValueError, KeyError, TypeError, AttributeError, OverflowError)
    with explained(expected, *kinds, advice=advice):  # another program wrote it, or it is damaged
        raw = parse_json(text, INDEX_NAMES[0], dict)
        if raw.get("format") != _FORMAT or raw.get("version") != _VERSION:
            raise ValueError(f"format {str(raw.get('format'))[:50]!r}, version {str(raw.get('version'))[:50]!r}")
        shards = [_entry_from_json(item) for item in raw["shards"]]
        return FolderIndex({entry.name: entry for entry in shards}, dict(raw["recipe"]))


def _entry_from_json(item: Mapping[str, Any]) -> ShardEntry:
    size = int(item["size"])
    samples = []
    for sample in item["samples"]:
        members = {str(name): (int(start), int(length)) for name, (start, length) in sample["members"].items()}
        ranges = members.values()
        if not members or any(start < _BLOCK or length < 0 or start + length > size for start, length in ranges):
            raise ValueError(f"offsets outside of shard {item['name']!r}")
        samples.append(SampleEntry(str(sample["key"]), members))
    if item.get("links"):
        raise ValueError("links")  # which an earlier release read
    return ShardEntry(str(item["name"]), size, tuple(samples), tuple(map(str, item.get("ignored", ()))))


def write_index(
    directory: str | os.PathLike[str], shards: Iterable[ShardEntry], recipe: Mapping[str, Any] | None = None
) -> None:
    """Writes a folder's sidecar in one step, never over a file of another program; nothing when no name is free."""
    entries = [asdict(entry) for entry in sorted(shards, key=lambda entry: entry.name)]
    content = {"format": _FORMAT, "version": _VERSION, "recipe": dict(recipe or {}), "shards": entries}
    text = json.dumps(content, separators=(",", ":"), sort_keys=True)
    for path in (Path(directory, name) for name in INDEX_NAMES):
        if _is_free(path):
            write_bytes(path, text.encode())
            return


def extend_index(
    directory: str | os.PathLike[str], shards: Iterable[ShardEntry], recipe: Mapping[str, Any] | None = None
) -> None:
    """Adds shards and their recipe to a folder's sidecar, and takes out shards that are gone."""
    before = read_index(directory) or FolderIndex()
    kept = {name: entry for name, entry in before.shards.items() if Path(directory, name).exists()}
    kept |= {entry.name: entry for entry in shards}
    write_index(directory, kept.values(), {**before.recipe, **(recipe or {})})


def load_shards(paths: Sequence[str | os.PathLike[str]], *, save: bool = True) -> list[ShardEntry]:
    """Returns the entries of local, uncompressed shards, in their order: from the sidecars, or by scanning them.

    Args:
        paths: The shards.
        save: Write what was scanned back to the sidecar (left out silently in read-only folders).

    Raises:
        FileNotFoundError: A shard is missing.
        ShardError: A shard cannot be scanned.
    """
    known: dict[Path, dict[str, ShardEntry]] = {}
    changed: dict[Path, list[ShardEntry]] = {}
    entries: list[ShardEntry] = []
    for path in map(Path, paths):
        if path.parent not in known:
            known[path.parent] = (read_index(path.parent) or FolderIndex()).shards
        entry = known[path.parent].get(path.name)
        if entry is not None and not _fits(entry, path):
            _logger.warning("The index of %r does not name what the shard holds: it is built again.", str(path))
            entry = None
        if entry is None:
            entry = scan_shard(path)
            changed.setdefault(path.parent, []).append(entry)
        warn_ignored(str(path), entry.ignored)
        entries.append(entry)
    for folder, scanned in changed.items() if save else ():
        try:
            extend_index(folder, scanned)
        except OSError as error:
            _logger.debug("Keeping the index of %s in memory only: %s", folder, error)
    return entries


def header_fits(header: bytes | bytearray, name: str, size: int) -> bool:
    """Whether the 512 bytes before a member are the tar header of the member with this full name and size."""
    try:
        info = tarfile.TarInfo.frombuf(bytes(header), "utf-8", _ERRORS)
    except tarfile.HeaderError:
        return False
    # Long and non-ASCII names (escaped where they are not UTF-8), and sizes of 8 GiB and more, are stored elsewhere.
    name_agrees = len(name) >= 100 or not name.isascii() or "\\" in name or info.name.lower() == name.lower()
    return name_agrees and (info.size == size or size >= 8**11)


def _fits(entry: ShardEntry, path: Path) -> bool:
    """Whether a shard has the size and, at both ends, the members that its entry says, and room for no others."""
    if path.stat().st_size != entry.size or not entry.samples:
        return False
    places = sorted(place for sample in entry.samples for place in sample.members.values())
    behind = [0, *(-(-(start + size) // _BLOCK) * _BLOCK for start, size in places)]
    heads = [start - end for (start, _), end in zip(places, behind, strict=False)]  # headers before each member
    usual = min(*heads, 3 * _BLOCK)  # webdataset writes three blocks per member
    ends = (entry.samples[0], entry.samples[-1])
    with path.open("rb") as stream:
        stream.seek(behind[-1])
        if max(heads) > 2 * usual or stream.read(_BLOCK).strip(b"\0"):  # there may be another member
            return scan_shard(path) == entry
        for name, place in ((f"{end.key}.{member}", place) for end in ends for member, place in end.members.items()):
            stream.seek(place[0] - _BLOCK)
            if not header_fits(stream.read(_BLOCK), name, place[1]):
                return False
    return True
