from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ssync_pl.data.convert.verify import verify_shard
from ssync_pl.data.shards import ShardWriter
from ssync_pl.errors import ShardError


def _shard(folder: Path, **members: np.ndarray) -> Path:
    with ShardWriter(folder, "a") as writer:
        for key in ("0", "1"):
            writer.write(key, {name.replace("_", "."): value for name, value in members.items()})
    return folder / "a-000000.tar"


def test_counts_frames_and_ticks_for_every_sample(tmp_path: Path) -> None:
    path = _shard(tmp_path, video_npy=np.zeros((4, 2, 2, 3), np.uint8), segmentations_npy=np.zeros((4, 2, 2, 5), bool))
    ticks: list[int] = []
    entry, frames = verify_shard(path, ["0", "1"], lambda: ticks.append(1))
    assert (frames, len(ticks), entry.size) == (8, 2, path.stat().st_size)


def test_other_keys_are_named(tmp_path: Path) -> None:
    path = _shard(tmp_path, video_npy=np.zeros((1, 2, 2, 3), np.uint8))
    with pytest.raises(ShardError, match=r"hold 2 videos as planned, but got 2 \(missing: 2; unknown: 1\)"):
        verify_shard(path, ["0", "2"])
    with pytest.raises(ShardError, match="missing: none; unknown: 1"):
        verify_shard(path, ["0"])
    with pytest.raises(ShardError, match="hold 2 videos as planned"):
        verify_shard(path, ["1", "0"])


def test_masks_of_other_frames_are_refused(tmp_path: Path) -> None:
    path = _shard(
        tmp_path, video_npy=np.zeros((4, 2, 2, 3), np.uint8), segmentations_npy=np.zeros((3, 2, 2, 1), np.uint8)
    )
    with pytest.raises(ShardError, match=r"key 0 to have the same frames.*\(4, 2, 2\) and \(3, 2, 2\)"):
        verify_shard(path, ["0", "1"])


def test_a_damaged_member_is_refused(tmp_path: Path) -> None:
    path = _shard(tmp_path, video_npy=np.zeros((4, 2, 2, 3), np.uint8))
    data = bytearray(path.read_bytes())
    at = data.index(b"\x93NUMPY")
    data[at] = 0
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"key 0 .* NPY header"):
        verify_shard(path, ["0", "1"])
