"""Decoding of shard members by an allow-list: arrays, pictures, mp4 and JSON; nothing that can execute code.

`webdataset`'s default `.decode()` unpickles `.pyd`, `.pkl` and `.pth` members, so this package never calls it.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import importlib
import io
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ssync_pl.errors import ConfigError, ShardError, require_shard

ALLOWED_EXTENSIONS = ("npy", "npy.gz", "jpg", "jpeg", "png", "mp4", "json")
"""Extensions that can be decoded; all others are refused."""

MAX_MEMBER_BYTES = 1 << 30
"""Most bytes of one member, as it is stored and as it is decoded; `ShardDataModule(max_member_bytes=...)` raises it."""

HEADER_BYTES = 1 << 14
"""Bytes from the start of an array that hold its header; NumPy itself refuses headers of more than 10,000."""

EXECUTABLE_EXTENSIONS = ("pyd", "pkl", "pickle", "pth", "pt", "ckpt", "joblib", "dill", "py", "so")
"""Extensions of members that can execute code when they are loaded."""

Data = bytes | bytearray | memoryview
# What a file may be, whatever its name says: no playlists, which name other files or addresses.
_CONTAINERS = "gif,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,ogg,flv,asf"


class NpyHeader(NamedTuple):
    """What the first bytes of a `.npy` member say: `data_offset` is where the elements start, in bytes."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    data_offset: int

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take."""
        return math.prod(self.shape) * self.dtype.itemsize


def member_extension(member: str) -> str:
    """Returns the extension that decides how a member is decoded, in lower case: `npy`, `npy.gz`, or empty."""
    parts = member.lower().split(".")
    if len(parts) > 2 and parts[-1] == "gz":
        return ".".join(parts[-2:])
    return parts[-1] if len(parts) > 1 else ""


def require_allowed(member: str, where: str = "") -> str:
    """Returns the extension of a member, or raises `ShardError` when it is not one of `ALLOWED_EXTENSIONS`."""
    extension = member_extension(member)
    why = "can execute code when it is loaded" if extension in EXECUTABLE_EXTENSIONS else "is not on the allow-list"
    advice = "Write the member as `.npy` or `.json` and build the shard again."
    expected = f"{_place(member, where)} to be one of {', '.join(ALLOWED_EXTENSIONS)}"
    require_shard(extension in ALLOWED_EXTENSIONS, expected, f"`.{extension}`, which {why}", advice=advice)
    return extension


def require_size(size: int, what: str, max_bytes: int = MAX_MEMBER_BYTES) -> None:
    """Raises `ShardError` when something takes more than `max_bytes` bytes; called before the memory is taken."""
    advice = "If it is no damaged or malicious member, raise `max_member_bytes`."
    require_shard(size <= max_bytes, f"{what} to take at most {max_bytes} bytes", size, advice=advice)


def read_npy_header(data: Data, member: str, where: str = "", max_bytes: int = MAX_MEMBER_BYTES) -> NpyHeader:
    """Parses the header of a `.npy` or `.npy.gz` member without touching its elements."""
    place = _place(member, where)
    head = bytes(data[:HEADER_BYTES])
    try:
        if member_extension(member) == "npy.gz":
            head = zlib.decompressobj(wbits=31).decompress(head, HEADER_BYTES)
        start = 10 if head[6:7] == b"\x01" else 12
        header = _parse_header(head[: start + int.from_bytes(head[8:start], "little")])
    except Exception as error:
        raise _damaged(place, "a whole array with an NPY header (version 1.0 or 2.0)", error) from error
    got = "an array of Python objects, which can execute code when it is loaded"
    advice = "Save the array with a numeric dtype."
    require_shard(not header.dtype.hasobject, f"{place} to hold numbers", got, advice=advice)
    if header.dtype.itemsize < 1 or len(header.shape) > 32 or min(header.shape, default=0) < 0:
        raise _damaged(place, "an array", f"shape {header.shape}, dtype {header.dtype} in its header")
    # An empty dimension does not excuse the others.
    require_size(math.prod(max(n, 1) for n in header.shape) * header.dtype.itemsize, f"the array of {place}", max_bytes)
    return header


def require_elements(header: NpyHeader, found: int, place: str) -> None:
    """Raises `ShardError` unless an array member holds as many bytes of elements as its header says."""
    expected = f"{place} to hold {header.nbytes} bytes of elements for shape {header.shape}, dtype {header.dtype}"
    advice = "The member is only half written: copy or build the shard again."
    require_shard(found == header.nbytes, expected, found, advice=advice)


def view_npy(data: Data, member: str, where: str = "", max_bytes: int = MAX_MEMBER_BYTES) -> np.ndarray:
    """Views a whole `.npy` member as a read-only array, without a copy."""
    header = read_npy_header(data, member, where, max_bytes)
    require_elements(header, len(data) - header.data_offset, _place(member, where))
    flat = np.frombuffer(data, dtype=header.dtype, count=math.prod(header.shape), offset=header.data_offset)
    view = flat.reshape(header.shape[::-1]).T if header.fortran_order else flat.reshape(header.shape)
    view.flags.writeable = False
    return view


def decode_member(member: str, data: Data, where: str = "", max_bytes: int = MAX_MEMBER_BYTES) -> Any:
    """Decodes one member by its extension, or raises `ShardError`.

    Returns an array as stored for `npy` and `npy.gz`; uint8 (h, w, 3) for pictures, but ids (h, w) for pictures that
    are called `segmentations`; uint8 (F, h, w, 3) for `mp4`; the parsed value for `json`.
    """
    extension = require_allowed(member, where)
    place = _place(member, where)
    require_size(len(data), place, max_bytes)
    if extension == "npy":
        return view_npy(data, member, where, max_bytes)
    if extension == "npy.gz":
        header = read_npy_header(data, member, where, max_bytes)
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
                # One byte more than expected shows surplus bytes without unpacking all of them.
                plain = stream.read(header.data_offset + header.nbytes + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(place, "a whole gzip stream", error) from error
        return view_npy(plain, member.removesuffix(".gz"), where, max_bytes)
    if extension == "mp4":
        frames: list[np.ndarray] = []
        for frame in decode_video(data, place, max_bytes=max_bytes):
            require_size((len(frames) + 1) * frame.nbytes, f"the frames of {place}", max_bytes)
            frames.append(frame)
        return np.stack(frames)
    if extension == "json":
        return parse_json(data, place)
    kind = ("PNG",) if extension == "png" else ("JPEG",)
    return decode_picture(data, place, ids=member.startswith("segmentations"), formats=kind, max_bytes=max_bytes)


def parse_json(data: Data | str, where: str, kind: type = object) -> Any:
    """Parses JSON from a file or member; raises `ShardError` for damaged, deeply nested or other values than `kind`."""
    try:
        value = json.loads(data if isinstance(data, str) else bytes(data))
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__}, not a {kind.__name__}")
    except (ValueError, RecursionError) as error:
        raise _damaged(where, "JSON", error) from error
    return value


def decode_picture(
    source: Data | str | os.PathLike[str],
    where: str,
    *,
    ids: bool = False,
    formats: Sequence[str] = ("JPEG", "PNG", "BMP"),
    max_bytes: int = MAX_MEMBER_BYTES,
) -> np.ndarray:
    """Decodes one picture from its bytes or its path to uint8 (h, w, 3), turned as its EXIF orientation says.

    With `ids`, returns the stored numbers of a grey or palette picture (h, w): uint8, or int64 above 8 bits.
    """
    from PIL import Image, ImageOps

    opened: Any = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
    try:
        with Image.open(opened, formats=list(formats)) as picture:
            require_size(3 * picture.width * picture.height, f"the pixels of {where}", max_bytes)
            if not ids:
                return to_rgb(ImageOps.exif_transpose(picture), where)
            grey = picture.mode in ("1", "L", "P", "I", "I;16", "I;16B")
            expected = f"{where} to be a grey or palette picture whose numbers are object ids"
            require_shard(grey, expected, f"mode {picture.mode!r}", advice="Save the ids as a grey or palette PNG.")
            numbers = np.array(picture)
            return numbers.astype(np.uint8 if numbers.dtype.itemsize == 1 else np.int64)
    except (ShardError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise _damaged(where, "a file that is there", "none") from error
    except Exception as error:  # Pillow's plug-ins raise almost anything on damaged bytes
        raise _damaged(where, f"a whole picture ({', '.join(formats)})", _or_empty(source, error)) from error


def to_rgb(picture: Any, where: str) -> np.ndarray:
    """Turns a Pillow picture of any mode into RGB bytes: transparency over black, 16-bit grey by its upper byte."""
    from PIL import Image

    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and picture.format == "PNG"):
        # PNG knows no integers of more than 16 bits; Pillow would clip them at 255.
        grey = (np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    expected = f"{where} to be a picture of 8 or 16 bits per channel"
    require_shard(mode not in ("I", "F"), expected, f"mode {mode!r}", advice="Convert it to RGB.")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        over = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over)
    return np.array(picture.convert("RGB"))


@contextlib.contextmanager
def open_video(
    source: Data | str | os.PathLike[str], where: str, max_bytes: int = MAX_MEMBER_BYTES
) -> Iterator[tuple[Any, Any]]:
    """Opens a video with PyAV as (container, video stream); every error of PyAV inside becomes a `ShardError`.

    `source` is the bytes of an mp4 file, or the path of a video file, which is never taken for an address.
    """
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        raise ConfigError(
            f"Expected PyAV to be installed to read {where}, but it is missing. Run "
            '`pip install "ssync-pl[video]"`, or store the videos as arrays or folders of frames.'
        ) from error
    try:
        if isinstance(source, (bytes, bytearray, memoryview)):
            container = av.open(io.BytesIO(source), format="mp4")
        else:
            options = {"protocol_whitelist": "file", "format_whitelist": _CONTAINERS}
            container = av.open(f"file:{os.fspath(source)}", options=options)
        with container:
            found = bool(container.streams.video)
            require_shard(found, f"{where} to hold a video stream", "none", advice="Take it out of the set.")
            stream = container.streams.video[0]
            require_size(3 * (stream.width or 0) * (stream.height or 0), f"a frame of {where}", max_bytes)
            yield container, stream
    except (ShardError, ConfigError, MemoryError):
        raise
    except Exception as error:
        raise _damaged(where, "a whole video file", _or_empty(source, error)) from error


def count_frames(source: Data | str | os.PathLike[str], where: str) -> int:
    """Counts the frames that a video really holds and shows, whatever its header says; nothing is decoded as a rule."""
    with open_video(source, where) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size]
        if packets and packets[0].is_keyframe:
            return sum(not packet.is_discard for packet in packets)
    return sum(1 for _ in decode_video(source, where))  # frames before the first key frame cannot be decoded


def decode_video(
    source: Data | str | os.PathLike[str],
    where: str,
    frames: range | None = None,
    *,
    stamp: int | None = None,
    max_bytes: int = MAX_MEMBER_BYTES,
) -> Iterator[np.ndarray]:
    """Decodes frames, uint8 (h, w, 3) each, as a player shows them: turned and mirrored by the display matrix, without
    what an edit list cuts off, transparency over black.

    Args:
        source: Bytes of an mp4 file, or the path of a video file.
        where: What it is, for messages.
        frames: Numbers of the wanted frames, rising; `None` for all.
        stamp: The container's time stamp of the first wanted frame, to seek to; `None` decodes from the start.
        max_bytes: Most bytes of one frame.
    """
    size: tuple[int, ...] | None = None
    seen = 0
    for number, picture in _numbered_frames(source, where, frames, stamp, max_bytes):
        require_size(3 * picture.width * picture.height, f"frame {number} of {where}", max_bytes)
        seen = number + 1
        if frames is None or number in frames:
            frame = _shown(picture, where, number)
            size = size or frame.shape
            expected = f"all frames of {where} to have one size, {size[0]} x {size[1]} (height x width)"
            got = f"{frame.shape[0]} x {frame.shape[1]} in frame {number}"
            require_shard(frame.shape == size, expected, got, advice="Split the video there.")
            yield frame
        if frames is not None and number >= frames[-1]:
            return
    if frames is not None or not seen:
        need = f"at least {frames[-1] + 1} frames" if frames else "frames"
        advice = "The file is damaged or cut off: copy or encode it again, or take fewer frames."
        require_shard(False, f"{where} to have {need}", f"only {seen} that can be decoded", advice=advice)


def _numbered_frames(
    source: Any, where: str, frames: range | None, stamp: int | None, max_bytes: int
) -> Iterator[tuple[int, Any]]:
    if frames and frames[0] > 0 and stamp is not None:
        with open_video(source, where, max_bytes) as (container, stream):
            first = _seek(container, stream, stamp)
            if first is not None:
                yield frames[0], first
                yield from enumerate(container.decode(stream), frames[0] + 1)
                return
    with open_video(source, where, max_bytes) as (container, stream):
        yield from enumerate(container.decode(stream))


def _seek(container: Any, stream: Any, stamp: int) -> Any:
    """Returns the frame with this time stamp; `None` when the container cannot find it."""
    with contextlib.suppress(Exception):  # whatever a seek does, reading from the start decides
        container.seek(stamp, stream=stream)
        complete = False
        for frame in container.decode(stream):
            # Containers that seek by decoding time may land behind the frame, or before a key frame that it needs.
            if frame.pts is None or frame.pts > stamp:
                return None
            complete = complete or bool(frame.key_frame)
            if frame.pts == stamp:
                return frame if complete else None
    return None


def _shown(frame: Any, where: str, number: int) -> np.ndarray:
    """Returns a frame's pixels as a player shows them."""
    advice = "Copy or encode the file again."
    require_shard(not frame.is_corrupt, f"all frames of {where} to decode", f"damage in frame {number}", advice=advice)
    if any(part.is_alpha for part in frame.format.components):
        from PIL import Image

        array = to_rgb(Image.fromarray(frame.to_ndarray(format="rgba"), "RGBA"), where)
    else:
        array = frame.to_ndarray(format="rgb24")
    matrix = next((bytes(item) for item in frame.side_data if item.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return array
    # A pixel at (x, y) is shown at (a x + c y, b x + d y); ffmpeg's libavutil/display.h.
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    array = array.transpose(1, 0, 2) if turned else array
    across, down = (c, b) if turned else (a, d)
    return np.ascontiguousarray(array[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


@functools.lru_cache(maxsize=256)
def _parse_header(head: bytes) -> NpyHeader:
    # Cached, as NumPy evaluates the header as Python source, which takes longer than to read a clip.
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"NPY version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran_order, dtype = read(stream)
    except SystemError:  # CPython 3.11 fails at random where the garbage collector strikes while source is parsed
        stream.seek(8)
        shape, fortran_order, dtype = read(stream)
    return NpyHeader(tuple(int(n) for n in shape), bool(fortran_order), dtype, stream.tell())


def _or_empty(source: Any, error: Exception) -> Exception | str:
    empty = isinstance(source, (str, os.PathLike)) and os.path.isfile(source) and os.path.getsize(source) == 0
    return "an empty file" if empty else error


def _damaged(place: str, expected: str, got: Exception | str) -> ShardError:
    reason = got if isinstance(got, str) else f"a damaged one ({str(got).splitlines()[0] if str(got) else repr(got)})"
    return ShardError(f"Expected {place} to be {expected}, but got {reason}. Copy, export or build it again.")


def _place(member: str, where: str) -> str:
    return f"member `{member}` of {where}" if where else f"member `{member}`"
