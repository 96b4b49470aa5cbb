"""Masks as COCO stores them: run lengths, plain or compressed, polygons, and null."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssync_pl.errors import ConfigError, ShardError

__all__ = ["compress_counts", "decompress_counts", "segmentation_mask"]

_FIRST_CHARACTER = 48
_GROUP_BITS = 5
_MAX_GROUPS = 12  # 60 bits: the sum still fits an int64


def compress_counts(counts: Sequence[int] | np.ndarray) -> str:
    """Write run lengths as COCO's compressed string.

    From the fourth run on, the difference to the run two before is stored. Each number is cut into groups of five
    bits, lowest first, in two's complement; a group is one character from `0` on, with bit 5 set when more follow.

    Source: the run-length format of the COCO data set (https://cocodataset.org/#format-results).

    Args:
        counts: Lengths of the runs, unset pixels first.

    Returns:
        ASCII text.

    Raises:
        ShardError: A length is negative or no whole number.

    Example:
        >>> compress_counts([6, 1, 40, 4])
        '61X13'
    """
    left = _whole_numbers(counts, "the run lengths").copy()
    left[3:] -= left[1:-2].copy()
    characters = np.zeros((len(left), _MAX_GROUPS + 1), np.uint8)
    open_ = np.ones(len(left), np.bool_)
    for group in range(_MAX_GROUPS + 1):
        low = left & 31
        left = left >> _GROUP_BITS
        # The last group's top bit is the sign, so a number goes on until sign and rest agree.
        more = np.where(low & 16, left != -1, left != 0)
        characters[:, group] = np.where(open_, low + 32 * more + _FIRST_CHARACTER, 0)
        open_ &= more
        if not open_.any():
            break
    return characters[characters > 0].tobytes().decode("ascii")


def decompress_counts(text: str | bytes, where: str = "the mask") -> np.ndarray:
    """Read run lengths from COCO's compressed string; `compress_counts` describes it.

    Args:
        text: The string.
        where: What the mask belongs to, for the message.

    Returns:
        int64 lengths of the runs, unset pixels first.

    Raises:
        ShardError: The string holds other characters, ends within a number, or gives a negative length.

    Example:
        >>> decompress_counts("61X13").tolist()
        [6, 1, 40, 4]
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)
    if not raw:
        return np.zeros(0, np.int64)
    groups = np.frombuffer(raw, np.uint8).astype(np.int64) - _FIRST_CHARACTER
    last = groups & 32 == 0
    if groups.min() < 0 or groups.max() > 63 or not last[-1]:
        raise _bad_rle(where, f"the compressed string {_short(raw)}, which is cut off or holds other characters")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MAX_GROUPS:
        raise _bad_rle(where, f"the compressed string {_short(raw)}, with a number of more than 60 bits")
    shifts = _GROUP_BITS * (np.arange(len(groups)) - np.repeat(starts, lengths))
    counts = np.add.reduceat((groups & 31) << shifts, starts)
    counts -= np.where(groups[ends] & 16, np.int64(1) << (_GROUP_BITS * lengths), 0)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    if counts.min() < 0:
        raise _bad_rle(where, f"the compressed string {_short(raw)}, which gives a negative length")
    return counts


def segmentation_mask(segmentation: Any, size: tuple[int, int], where: str = "the mask") -> np.ndarray:
    """Draw one COCO segmentation.

    Run lengths need nothing but NumPy. Polygons are drawn by pycocotools, so that borders are the published ones to
    the pixel.

    Args:
        segmentation: `{"size": [h, w], "counts": list or string}`, a list of polygons `[[x0, y0, x1, y1, …], …]`, or
            None for an object that is not visible.
        size: Height and width of the video.
        where: What the mask belongs to, for the message.

    Returns:
        (h, w) uint8 of 0 and 1.

    Raises:
        ShardError: The segmentation is damaged or has another size.
        ConfigError: It is a polygon, and pycocotools is not installed.

    Example:
        >>> segmentation_mask({"size": [2, 3], "counts": [1, 2, 3]}, (2, 3))
        array([[0, 1, 0],
               [1, 0, 0]], dtype=uint8)
    """
    if segmentation is None or segmentation == []:
        return np.zeros(size, np.uint8)
    if isinstance(segmentation, list):
        return _draw_polygons(segmentation, size, where)
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        raise _bad_rle(where, f"{_short(segmentation)}")
    if list(segmentation["size"]) != list(size):
        raise ShardError(
            f"Expected {where} to have the video's height and width {list(size)}, but got {segmentation['size']}. "
            "Repair the annotation file."
        )
    counts = segmentation["counts"]
    if isinstance(counts, (str, bytes)):
        lengths = decompress_counts(counts, where)
    else:
        lengths = _whole_numbers(counts, where)
    pixels = math.prod(size)
    if lengths.sum() != pixels or (len(lengths) and lengths.max() > pixels):
        raise _bad_rle(where, f"runs of {lengths.sum()} pixels together instead of {size[0]} x {size[1]} = {pixels}")
    values = np.arange(len(lengths), dtype=np.uint8) & 1
    return np.ascontiguousarray(np.repeat(values, lengths).reshape(size[::-1]).T)  # columns first


def _draw_polygons(polygons: list[Any], size: tuple[int, int], where: str) -> np.ndarray:
    for polygon in polygons:
        numbers = isinstance(polygon, list) and all(
            isinstance(number, (int, float)) and math.isfinite(number) for number in polygon
        )
        # pycocotools takes four numbers for a box, and ignores an odd one at the end.
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            raise ShardError(
                f"Expected the polygons of {where} to be lists of at least three points [x0, y0, x1, y1, …], but got "
                f"{_short(polygon)}. Repair the annotation file."
            )
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ConfigError(
            f"Expected pycocotools to be installed, because {where} is a polygon, but it is missing. Run "
            '`pip install "ssync-pl[ytvis]"`.'
        ) from error
    merged = coco.merge(coco.frPyObjects(polygons, *size))
    return np.ascontiguousarray(coco.decode(merged), np.uint8)


def _whole_numbers(counts: Any, where: str) -> np.ndarray:
    try:
        array = np.asarray(counts)
    except ValueError as error:
        raise _bad_rle(where, _short(counts)) from error
    if array.ndim != 1 or (array.size and (array.dtype.kind not in "iu" or array.min() < 0)):
        raise _bad_rle(where, f"the run lengths {_short(counts)}")
    return array.astype(np.int64)


def _bad_rle(where: str, got: str) -> ShardError:
    return ShardError(
        f"Expected {where} to be a COCO segmentation (run lengths with `size` and `counts`, polygons, or null), but "
        f"got {got}. Repair the annotation file."
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
