"""Pictures of the fixed validation videos, in which an object has the same colour in all columns."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.optimize import linear_sum_assignment

from ssync_pl.compare.report.records import Group, Run
from ssync_pl.tools.viz import (
    SheetRow,
    color_labels,
    color_regions,
    draw_sheet,
    encode_png,
    resize_nearest,
    slot_colors,
)

__all__ = ["Clip", "Column", "Video", "group_videos", "match_slots", "read_clips", "slot_palette", "video_sheet"]

Bytes = NDArray[np.uint8]

CELL = 112
_GAP = 3
_BETWEEN = (128, 128, 128)
_BACKGROUND = (70, 70, 70)
_LEAST_OVERLAP = 0.1


@dataclass(frozen=True)
class Clip:
    """What a run recorded of one video.

    Args:
        frames: uint8 array (F, H, W, 3), RGB.
        truth: Labels (F, H, W), 0 the background.
        encoder: Slot of each patch (F, h, w).
        decoder: Slot of each pixel (F, H, W).
        boundary: bool array (F, h, w), or None.
        interior: bool array (F, h, w), or None.

    Example:
        >>> flat = np.zeros((1, 2, 2), dtype=np.uint8)
        >>> Clip(np.zeros((1, 2, 2, 3), dtype=np.uint8), flat, flat, flat, None, None).truth.shape
        (1, 2, 2)
    """

    frames: Bytes
    truth: NDArray[Any]
    encoder: NDArray[Any]
    decoder: NDArray[Any]
    boundary: NDArray[np.bool_] | None
    interior: NDArray[np.bool_] | None


@dataclass(frozen=True)
class Column:
    """Pictures below one heading: the frames of a video, one below the other.

    Args:
        title: What they show.
        frames: uint8 array (F, height, width, 3), RGB.
        png: The same as one PNG.

    Example:
        >>> Column("frame", np.zeros((1, 2, 2, 3), dtype=np.uint8), b"").title
        'frame'
    """

    title: str
    frames: Bytes
    png: bytes


@dataclass(frozen=True)
class Video:
    """One validation video, for all variants.

    Args:
        key: Its name in the data.
        seed: Seed of the runs.
        columns: Frame and truth.
        variants: For each variant its encoder map, decoder map and regions, as far as they were recorded.

    Example:
        >>> Video("0", 0, (), {}).key
        '0'
    """

    key: str
    seed: int
    columns: tuple[Column, ...]
    variants: Mapping[str, tuple[Column, ...]]


def read_clips(path: Path) -> dict[str, Clip]:
    """Read a `pictures.npz`.

    Args:
        path: The file.

    Returns:
        Names of videos to what was recorded of them; empty where the file is missing or damaged.

    Example:
        >>> read_clips(Path("none.npz"))
        {}
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
        regions = [stored.get(name) for name in ("boundary", "interior")]
        return {
            str(key): Clip(
                *(stored[name][place] for name in ("frames", "truth", "encoder", "decoder")),
                *(None if region is None else region[place].astype(bool) for region in regions),
            )
            for place, key in enumerate(stored["keys"].tolist())
        }
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile):
        return {}


def match_slots(clip: Clip) -> dict[int, int]:
    """Give each object of the truth, the background too, the slot that covers it best, one to one.

    Args:
        clip: A video. The map of slot attention and that of the decoder count alike, so that a slot has one colour.

    Returns:
        Slot to label of the truth, where they share a tenth of their union or more.

    Example:
        >>> truth = np.array([[[0, 0, 1, 1]]])
        >>> match_slots(Clip(np.zeros((1, 1, 4, 3), np.uint8), truth, 5 - truth, 5 - truth, None, None))
        {4: 1, 5: 0}
    """
    size = clip.truth.shape[-2:]
    maps = np.stack([resize_nearest(one, size, channels_last=False) for one in (clip.encoder, clip.decoder)])
    truth = np.broadcast_to(clip.truth, maps.shape)
    slots, slot_of = np.unique(maps, return_inverse=True)
    objects, object_of = np.unique(truth, return_inverse=True)
    both = np.zeros((len(slots), len(objects)))
    np.add.at(both, (slot_of.ravel(), object_of.ravel()), 1.0)
    overlap = both / (both.sum(axis=1, keepdims=True) + both.sum(axis=0) - both)
    pairs = zip(*linear_sum_assignment(-overlap), strict=True)
    return {int(slots[a]): int(objects[b]) for a, b in pairs if overlap[a, b] >= _LEAST_OVERLAP}


def slot_palette(matched: Mapping[int, int], slots: int) -> Bytes:
    """Colours of slots: that of the matched object, grey for the background, a pale one for slots without an object.

    Args:
        matched: Slot to label of the truth.
        slots: Number of colours.

    Returns:
        uint8 array (slots, 3), RGB.

    Example:
        >>> slot_palette({1: 0}, 2)[1].tolist()
        [70, 70, 70]
    """
    objects = slot_colors(max([*matched.values(), 0]) + 1)
    # Far along the palette, where objects seldom come, and half white.
    palette = slot_colors(slots + 16)[16:].astype(np.float64) * 0.35 + 0.65 * 235.0
    for slot, label in matched.items():
        palette[slot] = _BACKGROUND if label == 0 else objects[label]
    return np.rint(palette).astype(np.uint8)


def group_videos(group: Group) -> list[Video]:
    """Pictures of all variants, from runs of one seed where there is one that all have.

    Args:
        group: Runs of one data set and slot count.

    Returns:
        The videos; empty where no run has pictures.
    """
    found = {name: clips for name in group.variants if (clips := _clips(group.of(name)))}
    if not found:
        return []
    seeds = [seed for clips in found.values() for seed in clips]
    seed = max(sorted(set(seeds)), key=seeds.count)
    chosen = {name: (use, clips[use]) for name, clips in found.items() for use in [_nearest(clips, seed)]}
    keys = list(dict.fromkeys(key for _, clips in chosen.values() for key in clips))
    videos = []
    for key in keys:
        shown = {name: (use, clips[key]) for name, (use, clips) in chosen.items() if key in clips}
        first = next(iter(shown.values()))[1]
        columns = (
            _column("frame", first.frames, first),
            _column("truth", color_labels(first.truth.astype(np.int64), background=0), first),
        )
        variants = {
            name if use == seed else f"{name} (seed {use})": _variant_columns(clip)
            for name, (use, clip) in shown.items()
        }
        videos.append(Video(key, seed, columns, variants))
    return videos


def video_sheet(video: Video) -> bytes:
    """All pictures of a video on one sheet, for `report.md` and for slides.

    Args:
        video: The video.

    Returns:
        A PNG.
    """
    rows = [SheetRow(column.title, column.frames) for column in video.columns]
    for name, columns in video.variants.items():
        short = name if len(name) <= 28 else f"{name[:27]}…"
        rows += [SheetRow(f"{short}\n{column.title}", column.frames) for column in columns]
    return encode_png(draw_sheet(rows, title=f"{video.key[:60]}, seed {video.seed}", cell=CELL))


def _clips(runs: Sequence[Run]) -> dict[int, dict[str, Clip]]:
    found = {run.seed: read_clips(run.folder / "pictures.npz") for run in runs}
    return {seed: clips for seed, clips in found.items() if clips}


def _nearest(clips: Mapping[int, Any], seed: int) -> int:
    return seed if seed in clips else min(clips)


def _variant_columns(clip: Clip) -> tuple[Column, ...]:
    slots = int(max(clip.encoder.max(), clip.decoder.max())) + 1
    palette = slot_palette(match_slots(clip), slots)
    columns = [_column("encoder", palette[clip.encoder], clip), _column("decoder", palette[clip.decoder], clip)]
    if clip.boundary is not None and clip.interior is not None:
        size = clip.frames.shape[1:3]
        regions = resize_nearest(color_regions(clip.boundary, clip.interior), size)
        marked = resize_nearest(clip.boundary | clip.interior, size, channels_last=False)[..., None]
        grey = clip.frames.mean(axis=-1, keepdims=True)
        mixed = np.where(marked, 0.4 * grey + 0.6 * regions, 0.75 * grey)
        columns.append(_column("regions", np.rint(mixed).astype(np.uint8), clip))
    return tuple(columns)


def _column(title: str, images: NDArray[Any], clip: Clip) -> Column:
    height, width = clip.frames.shape[1:3]
    scale = CELL / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    if title in ("frame", "regions"):
        frames = np.stack([np.asarray(Image.fromarray(f).resize(size[::-1], Image.Resampling.BICUBIC)) for f in images])
    else:
        frames = resize_nearest(images, size).astype(np.uint8)
    return Column(title, frames, _strip(frames))


def _strip(frames: Bytes) -> bytes:
    gap = np.broadcast_to(np.array(_BETWEEN, dtype=np.uint8), (_GAP, frames.shape[2], 3))
    parts = [part for frame in frames for part in (gap, frame)][1:]
    # A palette of 256 colours holds maps exactly, and makes frames a third as large.
    image = Image.fromarray(np.concatenate(parts)).quantize(256, method=Image.Quantize.MEDIANCUT)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
