"""Pictures of slots: colours, overlays and sheets of frames, as pure functions on NumPy arrays."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ssync_pl.errors import require_shape
from ssync_pl.tools.owned import PNG_MARK

Bytes = NDArray[np.uint8]

_PALETTE = bytes.fromhex(
    "e6194b 3cb44b 4363d8 ffe119 f58231 911eb4 42d4f4 f032e6 9a6324 fabed4 008080 bfef45 800000 aaffc3 000075 ffd8b1"
)
_GOLDEN_ANGLE = 0.6180339887498949
_BACKGROUND = (70, 70, 70)
_INK = (20, 20, 20)
_GAP, _MARGIN = 4, 10


def slot_colors(count: int) -> Bytes:
    """Returns one colour per slot, uint8 `(count, 3)`; slot k has the same colour whatever the count."""
    named = np.frombuffer(_PALETTE, dtype=np.uint8).reshape(-1, 3)
    more = [
        colorsys.hsv_to_rgb(index * _GOLDEN_ANGLE % 1.0, 0.75, 0.95 if index % 2 else 0.6)
        for index in range(count - len(named))
    ]
    return np.concatenate([named[:count], np.rint(255 * np.array(more).reshape(-1, 3)).astype(np.uint8)])


def color_labels(labels: NDArray[Any], *, background: int | None = None) -> Bytes:
    """Paints integer labels `(..., H, W)` in their slots' colours, negative ones black, the label `background` grey."""
    count = int(labels.max(initial=-1)) + 1
    table = np.vstack([slot_colors(count), np.zeros((1, 3), dtype=np.uint8)])
    if background is not None and 0 <= background < count:
        table[background] = _BACKGROUND
    return table[np.where(labels < 0, count, labels)]


def label_masks(masks: NDArray[Any]) -> NDArray[np.int64]:
    """Returns labels `(..., H, W)` of masks `(..., C, H, W)`: the first mask of each place, -1 without any."""
    none = np.ones((*masks.shape[:-3], 1, *masks.shape[-2:]), dtype=bool)
    first = np.concatenate([masks.astype(bool), none], axis=-3).argmax(axis=-3)
    return np.where(first < masks.shape[-3], first, -1)


def resize_nearest(labels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Resizes `(..., H, W)` by nearest pixel, so that no new values appear."""
    sides = zip(size, labels.shape[-2:], strict=True)
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in sides)
    return labels[..., rows[:, None], columns]


def overlay_labels(frames: Bytes, labels: NDArray[Any]) -> Bytes:
    """Blends coloured labels `(..., h, w)` over frames `(..., H, W, 3)`; negative labels leave them as they are."""
    labels = resize_nearest(labels, (frames.shape[-3], frames.shape[-2]))
    mixed = np.rint(0.45 * frames + 0.55 * color_labels(labels)).astype(np.uint8)
    return np.where((labels < 0)[..., None], frames, mixed)


def to_uint8(video: NDArray[Any], mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Bytes:
    """Turns normalised frames `(..., 3, H, W)` into RGB bytes `(..., H, W, 3)`.

    Without `mean` and `std` of the normalisation, in [0, 1] units, the 1st and 99th percentiles become black and white.
    """
    require_shape(video.ndim >= 3 and video.shape[-3] == 3, "`video` to be (..., 3, H, W)", video)
    frames = np.moveaxis(np.nan_to_num(video.astype(np.float64)), -3, -1)
    if mean is not None and std is not None:
        frames = frames * np.asarray(std) + np.asarray(mean)
    else:
        low, high = np.percentile(frames, (1.0, 99.0))
        frames = (frames - low) / max(high - low, 1e-6)
    return np.rint(np.clip(frames, 0.0, 1.0) * 255.0).astype(np.uint8)


def draw_sheet(rows: Sequence[tuple[str, Bytes]], title: str = "", cell: int = 112) -> Bytes:
    """Draws rows, each a caption and frames `(T, H, W, 3)`, as one picture `(height, width, 3)`.

    The first row sets the shape of the cells, whose longer side has `cell` pixels: smaller frames are enlarged by
    nearest pixel, larger ones averaged. Captions may have several lines; short rows stay white at their ends.
    """
    sides, count = rows[0][1].shape[1:3], max(len(frames) for _, frames in rows)
    height, width = (max(1, round(cell * side / max(sides))) for side in sides)
    extents = [_extent(caption) for caption, _ in rows]
    left = _MARGIN + max(wide for wide, _ in extents) + 2 * _GAP
    top = _MARGIN + (_extent(title)[1] + _GAP if title else 0)
    heights = [max(height, high) + _GAP for _, high in extents]
    total = max(left + count * (width + _GAP) - _GAP, _MARGIN + _extent(title)[0]) + _MARGIN
    image = Image.new("RGB", (total, top + sum(heights) - _GAP + _MARGIN), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN), title, _INK, _font())
    for (caption, frames), space in zip(rows, heights, strict=True):
        middle = top + (space - _GAP) // 2
        draw.multiline_text((_MARGIN, middle), caption, _INK, _font(), anchor="lm")
        for index, frame in enumerate(frames):
            larger = frame.shape[0] > height or frame.shape[1] > width
            method = Image.Resampling.BOX if larger else Image.Resampling.NEAREST
            picture = Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), method)
            image.paste(picture, (left + index * (width + _GAP), middle - height // 2))
        top += space
    return np.asarray(image)


def encode_png(image: Bytes) -> bytes:
    """Encodes a picture `(H, W, 3)` as a PNG file that carries our mark."""
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text(*PNG_MARK)
    Image.fromarray(image).save(buffer, format="PNG", optimize=True, pnginfo=info)
    return buffer.getvalue()


@lru_cache(maxsize=1)
def _font() -> Any:
    return ImageFont.load_default(13)


def _extent(text: str) -> tuple[int, int]:
    """Width and height of a text of one or several lines, in pixels."""
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, _font())
    return int(np.ceil(box[2])), int(np.ceil(box[3]))
