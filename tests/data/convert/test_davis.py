"""DAVIS folders, written here, to shards and back."""

from __future__ import annotations

import numpy as np
import pytest
from folder_sets import MADE_FRAMES, davis_set, load_back, run_convert
from PIL import Image

from ssync_pl.data import ShardDataModule
from ssync_pl.errors import ConfigError, ShardError


def convert(root, out, *words):
    return run_convert("davis", "--root", root, "--out", out, *words)


def test_frames_and_ids_come_back_and_void_is_background(tmp_path):
    frames, ids = davis_set(tmp_path / "set")
    davis_set(tmp_path / "set", ["zoo"], "val")
    assert convert(tmp_path / "set", tmp_path / "out") == 0
    train = load_back(tmp_path / "out", "davis-train")
    assert [sample["info.json"]["video"] for sample in train] == ["bear", "boat ü"]
    for sample, name in zip(train, frames, strict=True):
        np.testing.assert_array_equal(sample["video.npy"], frames[name])
        expected = np.where(ids[name] == 255, 0, ids[name])[..., None]
        np.testing.assert_array_equal(sample["segmentations.npy.gz"], expected)
        assert sample["info.json"]["void_pixels"] == 3
        assert sample["info.json"]["object_ids"] == [1, 2]
    assert len(load_back(tmp_path / "out", "davis-validation")) == 1
    data = ShardDataModule(
        validation=str(tmp_path / "out" / "davis-validation-*.tar"), batch_size=1, num_workers=0, mask_format="ids"
    )
    data.prepare_data()
    data.setup("validate")
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert batch["segmentations"].shape == (1, MADE_FRAMES, 3, 12, 20)


def test_a_first_frame_alone_is_kept_under_another_name(tmp_path):
    _, ids = davis_set(tmp_path / "set", ["bear"], "test-dev", masks=1)
    convert(tmp_path / "set", tmp_path / "out", "--splits", "test-dev", "--short-side", 6)
    (sample,) = load_back(tmp_path / "out", "davis-test-dev")
    assert "segmentations.npy.gz" not in sample
    first = np.where(ids["bear"][:1] == 255, 0, ids["bear"][:1])
    np.testing.assert_array_equal(sample["first_segmentation.npy.gz"], first[:, 1::2, 1::2, None])
    assert sample["video.npy"].shape == (MADE_FRAMES, 6, 10, 3)


def test_videos_without_any_mask_are_written_without(tmp_path):
    davis_set(tmp_path / "set", ["bear"], masks=0)
    convert(tmp_path / "set", tmp_path / "out", "--splits", "train")
    assert sorted(load_back(tmp_path / "out", "davis-train")[0]) == ["info.json", "key", "video.npy"]


def _lose_a_mask(root):
    (root / "Annotations" / "480p" / "bear" / "00002.png").unlink()


def _large_mask(root):
    Image.new("L", (10, 12)).save(root / "Annotations" / "480p" / "bear" / "00002.png")


def _colour_mask(root):
    Image.new("RGB", (20, 12)).save(root / "Annotations" / "480p" / "bear" / "00002.png")


def _large_frame(root):
    Image.new("RGB", (22, 12)).save(root / "JPEGImages" / "480p" / "bear" / "00002.jpg")


def _no_frames(root):
    for path in (root / "JPEGImages" / "480p" / "bear").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lose_a_mask, r"a mask for each of the 4 frames of video bear, .* got 3 in .*first difference: 00002"),
        (_large_mask, r"video bear to be 12 x 20 .*00002\.png is 12 x 10"),
        (_colour_mask, "grey or palette picture .* 'RGB'"),
        (_large_frame, r"video bear to be 12 x 20 .*00002\.jpg is 12 x 22"),
        (_no_frames, "frames of video bear in .* but got none"),
    ],
)
def test_bad_videos_are_refused_by_name_or_skipped(tmp_path, damage, message):
    davis_set(tmp_path / "set")
    damage(tmp_path / "set")
    with pytest.raises(ShardError, match=message):
        convert(tmp_path / "set", tmp_path / "out", "--splits", "train")
    convert(tmp_path / "set", tmp_path / "out", "--splits", "train", "--on-bad-sample", "skip")
    assert [sample["key"] for sample in load_back(tmp_path / "out", "davis-train")] == ["000001"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("bear\nbear\n", "'bear' twice"),
        ("../bear\n", r"got '\.\./bear'"),
        ("/JPEGImages/480p/bear/00000.jpg /Annotations/x.png\n", "Take the 2017 lists"),
    ],
)
def test_bad_lists_are_refused(tmp_path, text, message):
    davis_set(tmp_path / "set")
    (tmp_path / "set" / "ImageSets" / "2017" / "train.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "set", tmp_path / "out", "--splits", "train")


def test_missing_folders_and_lists_are_named(tmp_path):
    davis_set(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"2017/val\.txt, but there is no such file"):
        convert(tmp_path / "set", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"JPEGImages/1080p, but there is none\. Check --root and --resolution"):
        convert(tmp_path / "set", tmp_path / "out", "--resolution", "1080p")
    with pytest.raises(ConfigError, match="Check --root and --annotations"):
        convert(tmp_path / "set", tmp_path / "out", "--annotations", "Annotations_unsupervised")
