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
from collections.abc import Generator, Iterator, Sequence
from typing import IO, Any, cast
from urllib.parse import urlsplit, urlunsplit

from ssync_pl.data.decode import MAX_MEMBER_BYTES, require_size
from ssync_pl.data.index import INDEX_NAMES, ShardEntry, escaped, is_utf8, parse_index, split_member_name
from ssync_pl.data.patterns import is_remote, masked_url, shard_name
from ssync_pl.data.samples import Members
from ssync_pl.errors import ShardError

__all__ = ["RETRY_SECONDS", "RemoteFile", "fetch_index", "stream_shard"]

RETRY_SECONDS = 120.0
"""Seconds without a new byte, over all tries, after which a transfer has failed."""

_STALL_SECONDS = 30.0
_LONGEST_PAUSE = 10.0
_CHUNK = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
_WANTED = ("video", "image", "segmentations")
# Client errors that another try can mend: timeout, too early, too many requests.
_PASSING = (408, 425, 429)
_ABSENT = (401, 403, 404, 410)
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

    def readable(self) -> bool:
        """Say that the file can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes; 0 at the end of the file. Raises `ShardError` when the transfer has failed."""
        if self.failure is not None:
            raise ShardError(self.failure)
        view = memoryview(buffer).cast("B")
        began = time.monotonic()
        for pause in itertools.chain((0.5, 1.0, 2.0, 4.0), itertools.repeat(_LONGEST_PAUSE)):
            if self._ended:
                return 0
            try:
                if self._source is None:
                    self._open()
                data = self._source.read(len(view))
                if data:
                    view[: len(data)] = data
                    self._position += len(data)
                    return len(data)
                if self._size is not None and self._position != self._size:
                    raise OSError(f"the transfer ended early, at byte {self._position} of {self._size}")
                self._drop(quiet=False)  # a program's exit status says whether the file was whole
                self._ended = True
            except Exception as error:  # each file system of fsspec has errors of its own
                self._drop()
                reason = _describe(error, self.url)
                if _is_final(error, self.url) or time.monotonic() - began + pause > RETRY_SECONDS:
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
        """Close the connection; a transfer that is not over is cut off."""
        if not self.closed:
            self._drop()
        super().close()

    def _drop(self, quiet: bool = True) -> None:
        source, self._source = self._source, None
        if source is not None:
            with contextlib.suppress(*((Exception,) if quiet else ())):
                source.close()

    def _open(self) -> None:
        scheme = urlsplit(self.url).scheme.lower()
        begin = 0
        if scheme == "pipe":
            from webdataset.gopen import gopen

            self._source = gopen(self.url)
        elif scheme in ("http", "https"):
            begin = self._open_http()
        else:
            from fsspec.core import url_to_fs

            system, path = url_to_fs(self.url)
            self._source = system.open(path, "rb")
            self._source.seek(self._position)
            begin = self._position
        while begin < self._position:
            data = self._source.read(min(self._position - begin, _CHUNK))
            if not data:
                raise OSError(f"the new transfer ended at byte {begin}, before the place that was reached")
            begin += len(data)

    def _open_http(self) -> int:
        import aiohttp
        from fsspec.core import url_to_fs

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_STALL_SECONDS, sock_read=_STALL_SECONDS)
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


def stream_shard(path_or_url: str, max_bytes: int = MAX_MEMBER_BYTES) -> Generator[tuple[str, Members], None, None]:
    """Read a shard from its start, undecoded; a compressed one (`.tar.gz`, `.tgz`, …) is unpacked on the way."""
    shown = masked_url(path_or_url)
    raw: io.RawIOBase
    try:
        raw = RemoteFile(path_or_url) if is_remote(path_or_url) else io.FileIO(path_or_url)
    except OSError as error:
        raise ShardError(
            f"Expected to read {shown}, but it cannot be opened ({error.strerror}). Check the path and its permissions."
        ) from error
    with contextlib.closing(raw):
        try:
            watched = _Watched(_unpacked(io.BufferedReader(raw, _CHUNK)))
            with tarfile.open(fileobj=cast(IO[bytes], watched), mode="r|") as tar:
                for key, group in itertools.groupby(_read_members(tar, shown, max_bytes), lambda item: item[0]):
                    yield key, _as_members(f"{shown}, key {key}", list(group), max_bytes)
            # Only a download that is read to its end says whether it was whole.
            while watched.read(_CHUNK):
                pass
            if not watched.whole:
                raise EOFError("no end-of-archive mark")
        except Exception as error:
            failure = getattr(raw, "failure", None)
            if failure is not None:
                raise ShardError(failure) from None
            if isinstance(error, ShardError):
                raise
            raise ShardError(
                f"Expected {shown} to be a whole tar, but reading it failed ({error}). The file is damaged, cut off or "
                "no tar: copy, upload or build it again."
            ) from error


def fetch_index(urls: Sequence[str]) -> list[ShardEntry] | None:
    """Fetch the index beside remote shards."""
    if any(url.startswith("pipe:") for url in urls):
        return None
    known: dict[str, dict[str, ShardEntry]] = {}
    entries: list[ShardEntry] = []
    for url in urls:
        folder = urlunsplit(urlsplit(url)._replace(path=posixpath.dirname(urlsplit(url).path)))
        if folder not in known:
            known[folder] = _fetch_folder(folder)
        entry = known[folder].get(shard_name(url))
        if entry is None:
            return None
        entries.append(entry)
    return entries


def _fetch_folder(folder: str) -> dict[str, ShardEntry]:
    parts = urlsplit(folder)
    for name in INDEX_NAMES:
        url = urlunsplit(parts._replace(path=posixpath.join(parts.path, name)))
        raw = RemoteFile(url)
        with contextlib.closing(raw):
            try:
                return parse_index(io.BufferedReader(raw, _CHUNK).read()).shards
            except ShardError as error:
                if raw.failure is not None and not raw.absent:
                    raise
                _logger.info("No index at %s: %s", masked_url(url), error)
    return {}


def _read_members(tar: tarfile.TarFile, shown: str, max_bytes: int) -> Iterator[tuple[str, str, int, bytes | None]]:
    """Yield key, name, size and content of each member that belongs to a sample."""
    ignored: list[str] = []
    for info in tar:
        parts = split_member_name(info.name)
        if info.isdir() or (info.isreg() and parts is None):
            continue
        if info.issym() or info.islnk():
            raise ShardError(
                f"Expected plain members in the streamed shard {shown}, but {escaped(info.name)} is a link. Read the "
                "shard from a local disk, or pack it with `tar --dereference --hard-dereference`."
            )
        if parts is None or not info.isreg() or info.issparse() or not is_utf8(info.name):
            ignored.append(escaped(info.name))
            continue
        key, member = parts
        wanted = member.split(".")[0] in _WANTED and info.size <= max_bytes
        content = cast(IO[bytes], tar.extractfile(info)).read() if wanted else None
        if content is not None and len(content) != info.size:
            raise EOFError(f"member {info.name} ends early")
        yield key, member, info.size, content
    if ignored:
        _logger.warning("Leaving out %d members of %s that are no plain files: %s", len(ignored), shown, ignored[:5])


def _as_members(where: str, group: list[tuple[str, str, int, bytes | None]], max_bytes: int) -> Members:
    contents = {name: content for _, name, _, content in group if content is not None}
    if len({name for _, name, _, _ in group}) < len(group):
        raise ShardError(f"Expected each member of {where} once, but one comes twice. Build the shard again.")
    sizes = {name: size for _, name, size, _ in group}

    def fetch(name: str, start: int, length: int) -> bytes:
        require_size(sizes[name], f"member `{name}` of {where}", max_bytes)
        return contents[name][start : start + length]

    return Members(where, sizes, fetch, max_bytes)


class _Watched:
    """Passes a plain tar on and remembers its end: tarfile takes a cut between two members for the end of the tar."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._last = b""

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._last = data[-_BLOCK:] if len(data) >= _BLOCK else (self._last + data)[-_BLOCK:]
        return data

    @property
    def whole(self) -> bool:
        return self._last == bytes(_BLOCK)


def _unpacked(stream: io.BufferedReader) -> IO[bytes]:
    head = stream.peek(6)[:6]
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if head.startswith(b"BZh"):
        return bz2.BZ2File(stream)
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(stream)
    return stream


def _is_final(error: BaseException, url: str) -> bool:
    """Say whether the same failure would come at every try; a command may do anything, and is not run again."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in _PASSING
    named = ("SSL", "Certificate", "InvalidURL")
    final = isinstance(error, (FileNotFoundError, PermissionError, ImportError, ValueError, NotImplementedError))
    return final or url.startswith("pipe:") or any(word in type(error).__name__ for word in named)


def _describe(error: BaseException, url: str) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    exit_status = re.search(r": exit (-?\d+) \(read\)", str(error))
    if exit_status is not None:  # this message holds the whole command, with its tokens
        return f"the command ended with status {exit_status[1]}"
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"the server answered {status} {getattr(error, 'message', '')}".rstrip()
    text = (str(error) or type(error).__name__).replace(url, masked_url(url))
    return re.sub(r"\b[a-z][a-z0-9+]+://[^\s'\")]+", lambda found: masked_url(found[0]), text)
