"""Frames and id masks from picture files, and their sizes in the shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ssync_pl.data.decode import decode_picture

__all__ = [
    "PICTURE_EXTENSIONS",
    "Resample",
    "natural_key",
    "read_ids",
    "read_picture",
    "resize_frame",
    "resize_ids",
    "short_side_size",
]

PICTURE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp")
"""Files that are taken for frames."""

Resample = Literal["bicubic", "bilinear", "nearest"]

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
    return decode_picture(path, f"frame {path} of {where}", upright=upright)


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
    return decode_picture(path, f"mask {path} of {where}", ids=True)
