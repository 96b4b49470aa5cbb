"""Opening shards: local files, http(s) with timeouts, retries and continuation, and webdataset's other schemes."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from multiprocessing.connection import wait
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from ssync_pl.data.patterns import is_remote
from ssync_pl.errors import ShardError

__all__ = ["RemoteReader", "RetryPolicy", "is_absent", "masked_url", "open_shard"]

_CHUNK = 1 << 18
_PATIENCE = 60.0
# Client errors that another try can mend: timeout, too early, too many requests.
_PASSING = (408, 425, 429)
_ABSENT = (401, 403, 404, 410)
_PASSING_ADVICE = " Check the connection and the server, then run again."
_FAILURES = (OSError, http.client.HTTPException, ValueError, ImportError)


@dataclass(frozen=True)
class RetryPolicy:
    """When a transfer counts as failed, and how long to wait before the next try.

    Args:
        timeout: Seconds without a connection or a byte after which a transfer has stalled.
        delays: Seconds between tries that bring nothing new; one try more than there are delays.

    Example:
        >>> RetryPolicy(delays=(1.0, 2.0)).tries
        3
    """

    timeout: float = 30.0
    delays: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)

    @property
    def tries(self) -> int:
        """Tries in a row that may fail."""
        return len(self.delays) + 1


class _Final(Exception):
    """A failure that no further try can mend."""


class RemoteReader(io.RawIOBase):
    """A remote file, read once from start to end, whatever the connection does in between.

    A connection that breaks, stalls or ends early is opened again after a growing pause, at the byte that was reached
    where the server knows ranges, else from the start, leaving out what was read. Any new byte starts the count of
    tries afresh. http and https go through the standard library, with the proxies and certificates of the environment;
    other schemes through `webdataset.gopen`.

    Args:
        url: The file.
        policy: Timeout and pauses.

    Attributes:
        failure: The message of the error that ended reading, or `None`.
        status: Status of the last http answer, or `None`.
        size: Bytes of the file, or `None` where nobody says.

    Raises:
        ShardError: On reading: all tries failed, or none can help.

    Example:
        >>> RemoteReader("nothing://host/a.tar?token=secret").read(1)
        Traceback (most recent call last):
        ssync_pl.errors.ShardError: Expected to read nothing://host/a.tar?token=… to its end, but ...
    """

    def __init__(self, url: str, policy: RetryPolicy | None = None) -> None:
        super().__init__()
        self.url = url
        self.policy = policy or RetryPolicy()
        self.failure: str | None = None
        self.status: int | None = None
        self.size: int | None = None
        self._source: Any = None
        self._position = 0
        self._tag: str | None = None
        self._ended = False

    def readable(self) -> bool:
        """Say that the file can be read.

        Returns:
            `True`.
        """
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes.

        Args:
            buffer: Where they go.

        Returns:
            Their number; 0 at the end of the file.

        Raises:
            ShardError: All tries failed, or none can help.
        """
        if self.failure is not None:
            raise ShardError(self.failure)
        view = memoryview(buffer).cast("B")
        failed = 0
        while not self._ended:
            try:
                if self._source is None:
                    self._open()
                data = self._receive(len(view))
                if data:
                    view[: len(data)] = data
                    self._position += len(data)
                    return len(data)
                self._check_end()
                self._ended = True
            except _Final as error:
                self._fail(str(error), failed + 1)
            except _FAILURES as error:
                self._drop()
                if isinstance(error, urllib.error.HTTPError):
                    self.status = error.code
                    error.close()
                advice = _final_advice(error)
                if advice is not None or failed >= len(self.policy.delays):
                    self._fail(f"{_describe(error, self.url)}.{advice or _PASSING_ADVICE}", failed + 1)
                time.sleep(max(self.policy.delays[failed], _asked_pause(error)))
                failed += 1
        return 0

    def close(self) -> None:
        """Close the connection; a transfer that is not over is cut off."""
        if not self.closed:
            self._drop()
        super().close()

    def _fail(self, what: str, tries: int) -> None:
        place = f"byte {self._position}" + (f" of {self.size}" if self.size is not None else "")
        self._drop()
        self.failure = (
            f"Expected to read {masked_url(self.url)} to its end, but at {place} it failed "
            f"({tries} {'try' if tries == 1 else 'tries'}): {what}"
        )
        # The original error may hold the whole address, with its token.
        raise ShardError(self.failure) from None

    def _drop(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            with contextlib.suppress(Exception):  # a program that is cut off complains on purpose
                if hasattr(source, "proc"):
                    source.proc.kill()
                source.close()

    def _open(self) -> None:
        scheme = urlsplit(self.url).scheme.lower()
        if scheme in ("http", "https"):
            begin = self._open_http()
        elif scheme == "pipe":
            raise _Final("`pipe:` runs any command and is refused. Give the URL itself, or download the shards.")
        else:
            from webdataset.gopen import gopen

            self._source, begin = gopen(self.url), 0
        while begin < self._position:
            data = self._receive(min(self._position - begin, _CHUNK))
            if not data:
                raise OSError(f"the new transfer ended at byte {begin}, before the place that was reached")
            begin += len(data)

    def _open_http(self) -> int:
        parts = urlsplit(self.url)
        where = parts.netloc.rpartition("@")
        request = urllib.request.Request(urlunsplit(parts._replace(netloc=where[2], fragment="")))
        if where[0]:
            token = base64.b64encode(unquote(where[0]).encode()).decode()
            # not handed on to other hosts that the server points to
            request.add_unredirected_header("Authorization", f"Basic {token}")
        if self._position:
            request.add_header("Range", f"bytes={self._position}-")
            if self._tag is not None:
                request.add_header("If-Range", self._tag)
        answer = urllib.request.urlopen(request, timeout=self.policy.timeout)
        self._source, self.status = answer, answer.status
        begin = self._position if answer.status == 206 else 0
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if begin and (span is None or int(span[1]) != begin):
            raise OSError("the server answered with another part of the file than was asked for")
        length = answer.headers.get("Content-Length")
        size = begin + int(length) if length is not None and length.isdecimal() else None
        tag = _strong_tag(answer.headers)
        if self._position:
            same_size = self.size is None or size is None or self.size == size
            if not same_size or (begin == 0 and tag != self._tag):
                raise _Final("the file was replaced on the server meanwhile. Start again when the upload is complete.")
        else:
            self.size, self._tag = size, tag
        return begin

    def _receive(self, most: int) -> bytes:
        # One piece at a time: what came before a failure is kept.
        source = self._source
        if isinstance(source, http.client.HTTPResponse):
            return source.read1(most)
        stream = getattr(source, "stream", None)
        if stream is not None and hasattr(stream, "fileno"):
            if not wait([stream.fileno()], self.policy.timeout):
                raise TimeoutError(f"no byte for {self.policy.timeout:g} s")
            return os.read(stream.fileno(), most)
        data: bytes = source.read(most)
        return data

    def _check_end(self) -> None:
        if self.size is not None and self._position != self.size:
            raise OSError(f"the transfer ended early, at byte {self._position} of {self.size}")
        source, self._source = self._source, None
        source.close()  # a program's exit status says whether the file was whole


def masked_url(url: str) -> str:
    """Return an address that may be printed: without passwords, and without the values of its query.

    Args:
        url: Path or URL.

    Returns:
        The same with `…` in place of what may be secret.

    Example:
        >>> masked_url("https://me:pass@host/a.tar?token=secret&part=1")
        'https://me:…@host/a.tar?token=…&part=…'
    """
    if not is_remote(url):
        return url
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    user = f"{user.partition(':')[0]}:…" if ":" in user else ("…" if user else "")
    names = [item.partition("=") for item in parts.query.split("&")] if parts.query else []
    query = "&".join(f"{name}=…" if equals else "…" for name, equals, _ in names)
    return urlunsplit(parts._replace(netloc=f"{user}{at}{host}", query=query, fragment=""))


def open_shard(path_or_url: str, policy: RetryPolicy | None = None) -> tuple[io.BufferedReader, io.RawIOBase]:
    """Open a shard for reading once from start to end.

    Args:
        path_or_url: Local path or URL.
        policy: Timeout and pauses, for URLs.

    Returns:
        Buffered stream, and the raw one below it (a `RemoteReader` for URLs).

    Raises:
        ShardError: There is no such file, or it may not be read.

    Example:
        >>> open_shard("/nowhere/train-000000.tar")
        Traceback (most recent call last):
        ssync_pl.errors.ShardError: Expected to read /nowhere/train-000000.tar, but ...
    """
    raw: io.RawIOBase
    if is_remote(path_or_url):
        raw = RemoteReader(path_or_url, policy)
    else:
        try:
            raw = io.FileIO(path_or_url)
        except OSError as error:
            raise ShardError(
                f"Expected to read {path_or_url}, but it cannot be opened ({error.strerror}). Check the path and its "
                "permissions."
            ) from error
    return io.BufferedReader(raw, _CHUNK), raw


def _strong_tag(headers: Message) -> str | None:
    tag = headers.get("ETag")
    if tag is not None and not tag.startswith("W/"):
        return tag
    return headers.get("Last-Modified")


def _final_advice(error: BaseException) -> str | None:
    # What to do about failures that come again at every try; None where another try may help.
    if isinstance(error, urllib.error.HTTPError):
        if error.code in (401, 403):
            return " Check the address, its token and your permissions; this is not tried again."
        if error.code == 416:
            return " The file is shorter than the server said at first: upload it again."
        if 400 <= error.code < 500 and error.code not in _PASSING:
            return " Check the address and the range of numbers; this is not tried again."
        return None
    reason = getattr(error, "reason", None)
    if isinstance(error, ssl.SSLCertVerificationError) or isinstance(reason, ssl.SSLCertVerificationError):
        return " Check the server's certificate, or set SSL_CERT_FILE to your authority's."
    if isinstance(error, FileNotFoundError | PermissionError):
        if error.filename is None:
            return " Check the address and your permissions."
        return f" Install the program that reads this scheme ({error.filename}), or give an https address."
    if isinstance(error, ImportError):
        return f" Install the package {error.name}, or give an https address."
    if isinstance(error, ValueError | http.client.InvalidURL):
        return " Give an address of a scheme that can be read, for example https."
    return None


def _describe(error: BaseException, url: str) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        error = error.reason if isinstance(error.reason, BaseException) else error
    if isinstance(error, TimeoutError):
        return str(error) if str(error).startswith("no byte") else "the server sent nothing for too long (timed out)"
    exit_status = re.search(r": exit (-?\d+) \(read\)", str(error))
    if exit_status is not None:  # this message holds the whole command, with its tokens
        return f"the program that reads {urlsplit(url).scheme} ended with status {exit_status[1]}"
    text = (str(error) or type(error).__name__).replace(url, masked_url(url))
    return re.sub(r"\b[a-z][a-z0-9+]+://\S+", lambda found: masked_url(found[0]), text)


def _asked_pause(error: BaseException) -> float:
    asked = error.headers.get("Retry-After", "") if isinstance(error, urllib.error.HTTPError) and error.headers else ""
    return min(float(asked), _PATIENCE) if asked.isdecimal() else 0.0


def is_absent(raw: io.RawIOBase) -> bool:
    """Say whether a reader failed because the server has no such file for us.

    Args:
        raw: The raw stream of `open_shard`, after a failure.

    Returns:
        Whether the last answer was 401, 403, 404 or 410 (stores answer 403 for files that are not there).

    Example:
        >>> is_absent(RemoteReader("https://host/index.json"))
        False
    """
    return isinstance(raw, RemoteReader) and raw.status in _ABSENT
