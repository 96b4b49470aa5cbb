"""Parsing `tf.train.Example` messages without TensorFlow.

The message is a map from names to lists of bytes, floats or integers, in the protocol buffers wire format:
`Example{1: Features{1: entry{1: name, 2: Feature{1: BytesList | 2: FloatList | 3: Int64List}}}}`, where each list holds
its values in field 1, packed or one by one (TensorFlow, `example.proto` and `feature.proto`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt

from ssync_pl.errors import ShardError

__all__ = ["Feature", "parse_example"]

Feature = list[bytes] | npt.NDArray[np.float32] | npt.NDArray[np.int64]
"""Values of one feature: a list of bytes, or a float32 or int64 array (L,)."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3
_MAX_VARINT = 10
_MAX_FIELD = (1 << 29) - 1

_View = memoryview


class _Malformed(ValueError):
    pass


def parse_example(
    data: bytes | memoryview, where: str = "the record", skip: Collection[str] = ()
) -> dict[str, Feature]:
    """Parse one `tf.train.Example`.

    Args:
        data: The serialised message.
        where: Its source, for the message.
        skip: Names of features that are passed over: long lists take milliseconds.

    Returns:
        Feature name → values. Features without a list have an empty list of bytes.

    Raises:
        ShardError: The bytes are no such message.

    Example:
        >>> entry = b"\\x0a\\x01a" + b"\\x12\\x06" + b"\\x1a\\x04" + b"\\x0a\\x02\\x07\\x08"
        >>> parse_example(b"\\x0a" + bytes([len(entry) + 2]) + b"\\x0a" + bytes([len(entry)]) + entry)
        {'a': array([7, 8])}
    """
    features: dict[str, Feature] = {}
    try:
        for number, kind, value in _fields(_View(data)):
            if number != 1:
                continue
            for inner, inner_kind, entry in _fields(_message(value, kind)):
                if inner == 1:
                    name, feature = _entry(_message(entry, inner_kind))
                    if name not in skip:
                        features[name] = _feature(feature)
    except _Malformed as error:
        raise ShardError(
            f"Expected {where} to be a tf.train.Example, but got a malformed message ({error}). The file is damaged or "
            "holds something else."
        ) from error
    return features


def _fields(data: _View) -> Iterator[tuple[int, int, _View | int]]:
    """Yield field number, wire type and value (a view, or the integer of a varint) of each field of a message."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if not 1 <= number <= _MAX_FIELD:
            raise _Malformed(f"field number {number}")
        if kind == _VARINT:
            integer, at = _varint(data, at)
            yield number, kind, integer
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise _Malformed(f"wire type {kind}")
        if size > end - at:
            raise _Malformed(f"{size} bytes expected where {end - at} are left")
        yield number, kind, data[at : at + size]
        at += size


def _varint(data: _View, at: int) -> tuple[int, int]:
    value = 0
    for step in range(_MAX_VARINT):
        if at + step >= len(data):
            raise _Malformed("the message ends within a number")
        byte = data[at + step]
        value |= (byte & 0x7F) << (7 * step)
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at + step + 1
    raise _Malformed("a number of more than 10 bytes")


def _message(value: _View | int, kind: int) -> _View:
    if kind != _BYTES or isinstance(value, int):
        raise _Malformed(f"wire type {kind} where a message or bytes are expected")
    return value


def _entry(data: _View) -> tuple[str, _View]:
    name, feature = "", _View(b"")
    for number, kind, value in _fields(data):
        if number == 1:
            try:
                name = bytes(_message(value, kind)).decode()
            except UnicodeDecodeError as error:
                raise _Malformed("a name that is not UTF-8") from error
        elif number == 2:
            feature = _message(value, kind)
    return name, feature


def _feature(data: _View) -> Feature:
    # The format allows one list in several pieces; another kind of list replaces what came before.
    kind_of_list = _BYTES_LIST
    pieces: list[_View] = []
    for number, kind, value in _fields(data):
        if number not in (_BYTES_LIST, _FLOAT_LIST, _INT64_LIST):
            continue
        if number != kind_of_list:
            kind_of_list, pieces = number, []
        pieces.append(_message(value, kind))
    if kind_of_list == _BYTES_LIST:
        return [bytes(_message(value, kind)) for piece in pieces for n, kind, value in _fields(piece) if n == 1]
    if kind_of_list == _FLOAT_LIST:
        return _joined([_floats(piece) for piece in pieces], np.float32)
    return _joined([_integers(piece) for piece in pieces], np.int64)


def _floats(data: _View) -> npt.NDArray[np.float32]:
    parts = []
    for number, kind, value in _fields(data):
        if number != 1:
            continue
        if isinstance(value, int) or kind not in (_BYTES, _FIXED32) or len(value) % 4:
            raise _Malformed("a list of floats whose size is no multiple of 4")
        if len(value):
            parts.append(np.frombuffer(value, "<f4").astype(np.float32))
    return _joined(parts, np.float32)


def _integers(data: _View) -> npt.NDArray[np.int64]:
    parts: list[npt.NDArray[np.int64]] = []
    single: list[int] = []
    for number, kind, value in _fields(data):
        if number != 1:
            continue
        if isinstance(value, int):
            single.append(value)
            continue
        if kind != _BYTES:
            raise _Malformed(f"wire type {kind} in a list of integers")
        if single:
            parts.append(np.array(single, np.uint64).view(np.int64))
            single = []
        parts.append(_packed_varints(value))
    if single:
        parts.append(np.array(single, np.uint64).view(np.int64))
    return _joined(parts, np.int64)


def _packed_varints(data: _View) -> npt.NDArray[np.int64]:
    if not len(data):
        return np.zeros(0, np.int64)
    raw = np.frombuffer(data, np.uint8)
    last = np.flatnonzero(raw < 0x80)
    if not len(last) or last[-1] != len(raw) - 1:
        raise _Malformed("the message ends within a number")
    first = np.concatenate([np.zeros(1, last.dtype), last[:-1] + 1])
    sizes = last - first + 1
    longest = int(sizes.max())
    if longest > _MAX_VARINT:
        raise _Malformed("a number of more than 10 bytes")
    values = (raw[first] & 0x7F).astype(np.uint64)
    # Byte by byte over all numbers at once: each step leaves only the numbers that are longer.
    longer = np.arange(len(values))
    for step in range(1, longest):
        longer = longer[sizes[longer] > step]
        values[longer] |= (raw[first[longer] + step] & 0x7F).astype(np.uint64) << np.uint64(7 * step)
    return values.view(np.int64)


def _joined(parts: list[npt.NDArray], dtype: type) -> npt.NDArray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.zeros(0, dtype), *parts])
