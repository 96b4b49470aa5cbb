"""Contact sheets of shards: some videos, each frame beside the same frame with its object masks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from ssync_pl.data.patterns import shard_name
from ssync_pl.data.remote import stream_shard
from ssync_pl.data.samples import Members, SampleRules, arrange_masks, eval_sample, find_member
from ssync_pl.errors import ShardError, require
from ssync_pl.tools.viz import Bytes, draw_sheet, label_masks, overlay_labels

__all__ = ["draw_preview"]


def draw_preview(shards: Sequence[str], count: int, frames: int, cell: int) -> tuple[Bytes, int, list[str]]:
    """Draws the first videos of each shard, from shards in random order, one row per video.

    Returns the sheet (height, width, 3), the number of videos on it, and messages of those that cannot be read.
    `frames` of each video are evenly spaced; `cell` is their longer side in pixels. Of remote shards only the starts
    are read. Raises `ShardError` when no video can be read.
    """
    fits = min(count, frames) >= 1 and cell >= 16
    require(fits, "--videos and --frames from 1 and --cell from 16 on", count, frames, cell)
    videos: list[tuple[str, list[Bytes]]] = []
    skipped: list[str] = []
    for left, number in zip(range(len(shards), 0, -1), np.random.default_rng(0).permutation(len(shards)), strict=True):
        wanted = len(videos) + -(-(count - len(videos)) // left)  # as many from each of the shards that are left
        try:
            with contextlib.closing(stream_shard(shards[number])) as stream:
                for key, members in stream:
                    if len(videos) == wanted:
                        break
                    try:
                        videos.append(_read(f"{shard_name(shards[number])}\nkey {key}", members))
                    except ShardError as error:
                        skipped.append(str(error))
        except ShardError as error:
            skipped.append(str(error))
    if not videos:
        raise ShardError(f"Expected at least one readable video in {len(shards)} shards, but got {skipped[-1:]}.")
    height, width = videos[0][1][0].shape[1:3]
    size = (max(1, cell * width // max(height, width)), max(1, cell * height // max(height, width)))
    panels = max(len(clips) for _, clips in videos)
    rows = []
    for caption, clips in videos:
        places = np.linspace(0, len(clips[0]) - 1, frames).round().astype(int)
        # A video without masks leaves the place beside its frames white.
        shown = [*clips, *[np.full_like(clips[0], 255)] * (panels - len(clips))]
        pictures = [
            [np.asarray(ImageOps.pad(Image.fromarray(clip[k]), size, color="white")) for clip in shown] for k in places
        ]
        rows.append((caption, np.stack([np.concatenate(panel, axis=1) for panel in pictures])))
    return draw_sheet(rows, cell=max(rows[0][1].shape[1:3])), len(videos), skipped


def _read(name: str, members: Members) -> tuple[str, list[Bytes]]:
    """Returns a caption and the clips that stand side by side: the video, and its object masks where it has some."""
    video = eval_sample(members, SampleRules())["video"].numpy()
    caption = f"{name}\n{len(video)} frames\n{video.shape[1]} x {video.shape[2]}"
    if not any(member.split(".")[0] == "segmentations" for member in members.sizes):
        return caption, [video]
    member = find_member(members.sizes, "segmentations", members.where)
    masks = arrange_masks(members.decode(member), len(video), video.shape[1:3], members.name(member))
    ids = masks[..., 0].astype(np.int64) - 1
    labels = ids if masks.shape[-1] == 1 else label_masks(np.moveaxis(masks != 0, -1, 1))
    return f"{caption}\n{len(np.unique(labels[labels >= 0]))} objects", [video, overlay_labels(video, labels)]
