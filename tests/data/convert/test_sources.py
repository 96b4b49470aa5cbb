"""MOVi records, YouTube-VIS and DAVIS folders, written here, to shards and back."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from folder_sets import (
    contents,
    davis_set,
    load_back,
    movi_features,
    png,
    rle_counts,
    run_convert,
    write_json,
    write_movi,
    write_records,
    ytvis_set,
)
from PIL import Image
from pycocotools import mask as coco

from ssync_pl.data.convert.ytvis import draw_mask
from ssync_pl.errors import ConfigError, ShardError


def convert(source, root, out, *words):
    return run_convert(source, "--root", root, "--out", out, *words)


# -- MOVi -------------------------------------------------------------------------------------------------------------


def record_file(number, total):
    return f"movi_c-train.tfrecord-{number:05d}-of-{total:05d}"


@pytest.mark.parametrize("layout", ["", "movi_c/8x8/1.0.0"])
def test_movi_videos_and_masks_come_back_exactly(tmp_path, layout, capsys):
    truths = write_movi(tmp_path / "tfds" / layout)
    write_movi(tmp_path / "tfds" / layout, "validation", (1,))
    write_movi(tmp_path / "tfds" / f"{layout}x.incompleteABC123", counts=(1,))  # an unfinished download
    words = ("--samples-per-shard", 2)
    assert convert("movi", tmp_path / "tfds", tmp_path / "out", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("movi_c-train: 5 videos, 15 frames, ")
    assert lines[1] == f"  shards: {tmp_path}/out/movi_c-train-{{000000..000002}}.tar"
    assert len(load_back(tmp_path / "out", "movi_c-validation")) == 1
    samples = load_back(tmp_path / "out", "movi_c-train")
    for number, (sample, (video, masks)) in enumerate(zip(samples, truths, strict=True)):
        assert sorted(sample) == ["info.json", "key", "segmentations.npy.gz", "video.npy"]
        np.testing.assert_array_equal(sample["video.npy"], video)
        np.testing.assert_array_equal(sample["segmentations.npy.gz"], masks[..., None])
        assert (sample["info.json"]["fps"], sample["info.json"]["video_name"]) == (12, str(number))
    (tmp_path / "tfds").rename(tmp_path / "moved")  # the originals may move
    before = contents(tmp_path / "out")
    convert("movi", tmp_path / "moved", tmp_path / "out", *words, "--splits", "train")
    assert "of which 3 were there already" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before
    with pytest.raises(ConfigError, match="train, validation"):
        convert("movi", tmp_path / "moved", tmp_path / "out", "--splits", "test")


def test_mp4_is_lossy_keeps_the_masks_and_refuses_odd_sizes(tmp_path):
    ((_, masks),) = write_movi(tmp_path / "even", counts=(1,), size=16)
    convert("movi", tmp_path / "even", tmp_path / "out", "--video-format", "mp4")
    (sample,) = load_back(tmp_path / "out", "movi_c-train")
    assert sample["video.mp4"].shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(sample["segmentations.npy.gz"][..., 0], masks)
    write_movi(tmp_path / "odd", counts=(1,), size=9)
    with pytest.raises(ShardError, match="9 x 9"):
        convert("movi", tmp_path / "odd", tmp_path / "out2", "--video-format", "mp4")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda root: (root / record_file(1, 3)).unlink(), ShardError, r"\[1\]"),
        (lambda root: (root / record_file(2, 4)).write_bytes(b""), ShardError, "-of-00003.*-of-00004"),
        (lambda root: (root / record_file(3, 3)).write_bytes(b""), ShardError, r"\[3\]"),
        (lambda root: [path.unlink() for path in root.iterdir()], ConfigError, "movi_c-train.tfrecord"),
        (lambda root: write_movi(root / "movi_e", name="movi_e"), ConfigError, "movi_e in"),
        (lambda root: os.truncate(root / record_file(1, 3), 200), ShardError, "truncated"),
        (lambda root: (root / record_file(1, 3)).write_bytes(b"no record" * 9), ShardError, "checksum"),
        (lambda root: (root / "dataset_info.json").write_text("{"), ShardError, "JSON"),
        (
            lambda root: write_json(
                root / "dataset_info.json",
                {"splits": [{"name": "test", "shardLengths": ["9"]}, {"name": "train", "shardLengths": ["2", "3"]}]},
            ),
            ShardError,
            "Expected 5 records",
        ),
    ],
)
def test_movi_files_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, damage, error, message):
    write_movi(tmp_path / "in", counts=(1, 1, 1))
    damage(tmp_path / "in")
    with pytest.raises(error, match=message):
        convert("movi", tmp_path / "in", tmp_path / "out", "--on-bad-sample", "skip")
    assert not (tmp_path / "out").exists()


def _pngs(count: int, shape: tuple[int, ...], dtype: type = np.uint8) -> tuple[list[bytes], str]:
    return [png(np.zeros(shape, dtype)) for _ in range(count)], "byte"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": None}, "`video`"),
        ({"segmentations": None}, "`segmentations`"),
        ({"video": ([1], "int")}, "`video`"),
        ({"video": ([b"no picture"] * 3, "byte")}, "frame 0 of `video`"),
        ({"segmentations": _pngs(3, (8, 8, 3))}, "RGB"),
        ({"segmentations": _pngs(3, (8, 8), np.uint16)}, "8 bits"),
        ({"segmentations": _pngs(2, (8, 8))}, "segmentations"),
        ({"video": (_pngs(2, (8, 8, 3))[0] + _pngs(1, (8, 9, 3))[0], "byte")}, "one size"),
        ("flip", "checksum"),
    ],
)
def test_damaged_movi_records_are_named_or_left_out(tmp_path, change, message):
    path = tmp_path / record_file(0, 1)
    changed = {**movi_features(0), **({} if change == "flip" else change)}
    write_records(path, [{name: one for name, one in changed.items() if one}, movi_features(1)])
    if change == "flip":
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    with pytest.raises(ShardError, match=rf"{path.name} at byte 0.*{message}|{message}.*{path.name} at byte 0"):
        convert("movi", tmp_path, tmp_path / "out")
    convert("movi", tmp_path, tmp_path / "out", "--on-bad-sample", "skip")
    assert [sample["key"] for sample in load_back(tmp_path / "out", "movi_c-train")] == ["000001"]


# -- YouTube-VIS ------------------------------------------------------------------------------------------------------

ALL = ("--splits", "train", "--holdout", 0)


def test_ytvis_frames_masks_and_facts_come_back_and_the_last_videos_are_held_out(tmp_path):
    content, frames, masks = ytvis_set(tmp_path / "set", videos=4)
    convert("ytvis2021", tmp_path / "set", tmp_path / "out", "--holdout", 2, "--short-side", "none")
    samples = [*load_back(tmp_path / "out", "ytvis-train"), *load_back(tmp_path / "out", "ytvis-validation")]
    assert [sample["key"] for sample in samples] == ["000000", "000001"] * 2
    for video, sample, frame, mask in zip(content["videos"], samples, frames, masks, strict=True):
        np.testing.assert_array_equal(sample["video.npy"], frame)
        np.testing.assert_array_equal(sample["segmentations.npy.gz"], mask)
        info = sample["info.json"]
        assert (info["video_id"], info["file_names"]) == (video["id"], video["file_names"])
        assert info["categories"] == [f"thing {number}" for number in info["category_ids"]]
        assert len(info["instance_ids"]) == video["id"] - 10
    convert("ytvis2021", tmp_path / "set", tmp_path / "small", *ALL, "--short-side", 7)
    for sample, video, mask in zip(load_back(tmp_path / "small", "ytvis-train"), frames, masks, strict=True):
        resized = [Image.fromarray(frame).resize((11, 7), Image.Resampling.BICUBIC) for frame in video]
        np.testing.assert_array_equal(sample["video.npy"], np.stack(list(map(np.asarray, resized))))
        rows, columns = ((np.arange(7) + 0.5) * 12 / 7).astype(int), ((np.arange(11) + 0.5) * 20 / 11).astype(int)
        np.testing.assert_array_equal(sample["segmentations.npy.gz"], mask[:, rows[:, None], columns])


def test_ytvis_without_annotations_and_with_crowds(tmp_path):
    content, _, _ = ytvis_set(tmp_path / "set", "valid")
    write_json(tmp_path / "set" / "valid" / "instances.json", {**content, "annotations": None})
    convert("ytvis2019", tmp_path / "set", tmp_path / "out", "--splits", "valid")
    assert [sorted(s) for s in load_back(tmp_path / "out", "ytvis-valid")] == [["info.json", "key", "video.npy"]] * 3
    content, _, _ = ytvis_set(tmp_path / "set")
    content["annotations"][1]["iscrowd"] = 1
    write_json(tmp_path / "set" / "train" / "train.json", content)  # an official place
    os.unlink(tmp_path / "set" / "train" / "instances.json")
    convert("ytvis2019", tmp_path / "set", tmp_path / "out", *ALL)
    assert load_back(tmp_path / "out", "ytvis-train")[2]["segmentations.npy.gz"].shape[-1] == 1


@pytest.mark.parametrize("seed", range(3))
def test_segmentations_of_every_kind_are_drawn_as_pycocotools_draws_them(seed):
    size = (9, 13)
    mask = (np.random.default_rng(seed).random(size) < (0.1, 0.5, 0.9)[seed]).astype(np.uint8)
    mask[0, 0] = seed % 2
    counts = rle_counts(mask)
    packed = coco.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"]
    for form in (counts, packed.decode()):
        np.testing.assert_array_equal(draw_mask({"size": list(size), "counts": form}, size, "a mask"), mask)
    polygon = [[2.5, 1.5, 12.0, 3.0, 7.0, 8.5]]
    expected = coco.decode(coco.merge(coco.frPyObjects(polygon, *size)))
    np.testing.assert_array_equal(draw_mask(polygon, size, "a mask"), expected)


@pytest.mark.parametrize(
    "segmentation",
    [
        *({"size": [12, 20], "counts": counts} for counts in ([1, 2, 3], [241, -1], ["a"], None, [])),
        *({"size": [12, 20], "counts": counts} for counts in ("12", "oooo", "o" * 40 + "1", "é", "")),
        {"size": [20, 12], "counts": [240]},
        {"counts": [240]},
        "mask",
        *(
            [polygon]
            for polygon in ([0, 0, 2], [0, 0, 2, 2, 1, float("nan")], [0, 0, 2, 2, 1, 1e9], [0] * 7, 3, ["a"] * 6)
        ),
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
        (lambda content, root: os.truncate(_frame(root), 300), r"00001\.jpg"),
        (lambda content, root: Image.new("RGB", (21, 12)).save(_frame(root)), "12 x 21"),
        (lambda content, root: content["videos"][2].update(height=13), r"\[13, 20\]"),
        (lambda content, root: content["videos"][2].update(file_names=[], length=0), "frames"),
        (lambda content, root: content["annotations"][1]["segmentations"].pop(), "instance 200"),
        (_edit(category_id=256), "instance 200"),
        (_edit(category_id="cat"), "instance 200"),
        (_edit(segmentations=[{"size": [12, 20], "counts": [1, 2, 3]}] * 4), "frame 0 of instance 200"),
    ],
)
def test_a_bad_ytvis_video_is_refused_by_name_or_skipped(tmp_path, damage, message, capsys):
    content, _, _ = ytvis_set(tmp_path / "set")
    damage(content, tmp_path / "set")
    write_json(tmp_path / "set" / "train" / "instances.json", content)
    with pytest.raises(ShardError, match=message):
        convert("ytvis2021", tmp_path / "set", tmp_path / "out", *ALL)
    assert not list((tmp_path / "out").glob("*.tar"))
    convert("ytvis2021", tmp_path / "set", tmp_path / "out", *ALL, "--on-bad-sample", "skip")
    assert [sample["info.json"]["video_id"] for sample in load_back(tmp_path / "out", "ytvis-train")] == [10, 11]
    assert "skipped 1 video:\n    000002: Expected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [], "videos"),
        (lambda c: {"images": []}, "videos"),
        (lambda c: {**c, "videos": [{"id": 1}]}, "file_names"),
        (lambda c: {**c, "videos": ["a"]}, "videos"),
        (lambda c: {**c, "videos": c["videos"] * 2}, "twice"),
        (lambda c: {**c, "videos": [{**c["videos"][0], "length": 9}]}, "length is 9"),
        (lambda c: {**c, "videos": [{**c["videos"][0], "height": "12"}]}, "height"),
        (lambda c: {**c, "videos": [{**c["videos"][0], "file_names": ["../a"] * 4}]}, "relative paths"),
        (lambda c: {**c, "videos": [{**c["videos"][0], "file_names": ["/etc/a"] * 4}]}, "relative paths"),
        (lambda c: {**c, "categories": [{"id": 1}]}, "categories"),
        (lambda c: {**c, "annotations": [{"id": 1, "bbox": []}]}, "segmentations"),
        (lambda c: {**c, "annotations": [{**c["annotations"][0], "video_id": 99}]}, "unknown video 99"),
    ],
)
def test_ytvis_files_of_another_format_are_refused(tmp_path, change, message):
    content, _, _ = ytvis_set(tmp_path / "set", videos=2)
    path = tmp_path / "set" / "train" / "instances.json"
    for text in (json.dumps(change(content)), json.dumps(content)[:-40]):
        path.write_text(text)
        with pytest.raises(ShardError, match=message if text.endswith("}") or text == "[]" else "JSON"):
            convert("ytvis2021", tmp_path / "set", tmp_path / "out", "--holdout", 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--holdout", 3), "--holdout"),
        ((), "--holdout"),
        (("--holdout", 0), "--holdout"),
        (("--splits", "valid"), "valid/JPEGImages"),
        (("--holdout", 1, "--splits", "test"), "annotations of split `test`"),
    ],
)
def test_ytvis_settings_that_do_not_fit_write_nothing(tmp_path, words, message):
    ytvis_set(tmp_path / "set")
    (tmp_path / "set" / "test" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(ConfigError, match=message):
        convert("ytvis2021", tmp_path / "set", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


# -- DAVIS ------------------------------------------------------------------------------------------------------------


def test_davis_frames_and_ids_come_back_and_void_is_background(tmp_path):
    made = davis_set(tmp_path / "set")
    davis_set(tmp_path / "set", ("zoo",), "val")
    assert convert("davis", tmp_path / "set", tmp_path / "out") == 0
    for sample, (name, (frames, ids)) in zip(load_back(tmp_path / "out", "davis-train"), made.items(), strict=True):
        np.testing.assert_array_equal(sample["video.npy"], frames)
        np.testing.assert_array_equal(sample["segmentations.npy.gz"], np.where(ids == 255, 0, ids)[..., None])
        assert sample["info.json"]["video"] == f"JPEGImages/480p/{name}"
        assert sample["info.json"]["object_ids"] == [1, 2]
    assert len(load_back(tmp_path / "out", "davis-validation")) == 1


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
def test_bad_davis_videos_are_refused_by_name_or_skipped(tmp_path, damage, message):
    davis_set(tmp_path / "set")
    damage(tmp_path / "set")
    with pytest.raises(ShardError, match=rf"bear.*{message}"):
        convert("davis", tmp_path / "set", tmp_path / "out", "--splits", "train")
    convert("davis", tmp_path / "set", tmp_path / "out", "--splits", "train", "--on-bad-sample", "skip")
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
def test_bad_davis_lists_and_missing_folders_are_refused(tmp_path, text, words, message):
    davis_set(tmp_path / "set")
    if text is not None:
        (tmp_path / "set" / "ImageSets" / "2017" / "val.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        convert("davis", tmp_path / "set", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
