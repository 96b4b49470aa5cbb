"""Reading a shard back whole: every member decodes, and videos and masks agree."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.decode import decode_member
from ssync_pl.data.index import ShardEntry, scan_shard
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ShardError

__all__ = ["count_frames", "verify_shard"]


def verify_shard(
    path: str | os.PathLike[str], keys: Sequence[str], tick: Callable[[], object] | None = None
) -> tuple[ShardEntry, int]:
    """Decode every member of a shard and compare its keys with the expected ones.

    Args:
        path: The shard.
        keys: Keys that it has to hold, in order.
        tick: Called after each sample.

    Returns:
        The shard's index entry and the frames of all its videos.

    Raises:
        FileNotFoundError: There is no such file.
        ShardError: The tar or a member is damaged, the keys differ, or masks do not fit their video.

    Example:
        >>> import tempfile
        >>> from ssync_pl.data.shards import ShardWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ShardWriter(folder, "train") as writer:
        ...         writer.write("7", {"video.npy": np.zeros((4, 8, 8, 3), np.uint8)})
        ...     verify_shard(f"{folder}/train-000000.tar", ["7"])[1]
        4
    """
    path = Path(path)
    entry = scan_shard(path)
    found = [sample.key for sample in entry.samples]
    if found != list(keys):
        missing, extra = sorted(set(keys) - set(found)), sorted(set(found) - set(keys))
        raise ShardError(
            f"Expected {path} to hold {len(keys)} videos as planned, but got {len(found)} (missing: "
            f"{', '.join(missing[:5]) or 'none'}; unknown: {', '.join(extra[:5]) or 'none'}). Delete the shard and run "
            "the conversion again."
        )
    frames = 0
    with contextlib.closing(ShardReader()) as reader:
        for sample in entry.samples:
            where = f"{path}, key {sample.key}"
            members = {
                name: decode_member(name, reader.member(str(path), entry, sample, name), where)
                for name in sample.members
            }
            frames += count_frames(members, where)
            if tick:
                tick()
    return entry, frames


def count_frames(members: Mapping[str, Any], where: str = "") -> int:
    """Count the frames of one sample, after a look at whether its video and masks fit each other.

    Args:
        members: Decoded members. A video is (F, h, w, 3) uint8 under `video.*`, masks are (F, h, w, 1) or (F, h, w, N)
            integers under `segmentations.*`. Encoded members (bytes) are passed over.
        where: Shard or source and key, for the message.

    Returns:
        Frames of the video; 0 when there is no decoded one.

    Raises:
        ShardError: A shape or dtype is wrong, or the numbers of frames, heights or widths differ.

    Example:
        >>> count_frames({"video.npy": np.zeros((4, 8, 8, 3), np.uint8)})
        4
    """
    video, masks = _array(members, "video"), _array(members, "segmentations")
    place = f" of {where}" if where else ""
    if video is not None and (video.ndim != 4 or video.shape[3] != 3 or not video.size or video.dtype != np.uint8):
        raise ShardError(
            f"Expected the video{place} to be uint8 (frames, height, width, 3) and not empty, but got {video.dtype} "
            f"{video.shape}. Repair the source."
        )
    if masks is not None and (masks.ndim != 4 or masks.dtype.kind not in "uib"):
        raise ShardError(
            f"Expected the masks{place} to be integers (frames, height, width, objects), but got {masks.dtype} "
            f"{masks.shape}. Repair the source."
        )
    if video is not None and masks is not None and video.shape[:3] != masks.shape[:3]:
        raise ShardError(
            f"Expected the video and the masks{place} to have the same frames, height and width, but got "
            f"{video.shape[:3]} and {masks.shape[:3]}. Repair the source."
        )
    return 0 if video is None else len(video)


def _array(members: Mapping[str, Any], field: str) -> np.ndarray | None:
    found = (value for name, value in members.items() if name.split(".")[0] == field)
    return next((value for value in found if isinstance(value, np.ndarray)), None)
