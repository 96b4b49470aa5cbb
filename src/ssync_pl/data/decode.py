"""Decoding of shard members by an allow-list; nothing that can execute code is ever decoded.

`webdataset`'s default `.decode()` unpickles `.pyd`, `.pkl` and `.pth` members, so this package never calls it.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import math
import re
import zlib
from typing import Any, NamedTuple

import numpy as np

from ssync_pl.errors import ShardError

__all__ = [
    "ALLOWED_EXTENSIONS",
    "NpyHeader",
    "count_video_frames",
    "decode_member",
    "decode_video",
    "member_extension",
    "read_gz_npy_header",
    "read_npy_header",
    "require_allowed",
    "view_npy",
]

ALLOWED_EXTENSIONS = ("npy", "npy.gz", "jpg", "jpeg", "png", "mp4", "json")
"""Extensions that can be decoded; all others are refused."""

_EXECUTABLE = frozenset({"pyd", "pkl", "pickle", "pth", "pt", "ckpt", "joblib", "dill", "py", "so"})
_MAX_ARRAY_BYTES = 1 << 36  # a larger array in one member is a broken header or a decompression bomb
_HEADER_BYTES = 1 << 16
_PLAIN_HEADER = re.compile(
    rb"\{'descr': '(?P<descr>[<>|=]?[a-zA-Z][0-9]{0,4})', 'fortran_order': (?P<order>True|False), "
    rb"'shape': \((?P<shape>|[0-9]{1,18},|[0-9]{1,18}(?:, [0-9]{1,18})+)\), \}\s*"
)


class NpyHeader(NamedTuple):
    """What the first bytes of a `.npy` member say.

    Attributes:
        shape: Shape of the array.
        fortran_order: Whether the array is stored column first.
        dtype: Element type, never `object`.
        data_offset: Bytes from the start of the member to the first element.

    Example:
        >>> NpyHeader((2, 3), False, np.dtype("uint8"), 128).nbytes
        6
    """

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    data_offset: int

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take."""
        return math.prod(self.shape) * self.dtype.itemsize


def member_extension(member: str) -> str:
    """Return the extension that decides how a member is decoded, in lower case.

    Args:
        member: Member name without the sample's key, for example `segmentations.npy.gz`.

    Returns:
        The part after the last dot, or the last two parts when the last is `gz`; empty when there is no dot.

    Example:
        >>> member_extension("segmentations.npy.gz"), member_extension("video.NPY"), member_extension("npy")
        ('npy.gz', 'npy', '')
    """
    parts = member.lower().split(".")
    if len(parts) > 2 and parts[-1] == "gz":
        return ".".join(parts[-2:])
    return parts[-1] if len(parts) > 1 else ""


def require_allowed(member: str, where: str = "") -> str:
    """Return the extension of a member, or refuse the member.

    Args:
        member: Member name without the sample's key.
        where: Shard and key, for the message.

    Returns:
        One of `ALLOWED_EXTENSIONS`.

    Raises:
        ShardError: The extension is not on the allow-list.

    Example:
        >>> require_allowed("video.npy")
        'npy'
    """
    extension = member_extension(member)
    if extension in ALLOWED_EXTENSIONS:
        return extension
    why = "can execute code when it is loaded" if extension in _EXECUTABLE else "is not on the allow-list"
    raise ShardError(
        f"Expected {_place(member, where)} to be one of {', '.join(ALLOWED_EXTENSIONS)}, but got `.{extension}`, which "
        f"{why}. Write the member as `.npy` or `.json` and build the shard again."
    )


def read_npy_header(data: bytes | memoryview, member: str, where: str = "") -> NpyHeader:
    """Parse the header of a `.npy` member without touching its elements.

    Args:
        data: The member, or at least its first bytes.
        member: Member name, for the message.
        where: Shard and key, for the message.

    Returns:
        Shape, order, type and where the elements start.

    Raises:
        ShardError: The bytes are no NPY header, or the elements are Python objects.

    Example:
        >>> buffer = io.BytesIO()
        >>> np.save(buffer, np.zeros((2, 3), np.uint8))
        >>> read_npy_header(buffer.getvalue(), "video.npy").shape
        (2, 3)
    """
    stream = io.BytesIO(bytes(data[:_HEADER_BYTES]))
    try:
        version = np.lib.format.read_magic(stream)
        plain = _plain_header(stream, version)
        if plain is not None:
            shape, fortran_order, dtype = plain
        elif version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"NPY version {version}")
    except Exception as error:
        raise ShardError(
            f"Expected {_place(member, where)} to start with an NPY header (version 1.0 or 2.0), but got an unreadable "
            f"one ({error}). The member is damaged or only half written: copy or build the shard again."
        ) from error
    if dtype.hasobject:
        raise ShardError(
            f"Expected {_place(member, where)} to hold numbers, but got an array of Python objects, which can execute "
            "code when it is loaded. Save the array with a numeric dtype."
        )
    header = NpyHeader(tuple(int(n) for n in shape), bool(fortran_order), dtype, stream.tell())
    most = math.prod(max(n, 1) for n in header.shape) * dtype.itemsize  # an empty dimension does not excuse the others
    if dtype.itemsize < 1 or len(header.shape) > 32 or min(header.shape, default=0) < 0 or most > _MAX_ARRAY_BYTES:
        raise ShardError(
            f"Expected {_place(member, where)} to be an array of at most {_MAX_ARRAY_BYTES} bytes, but its header says "
            f"shape {header.shape}, dtype {dtype}. The member is damaged: copy or build the shard again."
        )
    return header


def view_npy(data: bytes | memoryview, member: str, where: str = "") -> np.ndarray:
    """View a `.npy` member as an array, without a copy.

    Args:
        data: The whole member, for example a slice of a memory map.
        member: Member name, for the message.
        where: Shard and key, for the message.

    Returns:
        A read-only view on `data`; copy what is to be kept.

    Raises:
        ShardError: The header is unreadable, the elements are objects, or bytes are missing.

    Example:
        >>> buffer = io.BytesIO()
        >>> np.save(buffer, np.arange(6).reshape(2, 3))
        >>> view_npy(buffer.getvalue(), "video.npy")[1].tolist()
        [3, 4, 5]
    """
    header = read_npy_header(data, member, where)
    found = len(data) - header.data_offset
    if found != header.nbytes:
        raise ShardError(
            f"Expected {_place(member, where)} to hold {header.nbytes} bytes of elements for shape {header.shape}, "
            f"dtype {header.dtype}, but got {found}. The member is only half written: copy or build the shard again."
        )
    flat = np.frombuffer(data, dtype=header.dtype, count=math.prod(header.shape), offset=header.data_offset)
    view = flat.reshape(header.shape[::-1]).T if header.fortran_order else flat.reshape(header.shape)
    view.flags.writeable = False
    return view


def decode_member(member: str, data: bytes | memoryview, where: str = "") -> Any:
    """Decode one member by its extension.

    Args:
        member: Member name without the sample's key, for example `video.npy`.
        data: The member's bytes.
        where: Shard and key, for the message.

    Returns:
        An array: for `npy` and `npy.gz` as stored, for `jpg` (h, w, 3) uint8, for `png` (h, w, 3) uint8 or, for grey,
        palette and 16-bit pictures, (h, w) of ids, for `mp4` (F, h, w, 3) uint8. For `json`, the parsed value.

    Raises:
        ShardError: The extension is refused, or the bytes do not decode.

    Example:
        >>> decode_member("info.json", b'{"fps": 12}')
        {'fps': 12}
    """
    extension = require_allowed(member, where)
    if extension == "npy":
        return view_npy(data, member, where).copy()
    if extension == "npy.gz":
        return _decode_npy_gz(data, member, where)
    if extension == "mp4":
        return decode_video(data, member, where)
    try:
        if extension == "json":
            return json.loads(bytes(data))
        return _decode_picture(data, "PNG" if extension == "png" else "JPEG")
    except Exception as error:
        raise ShardError(
            f"Expected {_place(member, where)} to be a readable {extension} file, but decoding failed ({error}). The "
            "member is damaged: copy or build the shard again."
        ) from error


def decode_video(
    data: bytes | memoryview, member: str, where: str = "", *, start: int = 0, stride: int = 1, count: int | None = None
) -> np.ndarray:
    """Decode frames of an mp4 member; decoding stops after the last frame that is asked for.

    Args:
        data: The member's bytes.
        member: Member name, for the message.
        where: Shard and key, for the message.
        start: First frame.
        stride: Distance between frames, in frames.
        count: Number of frames; `None` means all from `start`.

    Returns:
        Frames (F, h, w, 3) uint8; fewer than `count` when the video ends early.

    Raises:
        ShardError: PyAV is not installed, or the bytes do not decode.

    Example:
        >>> decode_video(b"no video", "video.mp4", "train-000000.tar, key 7")
        Traceback (most recent call last):
        ssync_pl.errors.ShardError: Expected member `video.mp4` of train-000000.tar, key 7 ...
    """
    av = _require_av(member, where)
    frames: list[np.ndarray] = []
    try:
        with av.open(io.BytesIO(bytes(data)), format="mp4") as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number >= start and (number - start) % stride == 0:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if count is not None and len(frames) == count:
                    break
    except Exception as error:
        raise _bad_video(member, where, error) from error
    return np.stack(frames) if frames else np.zeros((0, 0, 0, 3), np.uint8)


def count_video_frames(data: bytes | memoryview, member: str, where: str = "") -> int:
    """Count the frames of an mp4 member: from its header where it says, else by decoding.

    Args:
        data: The member's bytes.
        member: Member name, for the message.
        where: Shard and key, for the message.

    Returns:
        Number of frames.

    Raises:
        ShardError: PyAV is not installed, or the bytes do not decode.

    Example:
        >>> count_video_frames(b"no video", "video.mp4", "train-000000.tar, key 7")
        Traceback (most recent call last):
        ssync_pl.errors.ShardError: Expected member `video.mp4` of train-000000.tar, key 7 ...
    """
    av = _require_av(member, where)
    try:
        with av.open(io.BytesIO(bytes(data)), format="mp4") as container:
            stream = container.streams.video[0]
            return int(stream.frames) or sum(1 for _ in container.decode(stream))
    except Exception as error:
        raise _bad_video(member, where, error) from error


def read_gz_npy_header(data: bytes | memoryview, member: str, where: str = "") -> NpyHeader:
    """Parse the header of a `.npy.gz` member, decompressing only its start.

    Args:
        data: The compressed member.
        member: Member name, for the message.
        where: Shard and key, for the message.

    Returns:
        Shape, order, type and where the elements start in the decompressed bytes.

    Raises:
        ShardError: The bytes are no gzip stream or no NPY header.

    Example:
        >>> buffer = io.BytesIO()
        >>> np.save(buffer, np.zeros((2, 3), np.uint8))
        >>> read_gz_npy_header(gzip.compress(buffer.getvalue()), "video.npy.gz").shape
        (2, 3)
    """
    try:
        head = zlib.decompressobj(wbits=31).decompress(bytes(data[:_HEADER_BYTES]), _HEADER_BYTES)
    except zlib.error as error:
        raise _bad_gzip(member, where, error) from error
    return read_npy_header(head, member, where)


def _plain_header(stream: io.BytesIO, version: tuple[int, int]) -> tuple[tuple[int, ...], bool, np.dtype[Any]] | None:
    # NumPy evaluates the header as Python source, which takes longer than to read a clip, and fails at random where
    # the garbage collector strikes in the middle of it (CPython 3.11). Headers that NumPy itself writes need no such
    # thing; all others are left to NumPy.
    start = stream.tell()
    size = int.from_bytes(stream.read(2 if version == (1, 0) else 4), "little")
    text = stream.read(size)
    found = _PLAIN_HEADER.fullmatch(text) if version in ((1, 0), (2, 0)) and len(text) == size else None
    if found is None:
        stream.seek(start)
        return None
    shape = tuple(int(number) for number in found["shape"].split(b",") if number.strip())
    return shape, found["order"] == b"True", np.dtype(found["descr"].decode("ascii"))


def _decode_npy_gz(data: bytes | memoryview, member: str, where: str) -> np.ndarray:
    header = read_gz_npy_header(data, member, where)
    expected = header.data_offset + header.nbytes
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(bytes(data))) as stream:
            plain = stream.read(expected + 1)  # one more byte than expected shows surplus bytes without reading a bomb
    except (OSError, EOFError, zlib.error) as error:
        raise _bad_gzip(member, where, error) from error
    return view_npy(plain, member, where)


def _require_av(member: str, where: str) -> Any:
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise ShardError(
            f"Expected PyAV to be installed for {_place(member, where)}, but it is missing. Run "
            '`pip install "ssync-pl[video]"`, or store the videos as `.npy`.'
        ) from error


def _bad_video(member: str, where: str, error: Exception) -> ShardError:
    return ShardError(
        f"Expected {_place(member, where)} to be a readable mp4 file, but decoding failed ({error}). The member is "
        "damaged: copy or build the shard again."
    )


def _bad_gzip(member: str, where: str, error: Exception) -> ShardError:
    return ShardError(
        f"Expected {_place(member, where)} to be a whole gzip stream, but got a damaged one ({error}). The member is "
        "damaged or only half written: copy or build the shard again."
    )


def _decode_picture(data: bytes | memoryview, kind: str) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(bytes(data)), formats=[kind]) as picture:
        # Grey and palette pictures are id maps: a conversion to colour would change the ids.
        if kind == "PNG" and picture.mode in ("1", "L", "P", "I", "I;16"):
            return np.array(picture)
        return np.array(picture.convert("RGB"))


def _place(member: str, where: str) -> str:
    return f"member `{member}` of {where}" if where else f"member `{member}`"
