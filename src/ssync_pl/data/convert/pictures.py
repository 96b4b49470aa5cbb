"""Frames and id masks from picture files, and their sizes in the shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from ssync_pl.errors import ShardError

__all__ = [
    "PICTURE_EXTENSIONS",
    "Resample",
    "natural_key",
    "read_ids",
    "read_picture",
    "resize_frame",
    "resize_ids",
    "short_side_size",
    "to_rgb",
]

PICTURE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp")
"""Files that are taken for frames."""

Resample = Literal["bicubic", "bilinear", "nearest"]

_FORMATS = ("JPEG", "PNG", "BMP")
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key that takes digits for numbers: `frame2` comes before `frame10`.

    Args:
        name: A file name.

    Returns:
        The key; different names have different keys.

    Example:
        >>> sorted(["f10.png", "f2.png", "f02.png"], key=natural_key)
        ['f02.png', 'f2.png', 'f10.png']
    """
    parts = re.split(r"([0-9]+)", name.lower())
    return (*(int(part) if number % 2 else part for number, part in enumerate(parts)), name)


def short_side_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """Size of the same proportions with a given short side; the long side is rounded down, as in published shards.

    Args:
        size: Height and width.
        short_side: Pixels of the shorter side, or None to keep the size.

    Returns:
        Height and width.

    Example:
        >>> short_side_size((720, 1280), 320)
        (320, 568)
    """
    if short_side is None:
        return size
    height, width = size
    if height <= width:
        return short_side, max(short_side, width * short_side // height)
    return max(short_side, height * short_side // width), short_side


def resize_frame(frame: np.ndarray, size: tuple[int, int], resample: Resample = "bicubic") -> np.ndarray:
    """Resize one frame.

    Args:
        frame: (h, w, 3) uint8.
        size: Height and width of the result.
        resample: `bicubic` and `bilinear` are Pillow's, anti-aliased when the frame shrinks; `nearest` takes the pixel
            under each target pixel's centre ("nearest-exact").

    Returns:
        (H, W, 3) uint8.

    Example:
        >>> resize_frame(np.zeros((4, 6, 3), np.uint8), (2, 3)).shape
        (2, 3, 3)
    """
    if frame.shape[:2] == size:
        return frame
    if resample == "nearest":
        return resize_ids(frame, size)
    return np.asarray(Image.fromarray(frame).resize(size[::-1], _FILTERS[resample]))


def resize_ids(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize masks or ids to the nearest pixel, the one under each target pixel's centre.

    Args:
        ids: (h, w, ...), any dtype.
        size: Height and width of the result.

    Returns:
        (H, W, ...), same dtype.

    Example:
        >>> resize_ids(np.array([[1, 2]]), (1, 4))
        array([[1, 1, 2, 2]])
    """
    if ids.shape[:2] == size:
        return ids
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, ids.shape, strict=False))
    return ids[rows[:, None], columns]


def to_rgb(picture: Image.Image, where: str) -> np.ndarray:
    """Turn a picture of any mode into RGB bytes: transparency over black, 16-bit grey by its upper byte.

    Args:
        picture: A loaded picture.
        where: Its name, for the message.

    Returns:
        (h, w, 3) uint8.

    Raises:
        ShardError: The picture holds fractions or numbers without a known range.

    Example:
        >>> to_rgb(Image.new("RGBA", (2, 1), (200, 100, 0, 0)), "a picture").tolist()
        [[[0, 0, 0], [0, 0, 0]]]
    """
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and picture.format == "PNG"):
        # PNG knows no integers of more than 16 bits; Pillow would clip them at 255.
        grey = (np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if mode in ("I", "F"):
        raise ShardError(
            f"Expected {where} to be a picture of 8 or 16 bits a channel, but got mode {mode!r}. Convert it to RGB."
        )
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        over = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over)
    return np.array(picture.convert("RGB"))


def read_picture(path: Path, where: str, *, upright: bool = False) -> np.ndarray:
    """Read one frame.

    Args:
        path: A jpg, png or bmp file.
        where: What the frame belongs to, for the message.
        upright: Turn it as its EXIF orientation says. Leave it off where masks count stored pixels.

    Returns:
        (h, w, 3) uint8.

    Raises:
        ShardError: The file is missing, empty, damaged or no picture.

    Example:
        >>> read_picture(Path("none.jpg"), "video 7")
        Traceback (most recent call last):
        ssync_pl.errors.ShardError: Expected frame none.jpg of video 7 to be there, but it is missing. ...
    """
    place = f"frame {path} of {where}"
    with _opened(path, place) as picture:
        return _load(lambda: to_rgb(ImageOps.exif_transpose(picture) if upright else picture, place), place)


def read_ids(path: Path, where: str) -> np.ndarray:
    """Read one id mask: a grey or palette picture, whose stored numbers are the ids.

    Args:
        path: A png or bmp file.
        where: What the mask belongs to, for the message.

    Returns:
        (h, w) uint8 or, for 16-bit pictures, int64.

    Raises:
        ShardError: The file is missing, damaged or a colour picture.

    Example:
        >>> read_ids(Path("none.png"), "video 7")
        Traceback (most recent call last):
        ssync_pl.errors.ShardError: Expected mask none.png of video 7 to be there, but it is missing. ...
    """
    place = f"mask {path} of {where}"
    with _opened(path, place) as picture:
        if picture.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise ShardError(
                f"Expected {place} to be a grey or palette picture whose numbers are object ids, but got a picture of "
                f"mode {picture.mode!r}. Save the ids as a grey or palette PNG."
            )
        ids = _load(lambda: np.array(picture), place)
    return ids.astype(np.uint8 if ids.dtype.itemsize == 1 else np.int64)


def _opened(path: Path, place: str) -> Image.Image:
    try:
        return Image.open(path, formats=_FORMATS)
    except FileNotFoundError as error:
        raise ShardError(
            f"Expected {place} to be there, but it is missing. Download or unpack the set again."
        ) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _damaged(place, path, error) from error


def _load(work: Any, place: str) -> Any:
    try:
        return work()
    except ShardError:
        raise
    except Exception as error:  # Pillow's plug-ins raise almost anything on damaged bytes
        raise _damaged(place, None, error) from error


def _damaged(place: str, path: Path | None, error: BaseException) -> ShardError:
    empty = path is not None and path.is_file() and path.stat().st_size == 0
    got = "an empty file" if empty else f"a damaged one ({error})"
    return ShardError(
        f"Expected {place} to be a whole jpg, png or bmp picture, but got {got}. Download, unpack or export it again."
    )
