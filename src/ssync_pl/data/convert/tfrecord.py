"""Reading TFRecord files without TensorFlow.

A file is a row of records: 8 bytes of length (little endian), 4 bytes of masked CRC-32C of the length, the data, and
4 bytes of masked CRC-32C of the data (TensorFlow documentation, "TFRecords format details").
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

from ssync_pl.data.convert.crc32c import masked_crc32c
from ssync_pl.errors import ShardError

__all__ = ["Record", "index_records", "read_record"]

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


class Record(NamedTuple):
    """Where a record lies.

    Attributes:
        offset: Byte at which its header starts.
        length: Bytes of its data.

    Example:
        >>> Record(0, 100).length
        100
    """

    offset: int
    length: int


def index_records(path: str | os.PathLike[str], limit: int | None = None) -> list[Record]:
    """Find the records of a file by their headers; the data is not read.

    Args:
        path: A TFRecord file, not compressed.
        limit: Most records to find; None for all.

    Returns:
        The records, in order.

    Raises:
        FileNotFoundError: There is no such file.
        ShardError: The file is truncated, a length is damaged, or it is no TFRecord file.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as stream:
        ...     index_records(stream.name)
        []
    """
    path = Path(path)
    size = path.stat().st_size
    found: list[Record] = []
    offset = 0
    with path.open("rb") as stream:
        while offset < size and (limit is None or len(found) < limit):
            stream.seek(offset)
            length = _length(stream.read(_HEADER.size), path, offset)
            end = offset + _HEADER.size + length + _FOOTER.size
            if end > size:
                raise _truncated(path, offset, f"{end - offset} bytes", size - offset)
            found.append(Record(offset, length))
            offset = end
    return found


def read_record(path: str | os.PathLike[str], record: Record) -> bytes:
    """Read the data of one record and check both of its checksums.

    Args:
        path: The file.
        record: One of those that `index_records` returned for the file.

    Returns:
        The data.

    Raises:
        FileNotFoundError: There is no such file.
        ShardError: A checksum does not fit, bytes are missing, or another record lies there.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as stream:
        ...     read_record(stream.name, Record(0, 5))
        Traceback (most recent call last):
        ssync_pl.errors.ShardError: Expected ... to hold a record at byte 0 of 12 bytes of header, but ...
    """
    path = Path(path)
    with path.open("rb") as stream:
        stream.seek(record.offset)
        length = _length(stream.read(_HEADER.size), path, record.offset)
        if length != record.length:
            raise ShardError(
                f"Expected the record of {path} at byte {record.offset} to have {record.length} bytes, but it has "
                f"{length}. The file was replaced: run the conversion again into an empty folder."
            )
        # The size was compared with the file's when it was indexed, so this cannot ask for more memory than that.
        data = stream.read(length)
        footer = stream.read(_FOOTER.size)
    if len(data) != length or len(footer) != _FOOTER.size:
        raise _truncated(path, record.offset, f"{length} bytes and a checksum", len(data) + len(footer))
    found = masked_crc32c(data)
    (expected,) = _FOOTER.unpack(footer)
    if found != expected:
        raise ShardError(
            f"Expected the data of the record of {path} at byte {record.offset} to have the checksum {expected:#010x}, "
            f"but got {found:#010x}. The file is damaged: download it again."
        )
    return data


def _length(header: bytes, path: Path, offset: int) -> int:
    if len(header) < _HEADER.size:
        raise _truncated(path, offset, f"{_HEADER.size} bytes of header", len(header))
    length, expected = _HEADER.unpack(header)
    found = masked_crc32c(header[:8])
    if found != expected:
        raise ShardError(
            f"Expected the length of the record of {path} at byte {offset} to have the checksum {expected:#010x}, but "
            f"got {found:#010x}. The file is damaged, compressed or no TFRecord file: download it again."
        )
    return int(length)


def _truncated(path: Path, offset: int, expected: str, left: int) -> ShardError:
    return ShardError(
        f"Expected {path} to hold a record at byte {offset} of {expected}, but only {left} bytes are left. The file is "
        "truncated: download it again."
    )
