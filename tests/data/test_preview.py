import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ssync_pl.data.shards import ShardWriter
from ssync_pl.errors import ConfigError, ShardError
from ssync_pl.tools.preview import PreviewVideo, compose_preview, draw_preview, pick_videos
from ssync_pl.tools.viz import overlay_labels, slot_colors


def video(value: int, frames: int = 4, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.full((frames, *size, 3), value, np.uint8)


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    with ShardWriter(tmp_path, "train", samples_per_shard=4) as writer:
        for n in range(10):
            masks = np.zeros((4, 8, 8, 1), np.uint8)
            masks[:, :4] = 1
            masks[:, 7] = 5
            writer.write(f"{n:03d}", {"video.npy": video(10 * n), "segmentations.npy.gz": masks})
    return [str(path) for path in sorted(tmp_path.glob("*.tar"))]


def test_first_and_random_videos(shards: list[str]) -> None:
    names = [item.name for item in pick_videos(shards, 5, seed=None)[0]]
    assert names == [f"train-00000{n // 4}, key {n:03d}" for n in range(5)]
    chosen = [item.name for item in pick_videos(shards, 5, seed=3)[0]]
    assert len(set(chosen)) == 5
    assert chosen == [item.name for item in pick_videos(shards, 5, seed=3)[0]]
    assert chosen != [item.name for item in pick_videos(shards, 5, seed=4)[0]]
    assert len(pick_videos(shards, 99)[0]) == 10


def test_ids_become_labels_and_objects(shards: list[str]) -> None:
    item = pick_videos(shards, 1, seed=None)[0][0]
    assert item.objects == 2
    assert item.labels is not None
    assert item.labels[0, :, 0].tolist() == [0, 0, 0, 0, -1, -1, -1, 4]


def test_channels_and_pictures(tmp_path: Path) -> None:
    masks = np.zeros((8, 8, 3), np.uint8)
    masks[:2, :, 0], masks[1:4, :, 1] = 30, 17
    with ShardWriter(tmp_path, "coco") as writer:
        writer.write("0", {"image.npy": video(9)[0], "segmentations.npy": masks})
    item = pick_videos([str(tmp_path / "coco-000000.tar")], 1)[0][0]
    assert item.objects == 2
    assert item.labels is not None
    assert item.labels[0, :5, 0].tolist() == [0, 0, 1, 1, -1]


def test_damage_is_left_out_and_named(
    shards: list[str], write_tar: Callable[..., Path], npy_bytes: Callable[[np.ndarray], bytes]
) -> None:
    bad = write_tar(
        {
            "0.video.npy": npy_bytes(video(1))[:-9],
            "1.video.npy": npy_bytes(video(1)[..., :2]),
            "2.video.npy": npy_bytes(video(2)),
            "2.segmentations.npy": npy_bytes(np.zeros((3, 8, 8, 1), np.uint8)),
        },
        "bad-000000.tar",
    )
    cut = write_tar({"0.video.npy": npy_bytes(video(3))}, "cut-000000.tar")
    cut.write_bytes(cut.read_bytes()[:900])
    picked = pick_videos([str(cut), str(bad), *shards], 3, seed=None)
    assert [item.name for item in picked[0]] == [f"train-000000, key 00{n}" for n in range(3)]
    assert len(picked[1]) == 4
    with pytest.raises(ShardError, match=r"at least one readable video in 2 shards.*the last problem"):
        pick_videos([str(cut), str(bad)], 3)


def test_remote_and_compressed_shards(shards: list[str], tmp_path: Path, served: str) -> None:
    urls = [f"{served}/{Path(path).name}" for path in shards]
    assert [item.name for item in pick_videos(urls, 5, seed=None)[0]] == [
        item.name for item in pick_videos(shards, 5, seed=None)[0]
    ]
    assert {item.name.split(",")[0] for item in pick_videos(urls, 3, seed=1)[0]} == {
        f"train-00000{n}" for n in range(3)
    }
    packed = tmp_path / "packed-000000.tar.gz"
    packed.write_bytes(gzip.compress(Path(shards[0]).read_bytes()))
    assert len(pick_videos([str(packed)], 9)[0]) == 4


def test_the_sheet_shows_each_frame_beside_its_masks() -> None:
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    frames[0], frames[1] = 40, 200
    labels = np.full((2, 16, 16), -1)
    labels[:, 8:] = 1
    sheet = draw_preview([PreviewVideo("train, key 7", frames, labels, 1)], frames=2, cell=16)
    left = sheet.shape[1] - 10 - 2 * 34 - 4
    top = int((sheet[:, left] == 40).all(axis=-1).argmax())
    row = sheet[top : top + 16]
    assert (row[:, left : left + 16] == 40).all()
    assert np.array_equal(row[:, left + 18 : left + 34], overlay_labels(frames, labels)[0])
    assert (row[:, left + 38 : left + 54] == 200).all()
    assert not (row[12, left + 18] == slot_colors(2)[1]).all()  # blended, not painted over


def test_oblong_short_and_unmasked_videos_share_a_sheet() -> None:
    wide = video(0, frames=7, size=(40, 80))
    wide[..., 0] = 50  # a colour that captions do not have
    items = [
        PreviewVideo("a, key 0", wide, None, 0),
        PreviewVideo("a, key 1", video(90, frames=2, size=(8, 8)), np.zeros((2, 8, 8), np.int64), 1),
    ]
    sheet = draw_preview(items, frames=4, cell=32)
    rows, columns = np.where((sheet == (50, 0, 0)).all(axis=2))
    assert (len(set(rows)), len(set(columns))) == (16, 4 * 32)  # proportions are kept
    assert (sheet == 90).all(axis=2).sum() >= 2 * 32 * 32
    clip = compose_preview(items, cell=32)
    assert len(clip) == 7
    assert np.array_equal(clip[1][-32:], clip[6][-32:])  # the short video holds its last frame


def test_settings_are_checked(shards: list[str]) -> None:
    with pytest.raises(ConfigError, match="--videos"):
        pick_videos(shards, 0)
    with pytest.raises(ConfigError, match="`cell` at least 16"):
        draw_preview(pick_videos(shards, 1)[0], cell=4)
