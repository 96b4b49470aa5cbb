"""One shard read from start to end through webdataset, undecoded, and the index beside remote shards."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import logging
import lzma
import os
import posixpath
from collections.abc import Generator, Iterator, Sequence
from typing import IO, Any, cast
from urllib.parse import urlsplit, urlunsplit

from ssync_pl.data.index import INDEX_NAME, ShardEntry, parse_index, split_member_name
from ssync_pl.data.patterns import shard_name
from ssync_pl.data.remote import RemoteReader, RetryPolicy, is_absent, masked_url, open_shard
from ssync_pl.errors import ShardError

__all__ = ["fetch_index", "is_wanted", "stream_shard"]

_BLOCK = 512
_WANTED = ("video", "image", "segmentations")
_logger = logging.getLogger(__name__)


def stream_shard(
    path_or_url: str, size: int | None = None, policy: RetryPolicy | None = None
) -> Generator[tuple[str, dict[str, bytes]], None, None]:
    """Read a shard from its start, undecoded; a compressed one (`.tar.gz`, `.tgz`, …) is unpacked on the way.

    Args:
        path_or_url: The shard.
        size: Bytes that its file should have, or `None`; where the server does not tell, it is not compared.
        policy: Timeout and retries of a remote shard.

    Yields:
        Key and members (name → bytes) of each sample; only members that hold video or masks.

    Raises:
        ShardError: The shard cannot be opened, has another size, or the connection or the tar ends early.

    Example:
        >>> next(stream_shard("nothing://host/a.tar"))
        Traceback (most recent call last):
        ssync_pl.errors.ShardError: Expected to read nothing://host/a.tar to its end, but ...
    """
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    stream, raw = open_shard(path_or_url, policy)
    shown = masked_url(path_or_url)
    try:
        _check_size(stream, raw, shown, size)
        watched = _Watched(_unpacked(stream))
        files: Iterator[dict[str, Any]] = tar_file_iterator(watched, select_files=is_wanted)
        named = ({**item, "__url__": shown} for item in files)
        for sample in group_by_keys(named, keys=lambda name: split_member_name(name) or (None, None)):
            yield sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")}
        # Only a download that is read to its end says whether it was whole.
        while watched.read(1 << 20):
            pass
        if not watched.whole:
            raise EOFError("no end-of-archive mark")
    except Exception as error:
        failure = getattr(raw, "failure", None)
        if failure is not None:
            raise ShardError(failure) from None
        if isinstance(error, ShardError):
            raise
        reason = str(error).split(" @ ")[0]  # webdataset adds the stream's address
        raise ShardError(
            f"Expected {shown} to be a whole tar, but reading it failed ({reason}). The file is damaged, cut off or no "
            "tar: copy, upload or build it again."
        ) from error
    finally:
        with contextlib.suppress(Exception):  # a transfer that is left early breaks on purpose
            stream.close()


def fetch_index(urls: Sequence[str], policy: RetryPolicy | None = None) -> list[ShardEntry] | None:
    """Fetch the `index.json` beside remote shards.

    Args:
        urls: The shards; they may lie in several folders.
        policy: Timeout and retries.

    Returns:
        One entry a shard, in the order of `urls`, or `None` when an index or an entry is missing.

    Raises:
        ShardError: An http server does not answer, or with an error that does not say that the file is missing.

    Example:
        >>> fetch_index(["nothing://host/a.tar"]) is None
        True
    """
    known: dict[str, dict[str, ShardEntry]] = {}
    entries: list[ShardEntry] = []
    for url in urls:
        parts = urlsplit(url)
        folder = urlunsplit(parts._replace(path=posixpath.join(posixpath.dirname(parts.path), INDEX_NAME)))
        if folder not in known:
            text = _fetch(folder, policy)
            if text is None:
                return None
            try:
                known[folder] = parse_index(text).shards
            except ShardError as error:
                _logger.warning("Ignoring %s: %s", masked_url(folder), error)
                return None
        entry = known[folder].get(shard_name(url))
        if entry is None:
            return None
        entries.append(entry)
    return entries


def is_wanted(name: str) -> bool:
    """Say whether a stream hands out a member.

    Args:
        name: Name in the tar.

    Returns:
        Whether it belongs to a sample and holds video, a picture or masks.

    Example:
        >>> is_wanted("7.video.npy"), is_wanted("7.forward_flow.npy")
        (True, False)
    """
    parts = split_member_name(name)
    return parts is not None and parts[1].split(".")[0] in _WANTED


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


def _fetch(url: str, policy: RetryPolicy | None) -> bytes | None:
    stream, raw = open_shard(url, policy)
    try:
        return stream.read()
    except ShardError as error:
        # Programs of other schemes do not say whether the file is missing or the way to it.
        if is_absent(raw) or urlsplit(url).scheme.lower() not in ("http", "https"):
            _logger.info("No index at %s: %s", masked_url(url), error)
            return None
        raise
    finally:
        stream.close()


def _check_size(stream: io.BufferedReader, raw: io.RawIOBase, shown: str, size: int | None) -> None:
    stream.peek(1)  # a server tells the size when the file is opened
    found = raw.size if isinstance(raw, RemoteReader) else os.fstat(raw.fileno()).st_size
    if size is not None and found is not None and found != size:
        raise ShardError(
            f"Expected {shown} to have {size} bytes as `{INDEX_NAME}` says, but it has {found}. The shard is not "
            "whole, or it and its index do not belong together: copy or upload both again."
        )
