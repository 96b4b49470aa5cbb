"""Reading a shard once from start to end, from a disk or through fsspec (http, s3, gs, hf, …), with retries."""

import bz2
import contextlib
import functools
import gzip
import io
import itertools
import logging
import lzma
import posixpath
import re
import sys
import time
from collections.abc import Collection, Generator, Sequence
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit, urlunsplit

from ssync_pl.data.decode import MAX_MEMBER_BYTES, require_size
from ssync_pl.data.index import INDEX_NAMES, MOST_BYTES, ShardEntry, list_members, open_tar, parse_index, warn_ignored
from ssync_pl.data.patterns import is_remote, masked_url, shard_name
from ssync_pl.data.samples import Members
from ssync_pl.errors import ShardError, explained, printable, require_shard

RETRY_SECONDS = 100.0  # of waiting, over all tries, after which a transfer has failed; received bytes win some back
_STALL_SECONDS = 30.0
_SLOWEST = 16 << 10  # bytes per second that a transfer must have in the long run
_LONGEST_PAUSE = 10.0
_CHUNK = 1 << 20
_TOGETHER = 4  # members of a sample may take so many times what one may
_MOST_BEHIND = 64 << 20  # bytes behind the end of an archive, where tar fills up its last block
_PIECE = 32 << 10  # bytes that are asked for after a break
# Client errors that another try can mend: timeout, too early, too many requests.
_PASSING = (408, 425, 429)
_ABSENT = (401, 403, 404, 410)
_FINAL = (FileNotFoundError, PermissionError, ImportError, ValueError, NotImplementedError)
_UNPACK: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_AGAIN = "Build the shard again."
_logger = logging.getLogger(__name__)


class _AbsentError(ShardError):
    """There is no such file, or none that may be read."""


class RemoteFile(io.RawIOBase):
    """A remote file, read once from start to end, whatever the connection does in between."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self._connection: Any = None
        self._position = 0
        self._size: int | None = None
        self._until: int | None = None  # where the piece ends that was asked for; None: at the end of the file
        self._patience = RETRY_SECONDS

    def readable(self) -> bool:
        """Says that the file can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads the next bytes; 0 at the end of the file. Raises `ShardError` when the transfer has failed."""
        pause = 0.5
        while True:
            began = time.monotonic()
            try:
                if self._connection is None and self._position == self._size:
                    return 0
                if self._connection is None:
                    self._connect()
                data = self._connection.read(len(buffer))
                self._patience -= time.monotonic() - began
                began = time.monotonic()
                if not data and self._position == self._until != self._size:  # a piece is whole: ask for the rest
                    self._disconnect()
                    self._until = None
                    continue
                if data and self._patience < 0:
                    raise OSError(f"fewer than {_SLOWEST} bytes per second came for {RETRY_SECONDS:g} s")
                if not data and self._position != (self._size or self._position):
                    raise OSError(f"the transfer ended early, at byte {self._position} of {self._size}")
                self._patience = min(RETRY_SECONDS, self._patience + len(data) / _SLOWEST)
                self._position += len(data)
                buffer[: len(data)] = data
                return len(data)
            except Exception as error:  # each file system of fsspec has errors of its own
                if self._connection is not None:  # what came just before a break would be lost with it again
                    self._until = min(self._position + _PIECE, self._size or sys.maxsize)
                self._disconnect()
                self._patience -= time.monotonic() - began + pause
                reason = _describe(error, self.url)
                if _is_final(error) or self._patience < 0:
                    absent = isinstance(error, FileNotFoundError) or getattr(error, "status", None) in _ABSENT
                    # The original error may hold the whole address, with its token.
                    raise (_AbsentError if absent else ShardError)(
                        f"Expected to read {masked_url(self.url)} to its end, but at byte {self._position} it failed "
                        f"for good: {reason}. Check the address, your permissions and the connection."
                    ) from None
            _logger.warning("Trying %s again in %g s: %s", masked_url(self.url), pause, reason)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def close(self) -> None:
        """Closes the connection; a transfer that is not over is cut off."""
        self._disconnect()
        super().close()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        with contextlib.suppress(Exception):
            connection.close()

    def _connect(self) -> None:
        """Opens the file at the place that was reached; servers that cannot do so send all again."""
        from fsspec.core import url_to_fs

        if urlsplit(self.url).scheme.lower() in ("http", "https"):
            begin = self._connect_http()
        else:
            system, path = url_to_fs(self.url)
            self._connection = system.open(path, "rb")
            begin = self._connection.seek(self._position)
        while begin < self._position:
            data = self._connection.read(min(self._position - begin, _CHUNK))
            if not data:
                raise OSError(f"the new transfer ended at byte {begin}, before the place that was reached")
            begin += len(data)

    def _connect_http(self) -> int:
        """Asks for the rest of the file in one request; returns the place from which the server sends it."""
        import aiohttp
        from fsspec.core import url_to_fs

        stall = max(_STALL_SECONDS / 3, min(_STALL_SECONDS, self._patience))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall)
        system, path = url_to_fs(self.url, client_kwargs={"timeout": timeout})
        headers = {"Accept-Encoding": "identity"}
        if self._position or self._until:
            headers["Range"] = f"bytes={self._position}-{'' if self._until is None else self._until - 1}"
        # A size is passed so that none is asked for.
        self._connection = system.open(path, "rb", block_size=0, size=1, headers=headers)
        answer = self._connection.r
        in_part = answer.status == 206
        begin = self._position if in_part else 0
        span = re.match(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if in_part and (span is None or int(span[1]) != begin):
            raise OSError("the server answered with another part of the file than was asked for")
        whole = span[2] if in_part and span is not None else answer.headers.get("Content-Length", "")
        size = int(whole) if whole.isdecimal() else self._size
        if not in_part or (self._until is not None and size is not None and self._until >= size):
            self._until = None
        if self._size is not None and size is not None and size != self._size:
            raise ValueError("the file was replaced on the server meanwhile")
        self._size = size
        return begin


def stream_shard(
    path_or_url: str,
    max_bytes: int = MAX_MEMBER_BYTES,
    fields: Collection[str] | None = ("video", "image", "segmentations"),
) -> Generator[tuple[str, Members], None, None]:
    """Reads key and members of each sample of a shard from its start, undecoded, unpacked where it is packed.

    Members are kept up to `max_bytes`, where the first part of their name is one of `fields`, or `fields` is None.
    """
    shown = masked_url(path_or_url)
    with explained(f"to read {shown}", OSError, advice="Check the path."):
        raw: io.RawIOBase = RemoteFile(path_or_url) if is_remote(path_or_url) else io.FileIO(path_or_url)
    with contextlib.closing(raw):
        stream: Any = io.BufferedReader(raw, _CHUNK)
        plain = _UNPACK.get(stream.peek(2)[:2], lambda source: source)(stream)
        ignored: list[str] = []
        with open_tar(plain, "r|", shown) as tar:
            for key, group in itertools.groupby(list_members(tar, ignored), lambda item: item[1]):
                where, sizes, contents = f"{shown}, key {key}", dict[str, int](), dict[str, bytes]()
                for info, _, member in group:
                    require_shard(member not in sizes, f"each member of {where} once", "one twice", advice=_AGAIN)
                    sizes[member] = info.size
                    wanted = fields is None or member.split(".")[0] in fields
                    room = _TOGETHER * max_bytes - sum(map(len, contents.values()))
                    if wanted and info.size <= min(max_bytes, room):
                        stored: Any = tar.extractfile(info)
                        contents[member] = stored.read()
                        if len(contents[member]) != info.size:
                            raise EOFError(f"member {info.name} ends early")
                yield key, Members(where, sizes, functools.partial(_part, where, sizes, contents, max_bytes), max_bytes)
            for _ in range(_MOST_BEHIND // _CHUNK):
                if not plain.read(_CHUNK):  # only a transfer that is read to its end says whether it was whole
                    break
            else:
                raise EOFError(f"{_MOST_BEHIND} bytes behind its end")
        warn_ignored(shown, ignored)


def _part(where: str, sizes: Any, contents: Any, max_bytes: int, member: str, start: int, length: int) -> bytes:
    require_size(sizes[member], f"member `{member}` of {where}", max_bytes)
    if member not in contents:
        require_size(sum(sizes.values()), f"the members of {where} together", _TOGETHER * max_bytes)
    return bytes(contents.get(member, b"")[start : start + length])


def fetch_index(urls: Sequence[str]) -> list[ShardEntry] | None:
    """Fetches the index beside remote shards; `None` when there is none, or it does not name all of them."""
    fetch = functools.cache(_fetch_folder)
    folders = [parts._replace(path=posixpath.dirname(parts.path)) for parts in map(urlsplit, urls)]
    entries = [fetch(folder).get(shard_name(url)) for url, folder in zip(urls, folders, strict=True)]
    return None if None in entries else cast(list[ShardEntry], entries)


def _fetch_folder(parts: SplitResult) -> dict[str, ShardEntry]:
    for name in INDEX_NAMES:
        url = urlunsplit(parts._replace(path=posixpath.join(parts.path, name)))
        try:
            with RemoteFile(url) as raw:
                text = io.BufferedReader(raw, _CHUNK).read(MOST_BYTES)
        except _AbsentError:
            continue
        try:
            return parse_index(text).shards
        except ShardError as error:
            _logger.info("No index at %s: %s", masked_url(url), error)
    return {}


def _is_final(error: BaseException) -> bool:
    """Whether the same failure would come at every try."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in _PASSING
    named = ("SSL", "Certificate", "InvalidURL", "Redirect")
    return isinstance(error, _FINAL) or any(word in type(error).__name__ for word in named)


def _describe(error: BaseException, url: str) -> str:
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(status, int):
        return printable(f"the server answered {status} {getattr(error, 'message', '')}"[:300]).rstrip()
    text = (str(error) or type(error).__name__).replace(url, masked_url(url))
    return printable(re.sub(r"\b[a-z][a-z0-9+]+://[^\s'\")]+", lambda found: masked_url(found[0]), text))
