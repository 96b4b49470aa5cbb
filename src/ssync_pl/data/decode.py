"""Decoding by an allow-list: arrays, pictures, videos and JSON, of shards as of files; nothing that can execute code.

`webdataset`'s default `.decode()` unpickles `.pyd`, `.pkl` and `.pth` members, so this package never calls it.
"""

import contextlib
import functools
import gzip
import io
import itertools
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ssync_pl.errors import ShardError, SSyncError, require_packages, require_shard

ALLOWED_EXTENSIONS = ("npy", "npy.gz", "jpg", "jpeg", "png", "mp4", "json")
EXECUTABLE_EXTENSIONS = ("pyd", "pkl", "pickle", "pth", "pt", "ckpt", "joblib", "dill", "py", "so")
MAX_MEMBER_BYTES = 1 << 30  # stored and decoded; `ShardDataModule(max_member_bytes=...)` raises it
HEADER_BYTES = 1 << 14  # hold the header of an array; NumPy itself refuses headers of more than 10,000
Data = bytes | bytearray | memoryview
Source = Data | str | os.PathLike[str]  # the bytes of a file, or its path, which is never taken for an address
# What a file may be, whatever its name says: no playlists, which name other files or addresses.
_CONTAINERS = "gif,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,ogg,flv,asf"
# Containers that store when each frame is shown. AVI does not, and what is guessed for it is off by some frames.
_STAMPED = ("mp4", "matroska")
# Headers that count no frames say a duration, which some writers round.
_SLACK, _SLACK_SECONDS = 0.1, 0.25
_ROUNDING = 0.005  # seconds, of times in edit lists
_AGAIN = "Copy, export or build it again."


def member_extension(member: str) -> str:
    """Returns the extension that decides how a member is decoded, in lower case: `npy`, `npy.gz`, or empty."""
    parts = member.lower().split(".")
    return ".".join(parts[-2:] if len(parts) > 2 and parts[-1] == "gz" else parts[1:][-1:])


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


def decode_member(member: str, data: Data, where: str = "", max_bytes: int = MAX_MEMBER_BYTES) -> Any:
    """Decodes one member by its extension, or raises `ShardError`.

    Returns a read-only array as stored for `npy` and `npy.gz`; uint8 (h, w, 3) for pictures, but ids (h, w) for
    pictures that are called `segmentations`; uint8 (F, h, w, 3) for `mp4`; the parsed value for `json`.
    """
    extension, place = require_allowed(member, where), _place(member, where)
    require_size(len(data), place, max_bytes)
    if extension == "npy.gz":
        header = read_npy_header(data, member, where, max_bytes)
        with _named(place, "a whole gzip stream"), gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            # One byte more than expected shows surplus bytes without unpacking all of them.
            data = stream.read(header.data_offset + header.nbytes + 1)
    if extension in ("npy", "npy.gz"):
        header = read_npy_header(data, member.removesuffix(".gz"), where, max_bytes, len(data))
        flat = np.frombuffer(data, dtype=header.dtype, count=math.prod(header.shape), offset=header.data_offset)
        view = flat.reshape(header.shape[::-1]).T if header.fortran_order else flat.reshape(header.shape)
        view.flags.writeable = False  # nothing is copied
        return view
    if extension == "json":
        return parse_json(data, place)
    if extension == "mp4":
        frames, least = list[np.ndarray](), inspect_video(data, place, max_bytes).frames
        for frame in decode_video(data, place, least=least, max_bytes=max_bytes):
            require_size((len(frames) + 1) * frame.nbytes, f"the frames of {place}", max_bytes)
            frames.append(frame)
        return np.stack(frames)
    kind = ("PNG",) if extension == "png" else ("JPEG",)
    return decode_picture(data, place, ids=member.startswith("segmentations"), formats=kind, max_bytes=max_bytes)


def parse_json(data: Data | str, where: str, kind: type = object) -> Any:
    """Parses JSON from a file or member; raises `ShardError` for damaged, deeply nested or other values than `kind`."""
    with _named(where, "JSON"):
        value = json.loads(data if isinstance(data, str) else bytes(data))
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__}, not a {kind.__name__}")
        return value


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


def read_npy_header(
    data: Data, member: str, where: str = "", max_bytes: int = MAX_MEMBER_BYTES, size: int | None = None
) -> NpyHeader:
    """Parses the header of a `.npy` or `.npy.gz` member without touching its elements.

    With `size`, the bytes of the whole member, it also checks that a `.npy` member holds all elements and no more.
    """
    place, packed = _place(member, where), member_extension(member) == "npy.gz"
    head = bytes(data[:HEADER_BYTES])
    with _named(place, "a whole array with an NPY header (version 1.0 or 2.0)"):
        head = zlib.decompressobj(wbits=31).decompress(head, HEADER_BYTES) if packed else head
        start = 10 if head[6:7] == b"\x01" else 12
        try:
            header = _parse_header(head[: start + int.from_bytes(head[8:start], "little")])
        except MemoryError as error:  # of Python's parser
            raise ValueError("a header that is nested too deeply") from error
        shape, dtype = header.shape, header.dtype
        if not dtype.hasobject and (dtype.itemsize < 1 or len(shape) > 32 or min(shape, default=0) < 0):
            raise ValueError(f"shape {shape}, dtype {dtype} in its header")
    got = "an array of Python objects, which can execute code when it is loaded"
    require_shard(not dtype.hasobject, f"{place} to hold numbers", got, advice="Save it with a numeric dtype.")
    # An empty dimension does not excuse the others.
    require_size(math.prod(max(n, 1) for n in shape) * dtype.itemsize, f"the array of {place}", max_bytes)
    found = header.nbytes if size is None or packed else size - header.data_offset
    expected = f"{place} to hold {header.nbytes} bytes of elements for shape {shape}, dtype {dtype}"
    advice = "The member is only half written: copy or build the shard again."
    require_shard(found == header.nbytes, expected, found, advice=advice)
    return header


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


def decode_picture(
    source: Source,
    where: str,
    *,
    ids: bool = False,
    formats: Sequence[str] = ("JPEG", "PNG", "BMP"),
    max_bytes: int = 1 << 28,
) -> np.ndarray:
    """Decodes a picture to uint8 (h, w, 3), turned by its EXIF; with `ids` to its numbers (h, w), uint8 or int64."""
    from PIL import Image, ImageOps

    opened: Any = io.BytesIO(source) if isinstance(source, Data) else source
    with (
        _named(where, f"a whole picture ({', '.join(formats)})", source),
        Image.open(opened, formats=list(formats)) as picture,
    ):
        require_size(3 * picture.width * picture.height, f"the pixels of {where}", max_bytes)
        if not ids:
            ImageOps.exif_transpose(picture, in_place=True)
            return _to_rgb(picture, where)
        grey = picture.mode in ("1", "L", "P", "I", "I;16", "I;16B")
        expected = f"{where} to be a grey or palette picture whose numbers are object ids"
        require_shard(grey, expected, f"mode {picture.mode!r}", advice="Save the ids as a grey or palette PNG.")
        numbers = np.array(picture)
        return numbers.astype(np.uint8 if numbers.dtype.itemsize == 1 else np.int64)


def _to_rgb(picture: Any, where: str) -> np.ndarray:
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
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


class VideoFacts(NamedTuple):
    """What a video file says of itself, without decoding."""

    frames: int
    rate: float | None = None  # per second, on average; None where nothing says
    stamps: tuple[int, ...] | None = None  # of each frame, for seeking; None where they are missing or not unique


def inspect_video(source: Source, where: str, max_bytes: int = MAX_MEMBER_BYTES) -> VideoFacts:
    """Counts the frames that a video holds and shows, as a rule without decoding; `ShardError` unless it is whole."""
    shown: list[int | None] = []
    stored, cut = 0, False
    with _open_video(source, where, max_bytes) as (container, stream):
        ends = {stream.index: 0.0}
        for packet in filter(lambda packet: packet.size, container.demux()):
            place, cut = packet.stream.index, cut or packet.is_corrupt
            end = 0.0 if packet.pts is None else float((packet.pts + (packet.duration or 0)) * packet.time_base)
            ends[place] = max(end, ends.get(place, 0.0))
            if place == stream.index:
                stored += 1
                # An edit list cuts packets off, and some of VP8 are there only for other frames.
                hidden = packet.is_discard or (stream.codec_context.name == "vp8" and not bytes(packet)[0] & 16)
                shown += [] if hidden else [packet.pts]
        missing = _missing(source, container, stream, stored, ends) or ("its last packet ends early" if cut else None)
        rate = stream.average_rate or stream.guessed_rate
        exact = any(name in container.format.name for name in _STAMPED)
    require_shard(missing is None, f"{where} to be a whole video", f"a part: {missing}", advice=_AGAIN)
    require_shard(bool(shown), f"{where} to have frames", "none", advice=_AGAIN)
    stamps = tuple(sorted({stamp for stamp in shown if stamp is not None}))
    return VideoFacts(len(shown), rate and float(rate), stamps if exact and len(stamps) == len(shown) else None)


def _missing(source: Source, container: Any, stream: Any, count: int, ends: Mapping[int, float]) -> str | None:
    """Says what a file lacks by its own header, from frames found and each stream's end in seconds, if anything."""
    if container.format.name == "gif":
        with io.BytesIO(source) if isinstance(source, Data) else open(source, "rb") as file:
            file.seek(-min(9, file.seek(0, os.SEEK_END)), os.SEEK_END)
            whole = file.read().rstrip(b"\0").endswith(b"\0;")
        return None if whole else f"it ends after {count} frames without the mark of its end"
    if stream.frames:
        # An MP4 counts what its edit list cuts off, too: then all that the list shows has to be there.
        shown = float((stream.duration or math.inf) * stream.time_base) if "mp4" in container.format.name else math.inf
        whole = count >= stream.frames or ends[stream.index] >= shown - _ROUNDING
        return None if whole else f"its header says {stream.frames} frames and it ends after {count}"
    end, promised = max(ends.values()), (container.duration or 0) / 1e6
    if not ends[stream.index] or promised - end <= max(_SLACK_SECONDS, _SLACK * promised):
        return None
    return f"its header says {promised:.2f} seconds and it ends after {end:.2f}, {count} frames"


def decode_video(
    source: Source,
    where: str,
    frames: range | None = None,
    *,
    stamp: int | None = None,
    least: int = 1,
    max_bytes: int = MAX_MEMBER_BYTES,
) -> Iterator[np.ndarray]:
    """Decodes frames, uint8 (h, w, 3), as a player shows them; transparency is black.

    `frames` are the numbers of the wanted ones, rising; None takes all, at least `least`. `stamp` is the time stamp of
    the first one, to seek to. `max_bytes` limits one frame.
    """
    size: tuple[int, int] | None = None
    begin = seen = 0
    with _open_video(source, where, max_bytes) as (container, stream):
        pictures = _decoded(container, stream)
        if frames and frames[0] > 0 and stamp is not None:
            found = _seek(container, stream, stamp)
            if found is None:
                yield from decode_video(source, where, frames, max_bytes=max_bytes)
                return
            begin, pictures = frames[0], found
        for number, picture in enumerate(pictures, begin):
            require_size(3 * picture.width * picture.height, f"frame {number} of {where}", max_bytes)
            turned = _orientation(picture)[0]
            height, width = sides = (picture.width, picture.height) if turned else (picture.height, picture.width)
            size, seen = size or sides, number + 1
            expected = f"all frames of {where} to have one size, {size[0]} x {size[1]} (height x width)"
            got, advice = f"{height} x {width} in frame {number}", "Split the video there."
            require_shard(sides == size, expected, got, advice=advice)
            if frames is None or number in frames:
                yield _shown(picture, where, number)
            if frames is not None and number >= frames[-1]:
                return
    need = frames[-1] + 1 if frames else max(1, least)
    got, advice = f"only {seen} that can be decoded", f"{_AGAIN[:-1]}, or take fewer."
    require_shard(frames is None and seen >= need, f"{where} to have at least {need} frames", got, advice=advice)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Decodes all frames from here on, those of WebM with transparency by libvpx, as FFmpeg's own decoders drop it."""
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    if name is None or stream.metadata.get("alpha_mode") != "1":
        return iter(container.decode(stream))
    from av import CodecContext

    decoder: Any = CodecContext.create(name, "r")
    return itertools.chain.from_iterable(decoder.decode(packet) for packet in container.demux(stream))


def _seek(container: Any, stream: Any, stamp: int) -> Iterator[Any] | None:
    """Decodes from the frame with this time stamp on; `None` when the container cannot find it."""
    with contextlib.suppress(Exception):  # whatever a seek does, reading from the start decides
        container.seek(stamp, stream=stream)
        complete, pictures = False, _decoded(container, stream)
        for frame in pictures:
            # Containers that seek by decoding time may land behind the frame, or before a key frame that it needs.
            if frame.pts is None or frame.pts > stamp:
                return None
            complete = complete or bool(frame.key_frame)
            if frame.pts == stamp:
                return itertools.chain([frame], pictures) if complete else None
    return None


def _shown(frame: Any, where: str, number: int) -> np.ndarray:
    """Returns a frame's pixels as a player shows them."""
    require_shard(not frame.is_corrupt, f"all frames of {where} to decode", f"damage in frame {number}", advice=_AGAIN)
    if frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components):
        from PIL import Image

        array = _to_rgb(Image.fromarray(frame.to_ndarray(format="rgba"), "RGBA"), where)
    else:
        array = frame.to_ndarray(format="rgb24")
    turned, down, across = _orientation(frame)
    array = array.transpose(1, 0, 2) if turned else array
    return np.ascontiguousarray(array[::down, ::across])


def _orientation(frame: Any) -> tuple[bool, int, int]:
    """Says whether rows are shown as columns, and then the directions, 1 or -1, in which both are read."""
    from av.sidedata.sidedata import Type

    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return False, 1, 1
    # A pixel at (x, y) is shown at (a x + c y, b x + d y); ffmpeg's libavutil/display.h.
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    across, down = (c, b) if turned else (a, d)
    return turned, -1 if down < 0 else 1, -1 if across < 0 else 1


@contextlib.contextmanager
def _open_video(source: Source, where: str, max_bytes: int) -> Iterator[tuple[Any, Any]]:
    """Opens a video as (container, video stream); every error of PyAV inside becomes a `ShardError`."""
    require_packages("video", "av")
    import av
    from av.stream import Disposition

    with _named(where, "a whole video file", source):
        options = {"protocol_whitelist": "file", "format_whitelist": _CONTAINERS}
        with av.open(
            io.BytesIO(source) if isinstance(source, Data) else f"file:{source}", options=options
        ) as container:
            moving = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
            expected, got = f"{where} to be a whole video file", "one without a video stream"
            require_shard(bool(moving), expected, got, advice=_AGAIN)
            stream = moving[0]
            require_size(3 * (stream.width or 0) * (stream.height or 0), f"a frame of {where}", max_bytes)
            yield container, stream


@contextlib.contextmanager
def _named(where: str, expected: str, source: object = None) -> Iterator[None]:
    """Turns whatever decoders raise on damaged bytes into a `ShardError` that says what was expected."""
    path = source if isinstance(source, (str, os.PathLike)) else None
    plain = path is None or os.path.isfile(path) or not os.path.exists(path)
    require_shard(plain, f"{where} to be {expected}", "no plain file", advice=_AGAIN)  # a pipe may never end
    try:
        yield
    except SSyncError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) and not hasattr(error, "errno"):
            raise  # with a number it is of PyAV, which damaged headers ask for absurd sizes
        empty = path is not None and os.path.isfile(path) and not os.path.getsize(path)
        got = "an empty file" if empty else f"a damaged one ({(str(error) or repr(error)).splitlines()[0]})"
        raise ShardError(f"Expected {where} to be {expected}, but got {got}. {_AGAIN}") from error


def _place(member: str, where: str) -> str:
    return f"member `{member}` of {where}" if where else f"member `{member}`"
