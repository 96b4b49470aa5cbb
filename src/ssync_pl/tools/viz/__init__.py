"""Pictures of slots: colours, sheets of frames and overlay videos, as pure functions on NumPy arrays."""

from __future__ import annotations

from ssync_pl.data.video import Mp4Encoder, encode_mp4, mp4_available
from ssync_pl.tools.viz.colors import (
    REGION_COLORS,
    color_labels,
    color_regions,
    label_masks,
    overlay_labels,
    resize_nearest,
    slot_colors,
    to_uint8,
)
from ssync_pl.tools.viz.sheet import SheetRow, compose_frames, draw_sheet, encode_png, stack_sheets

__all__ = [
    "REGION_COLORS",
    "Mp4Encoder",
    "SheetRow",
    "color_labels",
    "color_regions",
    "compose_frames",
    "draw_sheet",
    "encode_mp4",
    "encode_png",
    "label_masks",
    "mp4_available",
    "overlay_labels",
    "resize_nearest",
    "slot_colors",
    "stack_sheets",
    "to_uint8",
]
