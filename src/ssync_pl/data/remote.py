"""Reading a shard once from start to end, from a disk or through fsspec (http, s3, gs, hf, …), with retries."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import itertools
import logging
import lzma
import posixpath
import re
import tarfile
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import IO, Any, cast
from urllib.parse import urlsplit, urlunsplit

from ssync_pl.data.decode import MAX_MEMBER_BYTES, require_size
from ssync_pl.data.index import (
    INDEX_NAMES,
    ShardEntry,
    escaped,
    is_utf8,
    open_tar,
    parse_index,
    split_member_name,
    warn_ignored,
)
from ssync_pl.data.patterns import is_remote, masked_url, shard_name
from ssync_pl.data.samples import Members
from ssync_pl.errors import ShardError, require_shard

RETRY_SECONDS = 100.0
"""Seconds of waiting, over all tries, after which a transfer has failed; received bytes win seconds back."""

_STALL_SECONDS = 30.0
_SLOWEST = 16 << 10  # bytes per second that a transfer must have in the long run
_PAUSES = (0.5, 1.0, 2.0, 4.0, 10.0)
_CHUNK = 1 << 20
# Client errors that another try can mend: timeout, too early, too many requests.
_PASSING = (408, 425, 429)
_ABSENT = (401, 403, 404, 410)
_FINAL = (FileNotFoundError, PermissionError, ImportError, ValueError, NotImplementedError)
_UNPACK: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_logger = logging.getLogger(__name__)


class RemoteFile(io.RawIOBase):
    """A remote file, read once from start to end, whatever the connection does in between."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.failure: str | None = None
        self.absent = False
        self._source: Any = None
        self._position = 0
        self._size: int | None = None
        self._ended = False
        self._patience = RETRY_SECONDS

    def readable(self) -> bool:
        """Says that the file can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads the next bytes; 0 at the end of the file. Raises `ShardError` when the transfer has failed."""
        if self.failure is not None:
            raise ShardError(self.failure)
        view = memoryview(buffer).cast("B")
        for pause in itertools.chain(_PAUSES, itertools.repeat(_PAUSES[-1])):
            if self._ended:
                break
            began = time.monotonic()
            try:
                if self._source is None:
                    self._open()
                data = self._source.read(len(view))
                self._patience -= time.monotonic() - began
                began = time.monotonic()
                if data and self._patience < 0:
                    raise OSError(f"fewer than {_SLOWEST} bytes per second came for {RETRY_SECONDS:g} s")
                if data:
                    self._patience = min(RETRY_SECONDS, self._patience + len(data) / _SLOWEST)
                    view[: len(data)] = data
                    self._position += len(data)
                    return len(data)
                if self._size is not None and self._position != self._size:
                    raise OSError(f"the transfer ended early, at byte {self._position} of {self._size}")
                self._ended = True
                self._drop()
            except Exception as error:  # each file system of fsspec has errors of its own
                self._drop()
                reason = _describe(error, self.url)
                self._patience -= time.monotonic() - began + pause
                if _is_final(error) or self._patience < 0:
                    self.absent = isinstance(error, FileNotFoundError) or getattr(error, "status", None) in _ABSENT
                    self.failure = (
                        f"Expected to read {masked_url(self.url)} to its end, but at byte {self._position} it failed "
                        f"for good: {reason}. Check the address, your permissions and the connection."
                    )
                    # The original error may hold the whole address, with its token.
                    raise ShardError(self.failure) from None
                _logger.warning("Trying %s again in %g s: %s", masked_url(self.url), pause, reason)
                time.sleep(pause)
        return 0

    def close(self) -> None:
        """Closes the connection; a transfer that is not over is cut off."""
        if not self.closed:
            self._drop()
        super().close()

    def _drop(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            with contextlib.suppress(Exception):
                source.close()

    def _open(self) -> None:
        """Opens the file at the place that was reached; servers that cannot do so send all again."""
        from fsspec.core import url_to_fs

        begin = self._position
        if urlsplit(self.url).scheme.lower() in ("http", "https"):
            begin = self._open_http()
        else:
            system, path = url_to_fs(self.url)
            self._source = system.open(path, "rb")
            self._source.seek(begin)
        while begin < self._position:
            data = self._source.read(min(self._position - begin, _CHUNK))
            if not data:
                raise OSError(f"the new transfer ended at byte {begin}, before the place that was reached")
            begin += len(data)

    def _open_http(self) -> int:
        import aiohttp
        from fsspec.core import url_to_fs

        stall = max(_STALL_SECONDS / 3, min(_STALL_SECONDS, self._patience))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall)
        system, path = url_to_fs(self.url, client_kwargs={"timeout": timeout})
        headers = {"Accept-Encoding": "identity"}
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
        # One request for the whole rest; a size is passed so that none is asked for.
        self._source = system.open(path, "rb", block_size=0, size=1, headers=headers)
        answer = self._source.r
        begin = self._position if answer.status == 206 else 0
        span = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if begin and (span is None or int(span[1]) != begin):
            raise OSError("the server answered with another part of the file than was asked for")
        length = answer.headers.get("Content-Length", "")
        size = begin + int(length) if length.isdecimal() else None
        if self._size is not None and size is not None and size != self._size:
            raise ValueError("the file was replaced on the server meanwhile")
        self._size = size
        return begin


def stream_shard(
    path_or_url: str,
    max_bytes: int = MAX_MEMBER_BYTES,
    fields: Collection[str] | None = ("video", "image", "segmentations"),
) -> Generator[tuple[str, Members], None, None]:
    """Reads a shard from its start, undecoded; a compressed one (`.tar.gz`, `.tgz`, …) is unpacked on the way.

    Yields key and members of each sample. The content of members is kept up to `max_bytes`, and where the first part of
    the name is one of `fields`, or `fields` is `None`. Raises `ShardError` when the transfer failed, or the shard is
    damaged, cut off or holds links.
    """
    shown = masked_url(path_or_url)
    raw: io.RawIOBase
    try:
        raw = RemoteFile(path_or_url) if is_remote(path_or_url) else io.FileIO(path_or_url)
    except OSError as error:
        raise ShardError(f"Expected to read {shown}, but got {error.strerror}. Check the path.") from error
    with contextlib.closing(raw):
        stream: Any = io.BufferedReader(raw, _CHUNK)
        plain = _UNPACK.get(stream.peek(2)[:2], lambda source: source)(stream)
        with open_tar(plain, "r|", shown) as tar:
            for key, group in itertools.groupby(_read_members(tar, shown, max_bytes, fields), lambda item: item[0]):
                yield key, _as_members(f"{shown}, key {key}", list(group), max_bytes)
            while plain.read(_CHUNK):  # only a transfer that is read to its end says whether it was whole
                pass


def _read_members(
    tar: tarfile.TarFile, shown: str, max_bytes: int, fields: Collection[str] | None
) -> Iterator[tuple[str, str, int, bytes]]:
    """Yields key, name, size and content of each member that belongs to a sample."""
    ignored: list[str] = []
    for info in tar:
        parts = split_member_name(info.name)
        if info.isdir() or (info.isreg() and parts is None):
            continue
        advice = "Read the shard from a local disk, or pack it with `tar --dereference --hard-dereference`."
        linked = info.issym() or info.islnk()
        require_shard(not linked, f"plain members in stream {shown}", f"link {escaped(info.name)}", advice=advice)
        if parts is None or not info.isreg() or info.issparse() or not is_utf8(info.name):
            ignored.append(escaped(info.name))
            continue
        wanted = (fields is None or parts[1].split(".")[0] in fields) and info.size <= max_bytes
        content = cast(IO[bytes], tar.extractfile(info)).read() if wanted else b""
        if wanted and len(content) != info.size:
            raise EOFError(f"member {info.name} ends early")
        yield *parts, info.size, content
    warn_ignored(shown, ignored)


def _as_members(where: str, group: list[tuple[str, str, int, bytes]], max_bytes: int) -> Members:
    sizes = {name: size for _, name, size, _ in group}
    contents = {name: content for _, name, _, content in group}
    require_shard(len(sizes) == len(group), f"each member of {where} once", "one twice", advice="Build it again.")

    def fetch(name: str, start: int, length: int) -> bytes:
        require_size(sizes[name], f"member `{name}` of {where}", max_bytes)
        return contents[name][start : start + length]

    return Members(where, sizes, fetch, max_bytes)


def fetch_index(urls: Sequence[str]) -> list[ShardEntry] | None:
    """Fetches the index beside remote shards; `None` when there is none, or it does not name all of them."""
    known: dict[str, dict[str, ShardEntry]] = {}
    entries = []
    for url in urls:
        parts = urlsplit(url)
        folder = urlunsplit(parts._replace(path=posixpath.dirname(parts.path)))
        if folder not in known:
            known[folder] = _fetch_folder(folder)
        entries.append(known[folder].get(shard_name(url)))
    return None if None in entries else cast(list[ShardEntry], entries)


def _fetch_folder(folder: str) -> dict[str, ShardEntry]:
    parts = urlsplit(folder)
    for name in INDEX_NAMES:
        url = urlunsplit(parts._replace(path=posixpath.join(parts.path, name)))
        with contextlib.closing(RemoteFile(url)) as raw:
            try:
                return parse_index(io.BufferedReader(raw, _CHUNK).read()).shards
            except ShardError as error:
                if raw.failure is not None and not raw.absent:
                    raise
                _logger.info("No index at %s: %s", masked_url(url), error)
    return {}


def _is_final(error: BaseException) -> bool:
    """Whether the same failure would come at every try."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in _PASSING
    named = ("SSL", "Certificate", "InvalidURL")
    return isinstance(error, _FINAL) or any(word in type(error).__name__ for word in named)


def _describe(error: BaseException, url: str) -> str:
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(status, int):
        return f"the server answered {status} {getattr(error, 'message', '')}".rstrip()
    text = (str(error) or type(error).__name__).replace(url, masked_url(url))
    return re.sub(r"\b[a-z][a-z0-9+]+://[^\s'\")]+", lambda found: masked_url(found[0]), text)
