"""Where each slot is in each frame: area, centre and box, from label maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssync_pl.errors import ShapeError

__all__ = ["TRACK_COLUMNS", "SlotTracks", "slot_tracks", "tracks_csv"]

TRACK_COLUMNS = ("frame", "slot", "area", "center_x", "center_y", "x0", "y0", "x1", "y1")
"""Columns of a `.tracks.csv` file."""


@dataclass(frozen=True)
class SlotTracks:
    """Area, centre and box of each slot in each frame of a video.

    Pixel (row 0, column 0) reaches from 0 to 1 in both directions: a slot that fills a frame of width W has its centre
    at W / 2 and a box from 0 to W.

    Args:
        area: float64 (T, S), share of the frame's pixels, in [0, 1].
        center: float64 (T, S, 2), x and y in pixels; NaN where the slot is empty.
        box: int64 (T, S, 4), x0, y0, x1, y1 in pixels, x1 and y1 behind the last pixel; -1 where the slot is empty.

    Example:
        >>> slot_tracks(np.zeros((1, 2, 4), np.uint8), 1).center.tolist()
        [[[2.0, 1.0]]]
    """

    area: NDArray[np.float64]
    center: NDArray[np.float64]
    box: NDArray[np.int64]


def slot_tracks(labels: NDArray[Any], num_slots: int) -> SlotTracks:
    """Measure every slot in every frame.

    Args:
        labels: Integers (T, H, W). Labels from `num_slots` on belong to no slot.
        num_slots: S, number of slots.

    Returns:
        The tracks. Shares are of all H * W pixels.

    Raises:
        ShapeError: The labels are no integers (T, H, W), or hold negative ones.

    Example:
        >>> tracks = slot_tracks(np.array([[[0, 0, 1], [0, 0, 1]]]), 3)
        >>> tracks.area.round(2).tolist(), tracks.center[0, 1].tolist(), tracks.box[0].tolist()
        ([[0.67, 0.33, 0.0]], [2.5, 1.0], [[0, 0, 2, 2], [2, 0, 3, 2], [-1, -1, -1, -1]])
    """
    if labels.ndim != 3 or not np.issubdtype(labels.dtype, np.integer) or (labels.size and labels.min() < 0):
        raise ShapeError(f"Expected argument `labels` to be integers (T, H, W) from 0 on, but got {labels.shape}.")
    frames, height, width = labels.shape
    # How many pixels a slot has in each column and in each row says all three, without a mask a slot.
    columns = np.zeros((frames, num_slots, width), np.int64)
    rows = np.zeros((frames, num_slots, height), np.int64)
    for frame in range(frames):
        slots = labels[frame].astype(np.int64)
        known = slots < num_slots
        y, x = np.nonzero(known)
        slots = slots[known]
        columns[frame] = np.bincount(slots * width + x, minlength=num_slots * width).reshape(num_slots, width)
        rows[frame] = np.bincount(slots * height + y, minlength=num_slots * height).reshape(num_slots, height)
    count = columns.sum(-1)
    empty = count == 0
    x0, x1, center_x = _extent(columns, count)
    y0, y1, center_y = _extent(rows, count)
    center = np.stack([center_x, center_y], axis=-1)
    box = np.stack([x0, y0, x1, y1], axis=-1)
    center[empty], box[empty] = np.nan, -1
    return SlotTracks(count / max(1, height * width), center, box)


def tracks_csv(tracks: SlotTracks) -> str:
    """Write tracks as CSV, one row a frame and slot; see `TRACK_COLUMNS`.

    Args:
        tracks: The tracks.

    Returns:
        The text with a header line. Centre and box of an empty slot stay empty.

    Example:
        >>> print(tracks_csv(slot_tracks(np.array([[[0, 0], [0, 0]]]), 2)), end="")
        frame,slot,area,center_x,center_y,x0,y0,x1,y1
        0,0,1.000000,1.00,1.00,0,0,2,2
        0,1,0.000000,,,,,,
    """
    lines = [",".join(TRACK_COLUMNS)]
    for frame, slots in enumerate(tracks.area):
        for slot, area in enumerate(slots):
            where = ",,,,,"
            if area > 0:
                x, y = tracks.center[frame, slot]
                where = ",".join([f"{x:.2f}", f"{y:.2f}", *map(str, tracks.box[frame, slot].tolist())])
            lines.append(f"{frame},{slot},{area:.6f},{where}")
    return "\n".join(lines) + "\n"


def _extent(counts: NDArray[np.int64], total: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    length = counts.shape[-1]
    taken = counts > 0
    first = taken.argmax(-1)
    last = length - taken[..., ::-1].argmax(-1)
    middle = (counts * (np.arange(length) + 0.5)).sum(-1) / np.maximum(total, 1)
    return first, last, middle
