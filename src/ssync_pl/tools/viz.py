"""Pictures of slots: colours, sheets of frames and overlay videos, as pure functions on NumPy arrays."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ssync_pl.errors import ShapeError
from ssync_pl.tools.owned import MARK

__all__ = [
    "REGION_COLORS",
    "Bytes",
    "SheetRow",
    "color_labels",
    "color_regions",
    "compose_frames",
    "draw_sheet",
    "encode_png",
    "label_masks",
    "overlay_labels",
    "resize_nearest",
    "slot_colors",
    "to_uint8",
]

Bytes = NDArray[np.uint8]

_PALETTE = bytes.fromhex(
    "e6194b 3cb44b 4363d8 ffe119 f58231 911eb4 42d4f4 f032e6 9a6324 fabed4 008080 bfef45 800000 aaffc3 000075 ffd8b1"
)
_GOLDEN_ANGLE = 0.6180339887498949
_BACKGROUND = (70, 70, 70)

REGION_COLORS: dict[str, tuple[int, int, int]] = {
    "boundary": (255, 140, 0),
    "interior": (30, 110, 220),
    "both": (225, 60, 170),
    "neither": (35, 35, 35),
}
"""Colours of the patches that `color_regions` tells apart."""

_INK, _FAINT = (20, 20, 20), (110, 110, 110)
_GAP, _MARGIN, _LINE = 4, 10, 16


def slot_colors(count: int) -> Bytes:
    """Returns one colour per slot, uint8 `(count, 3)`; slot k has the same colour whatever the count."""
    named = np.frombuffer(_PALETTE, dtype=np.uint8).reshape(-1, 3)
    more = [
        colorsys.hsv_to_rgb(index * _GOLDEN_ANGLE % 1.0, 0.75, 0.95 if index % 2 else 0.6)
        for index in range(count - len(named))
    ]
    return np.concatenate([named[:count], np.rint(255 * np.array(more).reshape(-1, 3)).astype(np.uint8)])


def color_labels(labels: NDArray[Any], *, background: int | None = None) -> Bytes:
    """Paints labels `(..., H, W)` in their slots' colours, negative ones black and the label `background` grey."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"Expected `labels` to hold integers, but got {labels.dtype}. Pass argmax over slots.")
    count = int(labels.max(initial=-1)) + 1
    table = np.vstack([slot_colors(count), np.zeros((1, 3), dtype=np.uint8)])
    if background is not None and 0 <= background < count:
        table[background] = _BACKGROUND
    return table[np.where(labels < 0, count, labels)]


def color_regions(boundary: NDArray[np.bool_], interior: NDArray[np.bool_]) -> Bytes:
    """Paints the patches `(..., H, W)` where SSync's two terms are active, in `REGION_COLORS`."""
    table = np.array([REGION_COLORS[name] for name in ("neither", "boundary", "interior", "both")], dtype=np.uint8)
    return table[boundary.astype(np.int64) + 2 * interior.astype(np.int64)]


def label_masks(masks: NDArray[Any]) -> NDArray[np.int64]:
    """Returns labels `(..., H, W)` of masks `(..., C, H, W)`: the first mask of each place, -1 without any."""
    masks = masks.astype(bool)
    if masks.shape[-3] == 0:
        return np.full((*masks.shape[:-3], *masks.shape[-2:]), -1, dtype=np.int64)
    return np.where(masks.any(axis=-3), masks.argmax(axis=-3), -1).astype(np.int64)


def resize_nearest(images: NDArray[Any], size: tuple[int, int], *, channels_last: bool = True) -> NDArray[Any]:
    """Resizes `(..., H, W, C)`, or `(..., H, W)` with `channels_last=False`, so that no new colours appear."""
    row_axis = images.ndim - (3 if channels_last else 2)
    for axis, length in zip((row_axis, row_axis + 1), size, strict=True):
        index = ((np.arange(length) + 0.5) * images.shape[axis] / length).astype(np.int64)
        images = np.take(images, index, axis=axis)
    return images


def overlay_labels(frames: Bytes, labels: NDArray[Any], *, alpha: float = 0.55, background: int | None = None) -> Bytes:
    """Blends coloured labels `(..., h, w)` over frames `(..., H, W, 3)`; -1 and `background` leave them as they are."""
    labels = resize_nearest(labels, (frames.shape[-3], frames.shape[-2]), channels_last=False)
    hidden = labels < 0 if background is None else (labels < 0) | (labels == background)
    mixed = np.rint((1.0 - alpha) * frames + alpha * color_labels(labels)).astype(np.uint8)
    return np.where(hidden[..., None], frames, mixed)


def to_uint8(video: NDArray[Any], mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Bytes:
    """Turns normalised frames `(..., 3, H, W)` into RGB bytes `(..., H, W, 3)`.

    `mean` and `std` undo the normalisation, in [0, 1] units. Without them the 1st and 99th percentiles of the values
    become black and white, so that a picture is readable whatever the normalisation.
    """
    if video.ndim < 3 or video.shape[-3] != 3:
        raise ShapeError(f"Expected `video` to be (..., 3, H, W), but got {tuple(video.shape)}.")
    frames = np.moveaxis(np.nan_to_num(video.astype(np.float64)), -3, -1)
    if mean is not None and std is not None:
        frames = frames * np.asarray(std) + np.asarray(mean)
    else:
        low, high = np.percentile(frames, (1.0, 99.0))
        frames = (frames - low) / max(high - low, 1e-6)
    return np.rint(np.clip(frames, 0.0, 1.0) * 255.0).astype(np.uint8)


@dataclass(frozen=True)
class SheetRow:
    """One row of a sheet.

    Args:
        caption: text at the left, of one or several lines.
        frames: uint8 `(T, H, W, 3)`. Rows of one sheet may differ in H and W.
        legend: words below the caption, with the colours that they explain.
    """

    caption: str
    frames: Bytes
    legend: tuple[tuple[str, tuple[int, int, int]], ...] = ()

    @property
    def text_height(self) -> int:
        """Height of caption and legend, in pixels."""
        return _LINE * (self.caption.count("\n") + 1 + len(self.legend))


def draw_sheet(rows: Sequence[SheetRow], *, title: str = "", columns: Sequence[str] = (), cell: int = 112) -> Bytes:
    """Draws rows of frames with captions, as one picture `(height, width, 3)`.

    Args:
        rows: rows with the same number of frames. The first row sets the shape of the cells.
        title: a line above the sheet.
        columns: one caption per frame, above the first row; none are drawn where it is empty.
        cell: longer side of a cell, in pixels. Smaller frames are enlarged by nearest pixel, larger ones averaged.

    Raises:
        ShapeError: there is no row, or rows or column captions differ in number of frames.
    """
    if not rows:
        raise ShapeError("Expected at least one row, but got none.")
    count = len(rows[0].frames)
    for row in rows:
        if row.frames.ndim != 4 or len(row.frames) != count or row.frames.shape[3] != 3:
            raise ShapeError(f"Expected row {row.caption!r} to be ({count}, H, W, 3), but got {row.frames.shape}.")
    if columns and len(columns) != count:
        raise ShapeError(f"Expected `columns` to hold {count} captions, but got {len(columns)}.")
    sides = rows[0].frames.shape[1:3]
    height, width = (max(1, round(cell * side / max(sides))) for side in sides)
    words = [*(row.caption for row in rows), *(f"    {word}" for row in rows for word, _ in row.legend)]
    left = _MARGIN + max(_width(word) for word in words) + 2 * _GAP
    top = _MARGIN + (_LINE + _GAP if title else 0) + (_LINE if columns else 0)
    heights = [max(height, row.text_height) + _GAP for row in rows]
    sheet_width = max(left + count * (width + _GAP) - _GAP, _MARGIN + _width(title)) + _MARGIN
    image = Image.new("RGB", (sheet_width, top + sum(heights) - _GAP + _MARGIN), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=_font())
    for index, text in enumerate(columns):
        centre = left + index * (width + _GAP) + width // 2
        draw.text((centre - _width(text) // 2, top - _LINE), text, fill=_FAINT, font=_font())
    for row, row_height in zip(rows, heights, strict=True):
        _draw_caption(draw, row, top + (row_height - _GAP - row.text_height) // 2)
        for index, frame in enumerate(row.frames):
            place = (left + index * (width + _GAP), top + (row_height - _GAP - height) // 2)
            image.paste(_fit(frame, (height, width)), place)
        top += row_height
    return np.asarray(image)


def compose_frames(
    panels: Sequence[Sequence[Bytes]], *, columns: Sequence[str], rows: Sequence[str], title: str = "", cell: int = 160
) -> Bytes:
    """Lays clips out on a captioned grid `(T, height, width, 3)`, one row per video, one column per kind of overlay.

    Args:
        panels: for each video its clips, each uint8 `(T, H, W, 3)`. Shorter clips hold their last frame.
        columns: caption of each clip of a video.
        rows: caption of each video.
        title: a line above the grid.
        cell: longer side of a clip in the grid, in pixels.

    Raises:
        ShapeError: there is no video, or the captions do not fit the panels.
    """
    if not panels or len(rows) != len(panels) or any(len(clips) != len(columns) for clips in panels):
        got = f"{len(rows)} row captions, {len(columns)} column captions, panels {[len(clips) for clips in panels]}"
        raise ShapeError(f"Expected one row caption per video and one column caption per clip, but got {got}.")
    pictures = []
    for time in range(max(len(clip) for clips in panels for clip in clips)):
        now = [np.stack([clip[min(time, len(clip) - 1)] for clip in clips]) for clips in panels]
        lines = [SheetRow(caption, frames) for caption, frames in zip(rows, now, strict=True)]
        pictures.append(draw_sheet(lines, title=title, columns=columns, cell=cell))
    return np.stack(pictures)


def encode_png(image: Bytes) -> bytes:
    """Encodes a picture `(H, W, 3)` as a PNG file that carries our mark."""
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("Software", MARK)
    Image.fromarray(image).save(buffer, format="PNG", optimize=True, pnginfo=info)
    return buffer.getvalue()


@lru_cache(maxsize=1)
def _font() -> Any:
    try:
        return ImageFont.load_default(13)
    except TypeError:  # Pillow 10.0 has only the small bitmap font
        return ImageFont.load_default()


def _width(text: str) -> int:
    return max(math.ceil(_font().getlength(line)) for line in text.split("\n"))


def _fit(frame: Bytes, size: tuple[int, int]) -> Image.Image:
    enlarge = frame.shape[0] <= size[0] and frame.shape[1] <= size[1]
    method = Image.Resampling.NEAREST if enlarge else Image.Resampling.BOX
    return Image.fromarray(np.ascontiguousarray(frame)).resize((size[1], size[0]), method)


def _draw_caption(draw: ImageDraw.ImageDraw, row: SheetRow, line: int) -> None:
    for text in row.caption.split("\n"):
        draw.text((_MARGIN, line), text, fill=_INK, font=_font())
        line += _LINE
    for word, color in row.legend:
        draw.rectangle((_MARGIN, line + 3, _MARGIN + 9, line + 12), fill=color, outline=_FAINT)
        draw.text((_MARGIN, line), f"    {word}", fill=_FAINT, font=_font())
        line += _LINE
