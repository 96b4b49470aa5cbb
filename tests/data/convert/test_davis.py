"""DAVIS folders, written here, to shards and back."""

from __future__ import annotations

import numpy as np
import pytest
from folder_sets import MADE_FRAMES, davis_set, load_back, run_convert
from PIL import Image

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
        assert (sample["info.json"]["void_pixels"], sample["info.json"]["object_ids"]) == (3, [1, 2])
    assert len(load_back(tmp_path / "out", "davis-validation")) == 1


def test_a_first_frame_alone_is_kept_under_another_name(tmp_path):
    _, ids = davis_set(tmp_path / "set", ["bear"], "test-dev", masks=1)
    convert(tmp_path / "set", tmp_path / "out", "--splits", "test-dev", "--short-side", 6)
    (sample,) = load_back(tmp_path / "out", "davis-test-dev")
    assert "segmentations.npy.gz" not in sample
    first = np.where(ids["bear"][:1] == 255, 0, ids["bear"][:1])
    np.testing.assert_array_equal(sample["first_segmentation.npy.gz"], first[:, 1::2, 1::2, None])
    assert sample["video.npy"].shape == (MADE_FRAMES, 6, 10, 3)
    davis_set(tmp_path / "none", ["bear"], masks=0)
    convert(tmp_path / "none", tmp_path / "out", "--splits", "train")
    assert sorted(load_back(tmp_path / "out", "davis-train")[0]) == ["info.json", "key", "video.npy"]


def _picture(folder, name, mode, size):
    return lambda root: Image.new(mode, size).save(root / folder / "480p" / "bear" / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "Annotations/480p/bear/00002.png").unlink(), "00002.jpg"),
        (lambda root: (root / "JPEGImages/480p/bear/00002.jpg").unlink(), "00002.png"),
        (_picture("Annotations", "00002.png", "L", (10, 12)), "12 x 10"),
        (_picture("Annotations", "00002.png", "RGB", (20, 12)), "grey or palette"),
        (_picture("JPEGImages", "00002.jpg", "RGB", (22, 12)), "12 x 22"),
        (lambda root: [p.unlink() for p in (root / "JPEGImages/480p/bear").iterdir()], "have frames"),
    ],
)
def test_bad_videos_are_refused_by_name_or_skipped(tmp_path, damage, message):
    davis_set(tmp_path / "set")
    damage(tmp_path / "set")
    with pytest.raises(ShardError, match=rf"video bear.*{message}"):
        convert(tmp_path / "set", tmp_path / "out", "--splits", "train")
    convert(tmp_path / "set", tmp_path / "out", "--splits", "train", "--on-bad-sample", "skip")
    assert [sample["key"] for sample in load_back(tmp_path / "out", "davis-train")] == ["000001"]


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("", (), "0 names"),
        ("bear\nbear\n", (), "each once"),
        ("../bear\n", (), r"\.\./bear"),
        (None, (), "val.txt"),
        ("bear", ("--resolution", "1080p"), "--resolution"),
        ("bear", ("--annotations", "Annotations_unsupervised"), "--annotations"),
    ],
)
def test_bad_lists_and_missing_folders_are_refused(tmp_path, text, words, message):
    davis_set(tmp_path / "set")
    if text is not None:
        (tmp_path / "set" / "ImageSets" / "2017" / "val.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "set", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
