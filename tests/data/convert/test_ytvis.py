"""YouTube-VIS folders, written here, to shards and back."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from folder_sets import MADE_FRAMES, load_back, rle_counts, run_convert, write_json, ytvis_set
from PIL import Image
from pycocotools import mask as coco

from ssync_pl.data.convert.pictures import resize_frame, resize_ids
from ssync_pl.data.convert.ytvis import draw_mask, read_annotations
from ssync_pl.data.index import read_index
from ssync_pl.errors import ConfigError, ShardError

ALL = ("--splits", "train", "--holdout", 0)


def convert(root, out, *words):
    return run_convert("ytvis2021", "--root", root, "--out", out, *words)


def test_frames_masks_and_facts_come_back_and_the_last_videos_are_held_out(tmp_path):
    content, frames, masks = ytvis_set(tmp_path / "set", videos=4)
    assert convert(tmp_path / "set", tmp_path / "out", "--holdout", 2, "--short-side", "none") == 0
    samples = [*load_back(tmp_path / "out", "ytvis-train"), *load_back(tmp_path / "out", "ytvis-validation")]
    assert [sample["key"] for sample in samples] == ["000000", "000001"] * 2
    for video, sample, frame, mask in zip(content["videos"], samples, frames, masks, strict=True):
        np.testing.assert_array_equal(sample["video.npy"], frame)
        np.testing.assert_array_equal(sample["segmentations.npy.gz"], mask)
        info = sample["info.json"]
        assert (info["video_id"], info["file_names"]) == (video["id"], video["file_names"])
        assert info["categories"] == [f"thing {number}" for number in info["category_ids"]]
        assert len(info["instance_ids"]) == video["id"] - 10


def test_resizing_takes_the_filter_for_frames_and_the_nearest_pixel_for_masks(tmp_path):
    _, frames, masks = ytvis_set(tmp_path / "set")
    convert(tmp_path / "set", tmp_path / "out", *ALL, "--short-side", 7)
    for sample, video, mask in zip(load_back(tmp_path / "out", "ytvis-train"), frames, masks, strict=True):
        assert sample["video.npy"].shape == (MADE_FRAMES, 7, 11, 3)
        np.testing.assert_array_equal(sample["video.npy"], [resize_frame(frame, (7, 11)) for frame in video])
        np.testing.assert_array_equal(sample["segmentations.npy.gz"], [resize_ids(frame, (7, 11)) for frame in mask])


def test_splits_without_annotations_crowds_and_no_masks(tmp_path, capsys):
    ytvis_set(tmp_path / "set", "valid", annotated=False)
    convert(tmp_path / "set", tmp_path / "out", "--splits", "valid")
    assert [sorted(s) for s in load_back(tmp_path / "out", "ytvis-valid")] == [["info.json", "key", "video.npy"]] * 3
    content, _, _ = ytvis_set(tmp_path / "set")
    content["annotations"][1]["iscrowd"] = 1
    write_json(tmp_path / "set" / "train" / "train.json", content)  # an official place
    os.unlink(tmp_path / "set" / "train" / "instances.json")
    convert(tmp_path / "set", tmp_path / "out", *ALL)
    assert load_back(tmp_path / "out", "ytvis-train")[2]["segmentations.npy.gz"].shape[-1] == 1
    assert "left out 1 crowd annotation" in capsys.readouterr().out
    convert(tmp_path / "set", tmp_path / "bare", *ALL, "--no-masks")
    assert all("segmentations.npy.gz" not in sample for sample in load_back(tmp_path / "bare", "ytvis-train"))


def test_processes_write_the_same_bytes_and_a_second_run_keeps_them(tmp_path, capsys):
    ytvis_set(tmp_path / "set", videos=4)
    words = (*ALL, "--samples-per-shard", 2)
    convert(tmp_path / "set", tmp_path / "one", *words)
    convert(tmp_path / "set", tmp_path / "two", *words, "--workers", 2)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.tar")} for n in ("one", "two"))
    assert one == two
    assert len(one) == 2
    convert(tmp_path / "set", tmp_path / "one", *words)
    assert "of which 2 were there already" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(3))
def test_segmentations_of_every_kind_are_drawn_as_pycocotools_draws_them(seed):
    size = (9, 13)
    mask = (np.random.default_rng(seed).random(size) < (0.1, 0.5, 0.9)[seed]).astype(np.uint8)
    mask[0, 0] = seed % 2
    counts = rle_counts(mask)
    packed = coco.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"]
    for form in (counts, packed, packed.decode()):
        np.testing.assert_array_equal(draw_mask({"size": list(size), "counts": form}, size, "a mask"), mask)
    polygon = [[2.5, 1.5, 12.0, 3.0, 7.0, 8.5]]
    expected = coco.decode(coco.merge(coco.frPyObjects(polygon, *size)))
    np.testing.assert_array_equal(draw_mask(polygon, size, "a mask"), expected)


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [12, 20], "counts": [1, 2, 3]},
        {"size": [12, 20], "counts": [241, -1]},
        {"size": [12, 20], "counts": ["a"]},
        {"size": [12, 20], "counts": None},
        {"size": [20, 12], "counts": [240]},
        {"size": [12, 20], "counts": "12"},
        {"size": [12, 20], "counts": "oooo"},
        {"size": [12, 20], "counts": "o" * 40 + "1"},
        {"size": [12, 20], "counts": "é"},
        {"counts": [240]},
        "mask",
        [[0, 0, 2]],
        [[0, 0, 2, 2, 1, float("nan")]],
        [[0, 0, 2, 2, 1, 1e9]],
        [[0, 0, 2, 2, 1, 1, 1]],
    ],
)
def test_damaged_segmentations_are_refused_by_name(segmentation):
    with pytest.raises(ShardError, match="frame 0 of instance 7"):
        draw_mask(segmentation, (12, 20), "frame 0 of instance 7")


def _frame(root):
    return root / "train" / "JPEGImages" / "vid 2 é" / "00001.jpg"


def _edit(**values):
    return lambda content, root: content["annotations"][1].update(values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content, root: _frame(root).unlink(), r"00001\.jpg"),
        (lambda content, root: _frame(root).write_bytes(_frame(root).read_bytes()[:300]), r"00001\.jpg"),
        (lambda content, root: Image.new("RGB", (21, 12)).save(_frame(root)), "12 x 21"),
        (lambda content, root: content["videos"][2].update(height=13), "13 x 20"),
        (lambda content, root: content["videos"][2].update(file_names=[], length=0), "frames"),
        (lambda content, root: content["annotations"][1]["segmentations"].pop(), "instance 200"),
        (_edit(category_id=256), "category id of instance 200"),
        (_edit(category_id="cat"), "category id of instance 200"),
        (_edit(segmentations=[{"size": [12, 20], "counts": [1, 2, 3]}] * 4), "frame 0 of instance 200"),
    ],
)
def test_a_bad_video_is_refused_by_name_or_skipped(tmp_path, damage, message, capsys):
    content, _, _ = ytvis_set(tmp_path / "set")
    damage(content, tmp_path / "set")
    write_json(tmp_path / "set" / "train" / "instances.json", content)
    with pytest.raises(ShardError, match=message):
        convert(tmp_path / "set", tmp_path / "out", *ALL)
    assert not list((tmp_path / "out").glob("*.tar"))
    convert(tmp_path / "set", tmp_path / "out", *ALL, "--on-bad-sample", "skip")
    assert [sample["info.json"]["video_id"] for sample in load_back(tmp_path / "out", "ytvis-train")] == [10, 11]
    assert "skipped 1 video" in capsys.readouterr().out


def test_annotations_of_unknown_videos_are_refused_or_left_out(tmp_path, caplog):
    content, _, _ = ytvis_set(tmp_path / "set")
    content["annotations"][1]["video_id"] = 99
    write_json(tmp_path / "set" / "train" / "instances.json", content)
    with pytest.raises(ShardError, match="unknown video 99"):
        convert(tmp_path / "set", tmp_path / "out", *ALL)
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "set", tmp_path / "out", *ALL, "--on-bad-sample", "skip")
    assert "unknown video 99" in caplog.text
    recipe = read_index(tmp_path / "out").recipe["ytvis-train"]
    assert recipe["left_out"]["unknown_videos"] == ["annotation 200 of the unknown video 99"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [], "videos"),
        (lambda c: {"images": []}, "videos"),
        (lambda c: {**c, "videos": [{"id": 1}]}, "file_names"),
        (lambda c: {**c, "videos": ["a"]}, "videos"),
        (lambda c: {**c, "videos": c["videos"] * 2}, "twice"),
        (lambda c: {**c, "videos": [{**c["videos"][0], "length": 9}]}, "9 files"),
        (lambda c: {**c, "videos": [{**c["videos"][0], "height": "12"}]}, "height"),
        (lambda c: {**c, "videos": [{**c["videos"][0], "file_names": ["../a"] * 4}]}, "relative paths"),
        (lambda c: {**c, "videos": [{**c["videos"][0], "file_names": ["/etc/a"] * 4}]}, "relative paths"),
        (lambda c: {**c, "categories": [{"id": 1}]}, "categories"),
        (lambda c: {**c, "annotations": [{"id": 1, "bbox": []}]}, "segmentations"),
    ],
)
def test_files_of_another_format_are_refused(tmp_path, change, message):
    content, _, _ = ytvis_set(tmp_path)
    write_json(tmp_path / "train.json", change(content))
    with pytest.raises(ShardError, match=message):
        read_annotations(tmp_path / "train.json")
    (tmp_path / "train.json").write_text(json.dumps(content)[:-40])
    with pytest.raises(ShardError, match="JSON"):
        read_annotations(tmp_path / "train.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--holdout", 3), "--holdout"),
        ((), "--holdout"),
        (("--holdout", 0), "--holdout"),
        (("--splits", "valid"), "annotations of split `valid`"),
    ],
)
def test_settings_that_do_not_fit_write_nothing(tmp_path, words, message):
    ytvis_set(tmp_path / "set")
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "set", tmp_path / "out", *words)
    os.rename(tmp_path / "set" / "train" / "JPEGImages", tmp_path / "set" / "train" / "Images")
    with pytest.raises(ConfigError, match=r"JPEGImages|valid"):
        convert(tmp_path / "set", tmp_path / "out", "--holdout", 1, *words)
    assert not (tmp_path / "out").exists()
