"""Contact sheets of shards: some videos, with their object masks below them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from ssync_pl.data.patterns import expand_shards, shard_name
from ssync_pl.data.remote import stream_shard
from ssync_pl.data.samples import Members, read_whole
from ssync_pl.errors import ShardError, require
from ssync_pl.tools.viz import Bytes, draw_sheet, encode_png, label_masks, overlay_labels

__all__ = ["draw_preview"]

_CELL = 112  # pixels of the longer side of a frame


def draw_preview(patterns: Sequence[str], count: int, frames: int) -> tuple[bytes, int, list[str]]:
    """Draws the first videos of each shard, from shards in random order: a row of frames, and one with masks over them.

    Returns the sheet as PNG, the number of videos on it, and messages of those that cannot be read. `frames` of each
    video are evenly spaced. Of remote shards only the starts are read. Raises `ShardError` when no video can be read.
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
    return encode_png(draw_sheet([row for rows in videos for row in rows], cell=_CELL)), len(videos), skipped


def _draw_rows(name: str, members: Members, frames: int) -> list[tuple[str, Bytes]]:
    video, masks = read_whole(members)
    places = np.linspace(0, len(video) - 1, frames).round().astype(int)
    rows = [(f"{name}\n{len(video)} frames\n{video.shape[1]} x {video.shape[2]}", video[places])]
    if masks is not None:
        labels = masks[..., 0].astype(np.int64) - 1
        labels = label_masks(np.moveaxis(masks, -1, 1)) if masks.dtype == bool else labels
        rows.append((f"{len(np.unique(labels[labels >= 0]))} objects", overlay_labels(video[places], labels[places])))

    def square(frame: Bytes) -> Bytes:
        return np.asarray(ImageOps.pad(Image.fromarray(frame), (_CELL, _CELL), color="white"))

    return [(caption, np.stack([square(frame) for frame in clip])) for caption, clip in rows]
