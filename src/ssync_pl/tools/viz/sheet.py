"""Picture sheets: captions at the left, one column a frame, one row a kind of picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ssync_pl.errors import ShapeError
from ssync_pl.tools.viz.colors import REGION_COLORS, resize_nearest

__all__ = ["SheetRow", "compose_frames", "draw_sheet", "encode_png", "stack_sheets"]

Bytes = NDArray[np.uint8]
Color = tuple[int, int, int]

_PAPER = (255, 255, 255)
_INK = (20, 20, 20)
_FAINT = (110, 110, 110)
_GAP = 4
_MARGIN = 10
_LINE = 16


@dataclass(frozen=True)
class SheetRow:
    """One row of a sheet.

    Args:
        caption: Text at the left; each line of it is drawn on its own line.
        frames: uint8 array (T, H, W, 3), RGB. Rows of one sheet may differ in H and W.
        legend: Pairs of a word and the colour that it explains, drawn below the caption.

    Example:
        >>> SheetRow("video", np.zeros((2, 8, 8, 3), dtype=np.uint8)).frames.shape
        (2, 8, 8, 3)
    """

    caption: str
    frames: Bytes
    legend: tuple[tuple[str, Color], ...] = ()


REGION_LEGEND = tuple(REGION_COLORS.items())


@lru_cache(maxsize=4)
def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow 10.0 has only the small bitmap font
        return ImageFont.load_default()


def _width(text: str, size: int) -> int:
    return int(np.ceil(max((_font(size).getlength(line) for line in text.split("\n")), default=0)))


def _cell_size(frames: Bytes, cell: int) -> tuple[int, int]:
    height, width = frames.shape[1:3]
    if height >= width:
        return cell, max(1, round(cell * width / height))
    return max(1, round(cell * height / width)), cell


def _fit(frames: Bytes, size: tuple[int, int]) -> Bytes:
    if frames.shape[1] <= size[0] and frames.shape[2] <= size[1]:
        return resize_nearest(frames, size)
    shrunk = [Image.fromarray(f).resize((size[1], size[0]), Image.Resampling.BOX) for f in frames]
    return np.stack([np.asarray(image) for image in shrunk])


def draw_sheet(rows: Sequence[SheetRow], *, title: str = "", columns: Sequence[str] = (), cell: int = 112) -> Bytes:
    """Draw rows of frames with captions, as one picture.

    Args:
        rows: Rows with the same number of frames. The first row sets the shape of the cells.
        title: A line above the sheet.
        columns: A caption a frame, above the first row. Empty draws none.
        cell: Longer side of a cell, in pixels. Smaller frames are enlarged by nearest pixel, larger ones averaged.

    Returns:
        uint8 array (height, width, 3), RGB.

    Raises:
        ShapeError: There is no row, or rows or column captions differ in number of frames.

    Example:
        >>> frames = np.zeros((3, 8, 8, 3), dtype=np.uint8)
        >>> sheet = draw_sheet([SheetRow("video", frames)], title="step 10", columns=["0", "1", "2"], cell=32)
        >>> sheet.dtype, sheet.shape[2]
        (dtype('uint8'), 3)
    """
    if not rows:
        raise ShapeError("Expected argument `rows` to hold at least one row, but got none.")
    count = rows[0].frames.shape[0]
    for row in rows:
        if row.frames.ndim != 4 or row.frames.shape[0] != count or row.frames.shape[3] != 3:
            raise ShapeError(
                f"Expected row {row.caption!r} to hold frames ({count}, H, W, 3), but got {row.frames.shape}."
            )
    if columns and len(columns) != count:
        raise ShapeError(f"Expected argument `columns` to hold {count} captions, but got {len(columns)}.")

    height, width = _cell_size(rows[0].frames, cell)
    words = [_width(row.caption, 13) for row in rows]
    words += [_width(word, 11) + 16 for row in rows for word, _ in row.legend]
    left = _MARGIN + max(words) + 2 * _GAP
    top = _MARGIN + (_LINE + _GAP if title else 0) + (_LINE if columns else 0)
    heights = [max(height, _LINE * (row.caption.count("\n") + 1) + 14 * len(row.legend)) for row in rows]
    sheet_width = max(left + count * (width + _GAP) - _GAP, _MARGIN + _width(title, 14)) + _MARGIN
    image = Image.new("RGB", (sheet_width, top + sum(heights) + _GAP * (len(rows) - 1) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(image)
    if title:
        draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=_font(14))
    for index, text in enumerate(columns):
        center = left + index * (width + _GAP) + width // 2
        draw.text((center - _width(text, 11) // 2, top - _LINE), text, fill=_FAINT, font=_font(11))

    line = top
    for row, row_height in zip(rows, heights, strict=True):
        _draw_caption(draw, row, line, row_height)
        for index, frame in enumerate(_fit(row.frames, (height, width))):
            place = (left + index * (width + _GAP), line + (row_height - height) // 2)
            image.paste(Image.fromarray(np.ascontiguousarray(frame)), place)
        line += row_height + _GAP
    return np.asarray(image)


def _draw_caption(draw: ImageDraw.ImageDraw, row: SheetRow, top: int, height: int) -> None:
    lines = row.caption.split("\n")
    line = top + max(0, (height - _LINE * len(lines) - 14 * len(row.legend)) // 2)
    for text in lines:
        draw.text((_MARGIN, line), text, fill=_INK, font=_font(13))
        line += _LINE
    for word, color in row.legend:
        draw.rectangle((_MARGIN, line + 3, _MARGIN + 9, line + 12), fill=color, outline=_FAINT)
        draw.text((_MARGIN + 15, line), word, fill=_FAINT, font=_font(11))
        line += 14


def stack_sheets(sheets: Sequence[Bytes], *, columns: int = 1) -> Bytes:
    """Put sheets beside and below each other on white paper.

    Args:
        sheets: uint8 arrays (h, w, 3); sizes may differ.
        columns: Number of sheets side by side, at least 1.

    Returns:
        uint8 array (height, width, 3) that holds all of them, row by row.

    Raises:
        ShapeError: There is no sheet.

    Example:
        >>> stack_sheets([np.zeros((2, 3, 3), np.uint8), np.zeros((1, 5, 3), np.uint8)]).shape
        (3, 5, 3)
    """
    if not sheets:
        raise ShapeError("Expected argument `sheets` to hold at least one sheet, but got none.")
    columns = max(1, min(columns, len(sheets)))
    rows = [sheets[start : start + columns] for start in range(0, len(sheets), columns)]
    width = max(sheet.shape[1] for sheet in sheets)
    lines = []
    for row in rows:
        line = np.full((max(sheet.shape[0] for sheet in row), columns * width, 3), 255, dtype=np.uint8)
        for place, sheet in enumerate(row):
            line[: sheet.shape[0], place * width : place * width + sheet.shape[1]] = sheet
        lines.append(line)
    return np.concatenate(lines)


def encode_png(image: Bytes) -> bytes:
    """Encode an RGB picture as PNG.

    Args:
        image: uint8 array (H, W, 3).

    Returns:
        The bytes of a PNG file.

    Example:
        >>> encode_png(np.zeros((2, 2, 3), dtype=np.uint8))[1:4]
        b'PNG'
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def compose_frames(
    panels: Sequence[Sequence[Bytes]], *, columns: Sequence[str], rows: Sequence[str], title: str = "", cell: int = 160
) -> Bytes:
    """Lay clips out on a captioned grid, one row a video and one column a kind of overlay.

    Args:
        panels: For each video its clips, each a uint8 array (T, H, W, 3). Shorter clips hold their last frame.
        columns: Caption of each clip of a video.
        rows: Caption of each video.
        title: A line above the grid.
        cell: Longer side of a clip in the grid, in pixels.

    Returns:
        uint8 array (T, height, width, 3).

    Raises:
        ShapeError: There is no video, or the captions do not fit the panels.

    Example:
        >>> clip = np.zeros((2, 8, 8, 3), dtype=np.uint8)
        >>> compose_frames([[clip, clip]], columns=["video", "slots"], rows=["0"], cell=32).shape[0]
        2
    """
    if not panels or len(rows) != len(panels) or any(len(clips) != len(columns) for clips in panels):
        got = f"{len(rows)} row captions, {len(columns)} column captions, panels {[len(clips) for clips in panels]}"
        raise ShapeError(f"Expected a row caption a video and a column caption a clip, but got {got}.")
    length = max(clip.shape[0] for clips in panels for clip in clips)
    pictures = []
    for time in range(length):
        lines = [
            SheetRow(caption, np.stack([clip[min(time, clip.shape[0] - 1)] for clip in clips]))
            for caption, clips in zip(rows, panels, strict=True)
        ]
        pictures.append(draw_sheet(lines, title=title, columns=columns, cell=cell))
    return np.stack(pictures)
