"""YouTube-VIS folders, written here, to shards and back."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from folder_sets import MADE_FRAMES, load_back, run_convert, write_json, ytvis_set
from PIL import Image

from ssync_pl.data import ShardDataModule
from ssync_pl.data.convert.pictures import resize_frame, resize_ids
from ssync_pl.data.convert.ytvis_index import read_annotations
from ssync_pl.data.index import read_index
from ssync_pl.errors import ConfigError, ShardError


def convert(root, out, *words, command="ytvis2021"):
    return run_convert(command, "--root", root, "--out", out, "--short-side", "none", *words)


@pytest.mark.parametrize("command", ["ytvis2019", "ytvis2021"])
def test_videos_and_masks_come_back_exactly(tmp_path, command, capsys):
    _, frames, masks = ytvis_set(tmp_path / "set", videos=4)
    assert convert(tmp_path / "set", tmp_path / "out", "--holdout", 2, command=command) == 0
    train, validation = (load_back(tmp_path / "out", f"ytvis-{split}") for split in ("train", "validation"))
    assert [sample["key"] for sample in train] == [sample["key"] for sample in validation] == ["000000", "000001"]
    for sample, video, mask in zip(train + validation, frames, masks, strict=True):
        np.testing.assert_array_equal(sample["video.npy"], video)
        np.testing.assert_array_equal(sample["segmentations.npy.gz"], mask)
        assert sample["segmentations.npy.gz"].dtype == np.uint8
    assert validation[1]["info.json"] == {
        "video_id": 13,
        "file_names": [f"vid 3 é/{t:05d}.jpg" for t in range(MADE_FRAMES)],
        "original_size": [12, 20],
        "instance_ids": [300, 301, 302],
        "category_ids": [5, 40, 5],
        "categories": ["thing 5", "thing 40", "thing 5"],
    }
    assert read_index(tmp_path / "out").recipe["ytvis-validation"]["format"] == command
    assert "ytvis-validation: 2 videos, 8 frames" in capsys.readouterr().out


def test_the_loader_takes_the_shards_with_overlapping_channels(tmp_path):
    _, frames, masks = ytvis_set(tmp_path / "set", videos=4)
    convert(tmp_path / "set", tmp_path / "out", "--holdout", 2)
    data = ShardDataModule(
        validation=str(tmp_path / "out" / "ytvis-validation-*.tar"), batch_size=2, num_workers=0,
        has_background=False, mask_format="channels", mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    data.prepare_data()
    data.setup("validate")
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    for place, number in enumerate((2, 3)):
        video = (batch["video"][place] * 255).round().byte().permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(video, frames[number])
        truth = np.moveaxis(masks[number], -1, 1) != 0
        assert (truth.sum(1) > 1).any()
        found = batch["segmentations"][place].numpy()
        np.testing.assert_array_equal(found[:, : truth.shape[1]], truth)
        assert not found[:, truth.shape[1] :].any()


def test_resizing_takes_the_filter_for_frames_and_the_nearest_pixel_for_masks(tmp_path):
    _, frames, masks = ytvis_set(tmp_path / "set", videos=3)
    words = ("--splits", "train", "--holdout", 0, "--short-side", 7)
    convert(tmp_path / "set", tmp_path / "out", *words)
    convert(tmp_path / "set", tmp_path / "near", *words, "--resample", "nearest")
    for sample, near, video, mask in zip(
        load_back(tmp_path / "out", "ytvis-train"),
        load_back(tmp_path / "near", "ytvis-train"),
        frames,
        masks,
        strict=True,
    ):
        assert sample["video.npy"].shape == (MADE_FRAMES, 7, 11, 3)
        np.testing.assert_array_equal(sample["video.npy"], [resize_frame(frame, (7, 11)) for frame in video])
        np.testing.assert_array_equal(near["video.npy"], [resize_ids(frame, (7, 11)) for frame in video])
        expected = [resize_ids(frame, (7, 11)) for frame in mask]
        np.testing.assert_array_equal(sample["segmentations.npy.gz"], expected)


def test_splits_without_annotations_get_no_masks(tmp_path):
    ytvis_set(tmp_path / "set", "valid", annotated=False)
    convert(tmp_path / "set", tmp_path / "out", "--splits", "valid")
    samples = load_back(tmp_path / "out", "ytvis-valid")
    assert [sorted(sample) for sample in samples] == [["info.json", "key", "video.npy"]] * 3
    assert "categories" not in samples[0]["info.json"]


def test_masks_can_be_left_out(tmp_path):
    ytvis_set(tmp_path / "set")
    convert(tmp_path / "set", tmp_path / "out", "--splits", "train", "--holdout", 0, "--no-masks")
    assert all("segmentations.npy.gz" not in sample for sample in load_back(tmp_path / "out", "ytvis-train"))


@pytest.mark.parametrize("place", ["train.json", "train/train.json"])
def test_annotations_are_found_at_the_official_places(tmp_path, place):
    ytvis_set(tmp_path, videos=2)
    os.rename(tmp_path / "train" / "instances.json", tmp_path / place)
    assert convert(tmp_path, tmp_path / "out", "--splits", "train", "--holdout", 0) == 0


def test_two_processes_write_the_same_bytes_and_a_second_run_keeps_them(tmp_path, capsys):
    ytvis_set(tmp_path / "set", videos=4)
    words = ("--splits", "train", "--holdout", 0, "--samples-per-shard", 2)
    convert(tmp_path / "set", tmp_path / "one", *words)
    convert(tmp_path / "set", tmp_path / "two", *words, "--workers", 2)
    names = sorted(path.name for path in (tmp_path / "one").glob("*.tar"))
    assert len(names) == 2
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    capsys.readouterr()
    convert(tmp_path / "set", tmp_path / "one", *words)
    assert "of which 2 were there already" in capsys.readouterr().out


def test_polygons_are_drawn_as_pycocotools_draws_them(tmp_path):
    coco = pytest.importorskip("pycocotools.mask")
    content, _, _ = ytvis_set(tmp_path / "set", videos=2)
    polygon = [[2.5, 1.5, 15.0, 3.0, 9.0, 10.5]]
    content["annotations"][0]["segmentations"][2] = polygon
    write_json(tmp_path / "set" / "train" / "instances.json", content)
    convert(tmp_path / "set", tmp_path / "out", "--splits", "train", "--holdout", 0)
    expected = coco.decode(coco.merge(coco.frPyObjects(polygon, 12, 20))) * 5
    assert expected.any()
    np.testing.assert_array_equal(
        load_back(tmp_path / "out", "ytvis-train")[1]["segmentations.npy.gz"][2, ..., 0], expected
    )


def test_crowds_are_left_out_and_said(tmp_path, capsys):
    content, _, _ = ytvis_set(tmp_path / "set")
    content["annotations"][1]["iscrowd"] = 1
    write_json(tmp_path / "set" / "train" / "instances.json", content)
    convert(tmp_path / "set", tmp_path / "out", "--splits", "train", "--holdout", 0)
    assert load_back(tmp_path / "out", "ytvis-train")[2]["segmentations.npy.gz"].shape[-1] == 1
    assert "left out 1 crowd annotation" in capsys.readouterr().out


def _edit(key, value, number=2):
    def change(content, root):
        content["annotations"][number - 1][key] = value

    return change


def _missing_frame(content, root):
    (root / "train" / "JPEGImages" / "vid 2 é" / "00001.jpg").unlink()


def _cut_frame(content, root):
    path = root / "train" / "JPEGImages" / "vid 2 é" / "00001.jpg"
    path.write_bytes(path.read_bytes()[:300])


def _other_size(content, root):
    Image.new("RGB", (21, 12)).save(root / "train" / "JPEGImages" / "vid 2 é" / "00001.jpg")


def _short_masks(content, root):
    content["annotations"][1]["segmentations"].pop()


def _damaged_runs(content, root):
    content["annotations"][1]["segmentations"][0] = {"size": [12, 20], "counts": [1, 2, 3]}


def _negative_runs(content, root):
    content["annotations"][1]["segmentations"][0] = {"size": [12, 20], "counts": [241, -1]}


def _mask_size(content, root):
    content["annotations"][1]["segmentations"][0] = {"size": [20, 12], "counts": [240]}


def _no_frames(content, root):
    content["videos"][2].update(file_names=[], length=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing_frame, r"00001\.jpg of video 12 \(vid 2 é\) to be there, but it is missing"),
        (_cut_frame, r"00001\.jpg of video 12 \(vid 2 é\) to be a whole picture"),
        (_other_size, r"video 12 \(vid 2 é\) to be 12 x 20 .* but got 12 x 21"),
        (_short_masks, r"instance 200 of video 12 .* each of the 4 frames, but got 3"),
        (_damaged_runs, r"frame 0 of instance 200 of video 12 .* runs of 6 pixels together instead of 12 x 20"),
        (_negative_runs, r"frame 0 of instance 200 of video 12 .* the run lengths \[241, -1\]"),
        (_mask_size, r"frame 0 of instance 200 of video 12 .*\[12, 20\], but got \[20, 12\]"),
        (_edit("category_id", 256), r"category id of instance 200 of video 12 .* to be in 1\.\.255.*got 256"),
        (_edit("category_id", 0), r"1\.\.255.*got 0"),
        (_edit("category_id", "cat"), r"1\.\.255.*got 'cat'"),
        (_no_frames, "video 12 .* to have frames"),
    ],
)
def test_a_bad_video_is_refused_by_name_or_skipped(tmp_path, damage, message, capsys):
    content, _, _ = ytvis_set(tmp_path / "set")
    damage(content, tmp_path / "set")
    write_json(tmp_path / "set" / "train" / "instances.json", content)
    words = ("--splits", "train", "--holdout", 0)
    with pytest.raises(ShardError, match=message):
        convert(tmp_path / "set", tmp_path / "out", *words)
    assert not list((tmp_path / "out").glob("*.tar"))
    convert(tmp_path / "set", tmp_path / "out", *words, "--on-bad-sample", "skip")
    assert [sample["info.json"]["video_id"] for sample in load_back(tmp_path / "out", "ytvis-train")] == [10, 11]
    assert "skipped 1 video" in capsys.readouterr().out


def test_annotations_of_unknown_videos_are_refused_or_left_out(tmp_path, caplog):
    content, _, _ = ytvis_set(tmp_path / "set")
    content["annotations"][1]["video_id"] = 99
    write_json(tmp_path / "set" / "train" / "instances.json", content)
    words = ("--splits", "train", "--holdout", 0)
    with pytest.raises(ShardError, match="but got 1 that do not, first annotation 200 of the unknown video 99"):
        convert(tmp_path / "set", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "set", tmp_path / "out", *words, "--on-bad-sample", "skip")
    assert "unknown video 99" in caplog.text
    recipe = read_index(tmp_path / "out").recipe["ytvis-train"]
    assert recipe["left_out"]["unknown_videos"] == ["annotation 200 of the unknown video 99"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [], "to hold `videos`, `categories` and `annotations`, but got list"),
        (lambda c: {"images": []}, "but got images"),
        (
            lambda c: {**c, "videos": [{"id": 1}]},
            "video 0 to have `id`, `file_names`, `height` and `width`, but got id",
        ),
        (lambda c: {**c, "videos": ["a"]}, "but got str"),
        (lambda c: {**c, "videos": c["videos"] * 2}, "once, but got id 10 twice"),
        (lambda c: {**c, "videos": [{**c["videos"][0], "length": 9}]}, "id 10.* to list 9 files .* but got 4"),
        (lambda c: {**c, "videos": [{**c["videos"][0], "height": "12"}]}, "`height` and `width`"),
        (lambda c: {**c, "videos": [{**c["videos"][0], "file_names": ["../a"] * 4}]}, "relative paths .* '../a'"),
        (lambda c: {**c, "videos": [{**c["videos"][0], "file_names": ["/etc/a"] * 4}]}, "relative paths"),
        (lambda c: {**c, "categories": [{"id": 1}]}, "`categories` .* `id` and `name`"),
        (lambda c: {**c, "annotations": [{"id": 1, "bbox": []}]}, "a list `segmentations`, but got id, bbox"),
    ],
)
def test_files_of_another_format_are_refused(tmp_path, change, message):
    content, _, _ = ytvis_set(tmp_path)
    write_json(tmp_path / "train.json", change(content))
    with pytest.raises(ShardError, match=message):
        read_annotations(tmp_path / "train.json")


def test_a_cut_annotation_file_is_refused(tmp_path):
    ytvis_set(tmp_path)
    path = tmp_path / "train" / "instances.json"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ShardError, match=r"instances\.json to be a JSON file, but reading it failed"):
        read_annotations(path)


def test_run_lengths_are_held_as_short_strings(tmp_path):
    content, _, _ = ytvis_set(tmp_path)
    entry = read_annotations(tmp_path / "train" / "instances.json").videos[2]
    assert all(isinstance(mask["counts"], str) for thing in entry["objects"] for mask in thing["masks"] if mask)
    assert len(json.dumps(entry)) < len(json.dumps([content["annotations"][1:], content["videos"][2]]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--holdout", 3), "--holdout to be from 0 to 2, because .* has 3 videos, but got 3"),
        ((), "but got 300. Take a smaller number"),
        (("--holdout", 0), "above 0 for split `validation`"),
        (("--splits", "valid"), r"annotations of split `valid` at .*valid/instances\.json .* only train in"),
        (("--holdout", 1, "--short-side", 0), "--short-side to be from 1 to 8192, or none, but got 0"),
    ],
)
def test_settings_that_do_not_fit_write_nothing(tmp_path, words, message):
    ytvis_set(tmp_path / "set")
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "set", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(ConfigError, match="but got no such folder"):
        convert(tmp_path / "none", tmp_path / "out")
    ytvis_set(tmp_path / "set")
    os.rename(tmp_path / "set" / "train" / "JPEGImages", tmp_path / "set" / "train" / "Images")
    with pytest.raises(ConfigError, match=r"frames of the split in .*JPEGImages, but there is no such folder"):
        convert(tmp_path / "set", tmp_path / "out", "--holdout", 1)
