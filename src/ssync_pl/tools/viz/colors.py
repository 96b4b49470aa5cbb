"""Arrays of labels, regions and normalised frames turned into RGB bytes."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssync_pl.errors import ShapeError

__all__ = [
    "REGION_COLORS",
    "color_labels",
    "color_regions",
    "label_masks",
    "overlay_labels",
    "resize_nearest",
    "slot_colors",
    "to_uint8",
]

Bytes = NDArray[np.uint8]

_PALETTE = (
    (230, 25, 75),
    (60, 180, 75),
    (67, 99, 216),
    (255, 225, 25),
    (245, 130, 49),
    (145, 30, 180),
    (66, 212, 244),
    (240, 50, 230),
    (154, 99, 36),
    (250, 190, 212),
    (0, 128, 128),
    (191, 239, 69),
    (128, 0, 0),
    (170, 255, 195),
    (0, 0, 117),
    (255, 216, 177),
)
_GOLDEN_ANGLE = 0.6180339887498949
_BACKGROUND = (70, 70, 70)

REGION_COLORS: dict[str, tuple[int, int, int]] = {
    "boundary": (255, 140, 0),
    "interior": (30, 110, 220),
    "both": (225, 60, 170),
    "neither": (35, 35, 35),
}
"""Colours of the patches that `ssync_pl.tools.viz.color_regions` tells apart."""


def slot_colors(count: int) -> Bytes:
    """Return one colour a slot; slot k has the same colour whatever the count.

    Args:
        count: Number of slots, at least 0.

    Returns:
        uint8 array (count, 3), RGB.

    Example:
        >>> slot_colors(2).tolist()
        [[230, 25, 75], [60, 180, 75]]
        >>> bool((slot_colors(40)[:16] == slot_colors(16)).all())
        True
    """
    colors = [*_PALETTE[:count]]
    for index in range(len(_PALETTE), count):
        lap = (index - len(_PALETTE)) * _GOLDEN_ANGLE % 1.0
        value = 0.95 if index % 2 else 0.6
        red, green, blue = colorsys.hsv_to_rgb(lap, 0.75, value)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return np.array(colors, dtype=np.uint8).reshape(-1, 3)


def color_labels(labels: NDArray[Any], *, background: int | None = None) -> Bytes:
    """Paint each label in its slot's colour.

    Args:
        labels: Integers (..., H, W). Negative values mean "no label" and become black.
        background: A label to be painted grey, e.g. channel 0 of the truth. None paints all labels alike.

    Returns:
        uint8 array (..., H, W, 3), RGB.

    Raises:
        TypeError: The labels are not integers.

    Example:
        >>> color_labels(np.array([[0, 1, -1]]), background=0)[0].tolist()
        [[70, 70, 70], [60, 180, 75], [0, 0, 0]]
    """
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"Expected argument `labels` to hold integers, but got {labels.dtype}. Pass argmax over slots.")
    count = int(labels.max()) + 1 if labels.size else 0
    table = np.vstack([slot_colors(count), np.zeros((1, 3), dtype=np.uint8)])
    if background is not None and 0 <= background < count:
        table[background] = _BACKGROUND
    return table[np.where(labels < 0, count, labels)]


def label_masks(masks: NDArray[Any]) -> NDArray[np.int64]:
    """Turn one-hot masks into labels; places without any mask become -1.

    Args:
        masks: bool array (..., C, H, W). Where masks overlap, the first channel wins.

    Returns:
        int64 array (..., H, W) with values from -1 to C-1.

    Example:
        >>> label_masks(np.array([[[True, False, False]], [[False, True, False]]])).tolist()
        [[0, 1, -1]]
    """
    masks = masks.astype(bool)
    if masks.shape[-3] == 0:
        return np.full((*masks.shape[:-3], *masks.shape[-2:]), -1, dtype=np.int64)
    return np.where(masks.any(axis=-3), masks.argmax(axis=-3), -1).astype(np.int64)


def color_regions(boundary: NDArray[np.bool_], interior: NDArray[np.bool_]) -> Bytes:
    """Paint the patches where SSync's two terms are active.

    Args:
        boundary: bool array (..., H, W), patches of the boundary term.
        interior: bool array (..., H, W), patches of the interior term.

    Returns:
        uint8 array (..., H, W, 3), RGB in `REGION_COLORS`: boundary, interior, both and neither.

    Raises:
        ShapeError: The two shapes differ.

    Example:
        >>> color_regions(np.array([[True, False]]), np.array([[True, False]]))[0].tolist()
        [[225, 60, 170], [35, 35, 35]]
    """
    if boundary.shape != interior.shape:
        raise ShapeError(
            f"Expected argument `interior` to have the shape of `boundary`, {boundary.shape}, but got {interior.shape}."
        )
    table = np.array([REGION_COLORS[k] for k in ("neither", "boundary", "interior", "both")], dtype=np.uint8)
    return table[boundary.astype(np.int64) + 2 * interior.astype(np.int64)]


def resize_nearest(images: NDArray[Any], size: tuple[int, int], *, channels_last: bool = True) -> NDArray[Any]:
    """Resize by taking the nearest pixel: no new labels or colours appear.

    Args:
        images: Array (..., H, W, C), or (..., H, W) with `channels_last=False`.
        size: Height and width to reach, in pixels.
        channels_last: Whether the last axis holds colours.

    Returns:
        Array of the same dtype (..., height, width[, C]).

    Example:
        >>> resize_nearest(np.array([[1, 2]]), (1, 4), channels_last=False).tolist()
        [[1, 1, 2, 2]]
    """
    row_axis = images.ndim - (3 if channels_last else 2)
    for axis, length in zip((row_axis, row_axis + 1), size, strict=True):
        source = images.shape[axis]
        index = ((np.arange(length) + 0.5) * source / length).astype(np.int64)
        images = np.take(images, index, axis=axis)
    return images


def overlay_labels(frames: Bytes, labels: NDArray[Any], *, alpha: float = 0.55, background: int | None = None) -> Bytes:
    """Blend coloured labels over frames.

    Args:
        frames: uint8 array (..., H, W, 3), RGB.
        labels: Integers (..., h, w), enlarged to H x W by nearest pixel. Negative labels leave the frame as it is.
        alpha: Weight of the colours, from 0 to 1.
        background: A label that leaves the frame as it is, e.g. channel 0 of the truth.

    Returns:
        uint8 array (..., H, W, 3).

    Example:
        >>> grey = np.full((1, 2, 3), 100, dtype=np.uint8)
        >>> overlay_labels(grey, np.array([[0, -1]]), alpha=0.5)[0].tolist()
        [[165, 62, 88], [100, 100, 100]]
    """
    height, width = frames.shape[-3:-1]
    labels = resize_nearest(labels, (height, width), channels_last=False)
    hidden = labels < 0
    if background is not None:
        hidden |= labels == background
    mixed = np.rint((1.0 - alpha) * frames + alpha * color_labels(labels)).astype(np.uint8)
    return np.where(hidden[..., None], frames, mixed)


def to_uint8(video: NDArray[Any], mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Bytes:
    """Turn normalised frames into RGB bytes.

    Args:
        video: Float array (..., 3, H, W).
        mean: Mean a channel that normalisation subtracted, in [0, 1] units.
        std: Standard deviation a channel that it divided by. Without mean and std the 1st and 99th percentiles
            of the values become black and white, so that a picture is readable whatever the normalisation.

    Returns:
        uint8 array (..., H, W, 3).

    Raises:
        ShapeError: The channel axis does not hold 3 channels.

    Example:
        >>> to_uint8(np.zeros((3, 1, 1)), mean=(0.5, 0.5, 1.0), std=(0.5, 0.5, 0.5)).tolist()
        [[[128, 128, 255]]]
    """
    if video.ndim < 3 or video.shape[-3] != 3:
        raise ShapeError(f"Expected argument `video` to be (..., 3, H, W), but got {tuple(video.shape)}.")
    frames = np.moveaxis(np.nan_to_num(video.astype(np.float64)), -3, -1)
    if mean is not None and std is not None:
        frames = frames * np.asarray(std) + np.asarray(mean)
    else:
        low, high = np.percentile(frames, (1.0, 99.0))
        frames = (frames - low) / max(high - low, 1e-6)
    return np.rint(np.clip(frames, 0.0, 1.0) * 255.0).astype(np.uint8)
