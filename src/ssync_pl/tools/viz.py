"""Pictures of slots: colours, overlays and sheets of frames, and the preview of shards."""

import colorsys
import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from ssync_pl.data.patterns import expand_shards, shard_name
from ssync_pl.data.remote import stream_shard
from ssync_pl.data.samples import Members, read_whole
from ssync_pl.errors import ShardError, require

Bytes = NDArray[np.uint8]

_PALETTE = bytes.fromhex(
    "e6194b 3cb44b 4363d8 ffe119 f58231 911eb4 42d4f4 f032e6 9a6324 fabed4 008080 bfef45 800000 aaffc3 000075 ffd8b1"
)
_GOLDEN_ANGLE = 0.6180339887498949
PREVIEW, SHEET = "ssync_pl preview", "ssync_pl sheet"  # marks of our pictures: a text chunk
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
    return np.where(masks.any(axis=-3), masks.astype(bool).argmax(axis=-3), -1)


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
    """Turns normalised frames `(..., 3, H, W)` into RGB bytes; without `mean` and `std` percentiles are the ends."""
    frames = np.moveaxis(np.nan_to_num(video.astype(np.float64)), -3, -1)
    if mean is not None and std is not None:
        frames = frames * np.asarray(std) + np.asarray(mean)
    else:
        low, high = np.percentile(frames, (1.0, 99.0))
        frames = (frames - low) / max(high - low, 1e-6)
    return np.rint(np.clip(frames, 0.0, 1.0) * 255.0).astype(np.uint8)


def draw_sheet(rows: Sequence[tuple[str, Bytes]], title: str = "", cell: int = 112) -> Bytes:
    """Draws rows, each a caption (of some lines) and frames `(T, H, W, 3)` scaled to `cell` pixels, as one picture."""
    pictures = [[_fit(frame, cell) for frame in frames] for _, frames in rows]
    extents = [_extent(caption) for caption, _ in rows]
    left = _MARGIN + max(wide for wide, _ in extents) + 2 * _GAP
    top = _MARGIN + (_extent(title)[1] + _GAP if title else 0)
    pitch = max(row[0].width for row in pictures) + _GAP
    heights = [max(row[0].height, high) + _GAP for row, (_, high) in zip(pictures, extents, strict=True)]
    total = max(left + max(map(len, pictures)) * pitch - _GAP, _MARGIN + _extent(title)[0]) + _MARGIN
    image = Image.new("RGB", (total, top + sum(heights) - _GAP + _MARGIN), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN), title, _INK, font_size=13)
    for (caption, _), row, space in zip(rows, pictures, heights, strict=True):
        middle = top + (space - _GAP) // 2
        draw.multiline_text((_MARGIN, middle), caption, _INK, anchor="lm", font_size=13)
        for index, picture in enumerate(row):
            image.paste(picture, (left + index * pitch, middle - picture.height // 2))
        top += space
    return np.asarray(image)


def _fit(frame: Bytes, cell: int) -> Image.Image:
    """Enlarges a small frame by nearest pixel, and averages a larger one."""
    scale = cell / max(frame.shape[:2])
    height, width = (max(1, round(scale * side)) for side in frame.shape[:2])
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    return Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), method)


def encode_png(image: Bytes, mark: str) -> bytes:
    """Encodes a picture `(H, W, 3)` as a PNG file that carries a mark."""
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("Software", mark)
    Image.fromarray(image).save(buffer, format="PNG", optimize=True, pnginfo=info)
    return buffer.getvalue()


def draw_preview(patterns: Sequence[str], count: int, frames: int) -> tuple[bytes, int, list[str]]:
    """Draws the first videos of shards in random order, frames and masks over them; of remote ones the start is read.

    Returns the sheet as PNG, the number of videos on it, and messages of those that cannot be read.
    """
    require(min(count, frames) >= 1, "--videos and --frames from 1 on", count, frames)
    shards = expand_shards(patterns, "patterns")
    videos: list[list[tuple[str, Bytes]]] = []
    skipped: list[str] = []
    for left, number in zip(range(len(shards), 0, -1), np.random.default_rng(0).permutation(len(shards)), strict=True):
        wanted = len(videos) + -(-(count - len(videos)) // left)  # as many from each of the shards that are left
        try:
            with contextlib.closing(stream_shard(shards[number])) as stream:
                for key, members in stream:
                    if len(videos) == wanted:
                        break
                    try:
                        videos.append(_draw_rows(f"{shard_name(shards[number])}\nkey {key}", members, frames))
                    except ShardError as error:
                        skipped.append(str(error))
        except ShardError as error:
            skipped.append(str(error))
    if not videos:
        raise ShardError(f"Expected at least one readable video in {len(shards)} shards, but got {skipped[-1:]}.")
    return encode_png(draw_sheet([row for rows in videos for row in rows]), PREVIEW), len(videos), skipped


def _draw_rows(name: str, members: Members, frames: int) -> list[tuple[str, Bytes]]:
    video, masks = read_whole(members)
    places = np.linspace(0, len(video) - 1, frames).round().astype(int)
    rows = [(f"{name}\n{len(video)} frames\n{video.shape[1]} x {video.shape[2]}", video[places])]
    if masks is not None:
        labels = masks[..., 0].astype(np.int64) - 1
        labels = label_masks(np.moveaxis(masks, -1, 1)) if masks.dtype == bool else labels
        rows.append((f"{len(np.unique(labels[labels >= 0]))} objects", overlay_labels(video[places], labels[places])))
    return rows


def _extent(text: str) -> tuple[int, int]:
    """Width and height of a text of one or several lines, in pixels."""
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font_size=13)
    return int(np.ceil(box[2])), int(np.ceil(box[3]))
