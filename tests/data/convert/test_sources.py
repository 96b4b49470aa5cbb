"""MOVi records, YouTube-VIS, DAVIS and own videos, written here, to shards and back."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from folder_sets import (
    contents,
    davis_set,
    encode_file,
    load_back,
    movi_features,
    own_set,
    png,
    rle_counts,
    smooth_video,
    write_json,
    write_movi,
    write_pictures,
    write_records,
    ytvis_set,
)
from PIL import Image
from pycocotools import mask as coco

from ssync_pl.cli import main, run_command
from ssync_pl.cli.commands import data
from ssync_pl.data.convert import media
from ssync_pl.data.convert.ytvis import draw_mask
from ssync_pl.data.decode import inspect_video
from ssync_pl.errors import ConfigError, ShardError

ALL = ("--splits", "train", "--holdout", 0)  # of YouTube-VIS


def convert(source: str, root: Path, out: Path, *words: object) -> int:
    """Run `ssync-pl data convert` quietly, in this process."""
    options = ("--root", root, "--out", out, "--workers", 0, "--no-progress", *words)
    return run_command("data", data, ["convert", source, *map(str, options)])


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["", "movi_c/8x8/1.0.0"])
def test_movi_comes_back_exactly(tmp_path, layout, capsys):
    truths = write_movi(tmp_path / "tfds" / layout)
    write_movi(tmp_path / "tfds" / layout, "validation", (1,))
    write_movi(tmp_path / "tfds" / f"{layout}x.incompleteABC123", counts=(1,))  # an unfinished download
    words = ("--samples-per-shard", 2)
    assert convert("movi", tmp_path / "tfds", tmp_path / "out", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("movi_c-train: videos: 5, frames: 15, shards: 3 (0 were there before)")
    assert lines[1] == f"  shards: {tmp_path}/out/movi_c-train-[0-9]*.tar"
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
    assert "3 were there before" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


def test_ytvis_comes_back_and_the_last_videos_are_held_out(tmp_path):
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


def test_davis_comes_back_and_void_is_background(tmp_path):
    made = davis_set(tmp_path / "set")
    davis_set(tmp_path / "set", ("zoo",), "val")
    assert convert("davis", tmp_path / "set", tmp_path / "out") == 0
    for sample, (name, (frames, ids)) in zip(load_back(tmp_path / "out", "davis-train"), made.items(), strict=True):
        np.testing.assert_array_equal(sample["video.npy"], frames)
        np.testing.assert_array_equal(sample["segmentations.npy.gz"], np.where(ids == 255, 0, ids)[..., None])
        assert sample["info.json"]["video"] == f"JPEGImages/480p/{name}"
        assert sample["info.json"]["object_ids"] == [1, 2]
    assert len(load_back(tmp_path / "out", "davis-validation")) == 1


def test_every_kind_of_own_video_comes_back_exactly_whole_or_in_clips(tmp_path, capsys):
    root, made = tmp_path / "my videos ü", {}
    for name, count in (("12:30.mkv", 6), ("clip 10.avi", 5)):  # a colon names no protocol
        made[name] = smooth_video(count, seed=count)
        root.mkdir(exist_ok=True)
        encode_file(root / f"x{name[-4:]}", made[name]).rename(root / name)
    made["frames é"] = smooth_video(12, seed=4)
    write_pictures(root / "frames é", made["frames é"], "f{}.png")  # f10 comes after f9
    made["x.GIF"] = smooth_video(3, seed=3)[..., :1].repeat(3, -1)
    shades = [Image.fromarray(frame[..., 0]) for frame in made["x.GIF"]]
    shades[0].save(root / "x.GIF", save_all=True, append_images=shades[1:], duration=100)
    (root / ".DS_Store").write_bytes(b"x")
    (root / "notes.txt").write_text("x")
    (root / "empty").mkdir()
    (root / "gone.mp4").symlink_to(root / "nowhere")
    assert convert("videos", root, tmp_path / "out") == 0
    for sample, (name, video) in zip(load_back(tmp_path / "out", "videos"), made.items(), strict=True):
        np.testing.assert_array_equal(sample["video.npy"], video)
        info, fps = sample["info.json"], None if name == "frames é" else 10
        expected = (name, fps, len(video), [10, 14])
        assert (info["video"], info["fps"], info["source_frames"], info["original_size"]) == expected
    text = capsys.readouterr().out
    for line in ("videos: videos: 4, frames: 26", "0 of 4 videos", "ignored 4: .DS_Store, empty, gone.mp4, notes.txt"):
        assert line in text
    convert("videos", root, tmp_path / "out", "--clip-frames", 4, "--prefix", "own-train")
    clips = [("12:30.mkv", 0, 4), ("clip 10.avi", 0, 4), *(("frames é", k, k + 4) for k in (0, 4, 8)), ("x.GIF", 0, 3)]
    for sample, (name, first, end) in zip(load_back(tmp_path / "out", "own-train"), clips, strict=True):
        np.testing.assert_array_equal(sample["video.npy"], made[name][first:end])
        assert sample["info.json"]["frames"] == list(range(first, end))
        assert sample["info.json"]["source_frames"] == len(made[name])
    assert "left out 3 frames after the last whole clips" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["a_masks", "a_mask", "masks/a", "a.masks.npy", "channels"])
def test_masks_are_found_and_cut_as_their_video(tmp_path, kind):
    root, (_, ids) = tmp_path / "in", own_set(tmp_path / "in")
    (root / "a_masks").rename(tmp_path / "gone")
    expected = (ids == 3) * np.uint8(1) + (ids == 255) * np.uint8(2)
    if kind == "channels":
        np.save(root / "a.masks.npy", np.stack([expected == 1, expected == 2], -1))
    elif kind == "a.masks.npy":
        np.save(root / kind, ids.astype(np.int32) * 1000)
    else:
        write_pictures(root / kind, ids, "{}.png")
    convert("videos", root, tmp_path / "out", "--clip-frames", 3, "--short-side", 5)
    samples = load_back(tmp_path / "out", "videos")
    found = np.concatenate([sample["segmentations.npy.gz"] for sample in samples[:2]])
    if kind == "channels":
        assert found.shape[-1] == 2
        found = found * np.array([1, 2])
    np.testing.assert_array_equal(found.sum(-1), expected[:, 1::2, 1::2])
    of = {"a.masks.npy": [3000, 255000], "channels": [0, 1]}
    assert samples[0]["info.json"]["object_ids"] == of.get(kind, [3, 255])
    assert len(samples) == 4
    assert all("segmentations.npy.gz" not in sample for sample in samples[2:])


def test_names_and_numbers_pair_masks_and_never_their_position(tmp_path):
    root, video = tmp_path / "in", smooth_video(5)
    ids = np.stack([np.full((10, 14), t + 1, np.uint8) for t in range(5)])
    write_pictures(root / "a", video, "frame{:03d}.png")
    write_pictures(root / "a_masks", ids, "m{}.png")
    encode_file(root / "b.mkv", video)
    write_pictures(root / "b_masks", ids, "mask_{:03d}.png")
    convert("videos", root, tmp_path / "out")
    for sample in load_back(tmp_path / "out", "videos"):
        np.testing.assert_array_equal(sample["segmentations.npy.gz"][..., 0], ids)
    (root / "a" / "frame003.png").unlink()
    (root / "a_masks" / "m2.png").unlink()
    with pytest.raises(ShardError, match=r"frame002\.png.*m3\.png"):
        convert("videos", root, tmp_path / "out2")
    (root / "b_masks" / "mask_002.png").rename(root / "b_masks" / "mask_005.png")
    with pytest.raises(ShardError, match=r"without a mask 2, .*mask_005\.png"):
        media.pair_masks(None, media.list_pictures(root / "b_masks"), "b", root / "b_masks")


# -- what is refused --------------------------------------------------------------------------------------------------

MOVI = "movi_c-train.tfrecord-{:05d}-of-{:05d}"


def _movi(change):
    """Replace the first of two records by a changed one."""

    def damage(root):
        changed = {name: feature for name, feature in {**movi_features(0), **change}.items() if feature}
        write_records(root / MOVI.format(0, 1), [changed, movi_features(1)])

    return damage


def _flip(root):
    _movi({})(root)
    data = bytearray((root / MOVI.format(0, 1)).read_bytes())
    data[100] ^= 1
    (root / MOVI.format(0, 1)).write_bytes(data)


def _pngs(count, shape, dtype=np.uint8):
    return [png(np.zeros(shape, dtype)) for _ in range(count)], "byte"


def _ytvis(change):
    """Change the JSON of the third video, or its pictures."""

    def damage(root):
        content, _, _ = ytvis_set(root)
        content = change(content, root / "train" / "JPEGImages" / "vid 2 é" / "00001.jpg") or content
        write_json(root / "train" / "instances.json", content)

    return damage


def _thing(**values):
    return _ytvis(lambda content, frame: content["annotations"][1].update(values))


def _davis(change):
    def damage(root):
        davis_set(root)
        change(root / "JPEGImages/480p/bear", root / "Annotations/480p/bear")

    return damage


def _own(change):
    def damage(root):
        own_set(root)
        change(root / "a", root / "a_masks")

    return damage


def _array(array):
    def change(frames, masks):
        masks.rename(masks.parent.parent / "gone")
        np.save(frames.with_name("a.masks.npy"), array, allow_pickle=True)

    return _own(change)


def _file(name, content):
    return _own(lambda frames, masks: (frames.parent / name).write_bytes(content))


@pytest.mark.parametrize(
    ("source", "damage", "message"),
    [
        ("movi", _movi({"video": None}), "`video`"),
        ("movi", _movi({"segmentations": None}), "`segmentations`"),
        ("movi", _movi({"video": ([1], "int")}), "`video`"),
        ("movi", _movi({"video": ([b"no picture"] * 3, "byte")}), "frame 0 of `video`"),
        ("movi", _movi({"segmentations": _pngs(3, (8, 8, 3))}), "RGB"),
        ("movi", _movi({"segmentations": _pngs(3, (8, 8), np.uint16)}), "8 bits"),
        ("movi", _movi({"segmentations": _pngs(2, (8, 8))}), "segmentations"),
        ("movi", _movi({"video": (_pngs(2, (8, 8, 3))[0] + _pngs(1, (8, 9, 3))[0], "byte")}), "one size"),
        ("movi", _flip, r"at byte 0 to fit its checksum"),
        ("ytvis2021", _ytvis(lambda content, frame: frame.unlink()), r"00001\.jpg"),
        ("ytvis2021", _ytvis(lambda content, frame: os.truncate(frame, 300)), r"00001\.jpg"),
        ("ytvis2021", _ytvis(lambda content, frame: Image.new("RGB", (21, 12)).save(frame)), "12 x 21"),
        ("ytvis2021", _ytvis(lambda content, frame: content["videos"][2].update(height=13)), r"\[13, 20\]"),
        ("ytvis2021", _ytvis(lambda c, frame: c["videos"][2].update(file_names=[], length=0)), "frames"),
        ("ytvis2021", _thing(segmentations=[]), "instance 200"),
        ("ytvis2021", _thing(category_id=256), "instance 200"),
        ("ytvis2021", _thing(category_id="cat"), "instance 200"),
        ("ytvis2021", _thing(segmentations=[{"size": [12, 20], "counts": [1, 2]}] * 4), "frame 0 of instance 200"),
        ("davis", _davis(lambda frames, masks: (masks / "00002.png").unlink()), r"bear.*00002\.jpg"),
        ("davis", _davis(lambda frames, masks: (frames / "00002.jpg").unlink()), r"bear.*00002\.png"),
        ("davis", _davis(lambda frames, masks: Image.new("L", (10, 12)).save(masks / "00002.png")), "12 x 10"),
        ("davis", _davis(lambda frames, masks: Image.new("RGB", (20, 12)).save(masks / "00002.png")), "grey or pal"),
        ("davis", _davis(lambda frames, masks: Image.new("RGB", (22, 12)).save(frames / "00002.jpg")), "12 x 22"),
        ("davis", _davis(lambda frames, masks: [path.unlink() for path in frames.iterdir()]), "have frames"),
        ("videos", _own(lambda frames, masks: (masks / "3.png").unlink()), r"00003\.png"),
        ("videos", _own(lambda frames, masks: (masks / "3.png").write_bytes(b"\x89PNG")), r"mask .*3\.png of video"),
        ("videos", _own(lambda frames, masks: (frames / "00004.png").write_bytes(b"")), r"00004\.png of .* empty"),
        ("videos", _own(lambda frames, masks: Image.new("RGB", (14, 11)).save(frames / "00004.png")), "11 x 14"),
        ("videos", _array(np.zeros((5, 10, 14), int)), "5 masks"),
        ("videos", _array(np.zeros((6, 10, 14))), "integer"),
        ("videos", _array(np.zeros((6, 10), int)), "integer"),
        ("videos", _array(np.zeros((6, 10, 14, 0), int)), "integer"),
        ("videos", _array(np.array(1)), "an array"),
        ("videos", _array(np.full((6, 10, 14), None)), "an array"),
        ("videos", _array(np.full((6, 10, 14), -1)), "integers from 0 on"),
        ("videos", _array(np.arange(6 * 10 * 14).reshape(6, 10, 14)), "at most 255 objects"),
        ("videos", _file("c.mp4", b""), r"c\.mp4.*an empty file"),
        ("videos", _file("c.mp4", b"this is no video" * 99), r"c\.mp4"),
        ("videos", _file("c.gif", b"GIF89a"), r"c\.gif"),
    ],
)
def test_a_bad_video_is_refused_by_name_or_left_out(tmp_path, source, damage, message, capsys):
    damage(tmp_path / "set")
    words = ALL if source.startswith("ytvis") else ("--splits", "train") if source == "davis" else ()
    with pytest.raises(ShardError, match=message):
        convert(source, tmp_path / "set", tmp_path / "out", *words)
    assert not list((tmp_path / "out").glob("*.tar"))
    convert(source, tmp_path / "set", tmp_path / "out", *words, "--on-bad-sample", "skip")
    kept = 1 if source != "ytvis2021" and "c." not in message.replace("\\", "") else 2
    assert sum(len(load_back(tmp_path / "out", prefix)) for prefix in ("*-train", "videos")) == kept
    assert "skipped: 1\n    00000" in capsys.readouterr().out


def _json(change):
    return _ytvis(lambda content, frame: change(content))


def _entries(*names):
    def make(root):
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x")

    return make


def _files(change):
    def make(root):
        write_movi(root, counts=(1, 1, 1))
        change(root)

    return make


def _list(text):
    return _davis(lambda frames, masks: (frames.parents[2] / "ImageSets/2017/val.txt").write_text(text))


def _cut(root):
    ytvis_set(root)
    os.truncate(root / "train" / "instances.json", 500)


@pytest.mark.parametrize(
    ("source", "make", "words", "message"),
    [
        ("movi", _files(lambda root: (root / MOVI.format(1, 3)).unlink()), (), "got 00001-of-00003"),
        ("movi", _files(lambda root: (root / MOVI.format(2, 4)).write_bytes(b"")), (), "-of-00003.*-of-00004"),
        ("movi", _files(lambda root: (root / MOVI.format(3, 3)).write_bytes(b"")), (), "got 00003-of-00003"),
        ("movi", _files(lambda root: write_movi(root / "movi_e", name="movi_e")), (), "movi_e in"),
        ("movi", _files(lambda root: os.truncate(root / MOVI.format(1, 3), 200)), (), "truncated"),
        ("movi", _files(lambda root: (root / MOVI.format(1, 3)).write_bytes(b"no record" * 9)), (), "checksum"),
        ("movi", _files(lambda root: (root / MOVI.format(1, 3)).write_bytes(b"")), (), "truncated"),
        ("movi", _files(lambda root: None), ("--splits", "test"), "among train"),
        ("movi", _entries("a"), (), "movi_c-train.tfrecord"),
        ("ytvis2021", ytvis_set, ("--holdout", 3), "--holdout"),
        ("ytvis2021", ytvis_set, (), "--holdout"),
        ("ytvis2021", ytvis_set, ("--holdout", 0), "--holdout"),
        ("ytvis2021", ytvis_set, ("--splits", "valid"), "valid/JPEGImages"),
        ("ytvis2021", _entries("test/JPEGImages/a"), ("--splits", "test"), "annotations of split `test`"),
        ("ytvis2021", _cut, ALL, "JSON"),
        ("ytvis2021", _json(lambda c: [1]), ALL, "videos"),
        ("ytvis2021", _json(lambda c: {"images": []}), ALL, "videos"),
        ("ytvis2021", _json(lambda c: {**c, "videos": [{"id": 1}]}), ALL, "file_names"),
        ("ytvis2021", _json(lambda c: {**c, "videos": ["a"]}), ALL, "videos"),
        ("ytvis2021", _json(lambda c: {**c, "videos": c["videos"] * 2}), ALL, "twice"),
        ("ytvis2021", _json(lambda c: {**c, "videos": [{**c["videos"][0], "length": 9}]}), ALL, "length is 9"),
        ("ytvis2021", _json(lambda c: {**c, "videos": [{**c["videos"][0], "height": "12"}]}), ALL, "height"),
        ("ytvis2021", _json(lambda c: {**c, "videos": [{**c["videos"][0], "file_names": ["../a"] * 4}]}), ALL, "relat"),
        (
            "ytvis2021",
            _json(lambda c: {**c, "videos": [{**c["videos"][0], "file_names": ["/a"] * 4}]}),
            ALL,
            "relative",
        ),
        ("ytvis2021", _json(lambda c: {**c, "categories": [{"id": 1}]}), ALL, "categories"),
        ("ytvis2021", _json(lambda c: {**c, "annotations": [{"id": 1, "bbox": []}]}), ALL, "segmentations"),
        ("ytvis2021", _json(lambda c: c["annotations"][0].update(video_id=99)), ALL, "unknown video 99"),
        ("davis", _list(""), (), "0 names"),
        ("davis", _list("bear\nbear\n"), (), "each once"),
        ("davis", _list("../bear\n"), (), r"\.\./bear"),
        ("davis", davis_set, (), "val.txt"),
        ("davis", davis_set, ("--annotations", "Annotations_unsupervised"), "--annotations"),
        ("videos", lambda root: root.mkdir(), (), "nothing"),
        ("videos", _entries("a.txt", ".b.mp4"), (), r"\.b\.mp4"),
        ("videos", _entries("0.png", "1.png"), (), "sub-folder"),
        ("videos", _entries("sub/a.mp4"), (), "got sub"),
        ("videos", _entries("a/0.png", "masks/b/0.png"), (), "masks/b"),
        ("videos", _entries("a/0.png", "b_masks/0.png"), (), "b_masks"),
        ("videos", _entries("a/0.png", "b.masks.npy"), (), "b.masks.npy"),
        ("videos", _entries("a.mp4", "a.avi", "a.masks.npy"), (), "a.avi', 'a.mp4"),
        ("videos", _entries("a/0.png", "a_masks/0.png", "a.masks.npy"), (), "a.masks.npy', 'a_masks"),
        ("videos", _entries("a/0.jpg", "a/0.png"), (), "0.jpg and 0.png"),  # frames and masks side by side
        ("videos", own_set, ("--clip-frames", -2), "--clip-frames"),
        ("videos", own_set, ("--clip-frames", 0), "--clip-frames"),
        ("videos", own_set, ("--workers", -1), "--workers"),
        ("videos", own_set, ("--samples-per-shard", 0), "--samples-per-shard"),
        ("videos", own_set, ("--prefix", "a/b"), "prefix"),
        *(
            (source, lambda root: None, (), "none|nowhere|folder")
            for source in ("movi", "ytvis2019", "davis", "videos")
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, source, make, words, message):
    make(tmp_path / "set")
    with pytest.raises((ConfigError, ShardError), match=message):
        convert(source, tmp_path / "set", tmp_path / "out", *words, "--on-bad-sample", "skip")
    assert not (tmp_path / "out").exists()


# -- segmentations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_segmentations_of_every_kind_are_drawn_as_pycocotools_draws_them(seed):
    size = (9, 13)
    mask = (np.random.default_rng(seed).random(size) < (0.1, 0.5, 0.9)[seed]).astype(np.uint8)
    mask[0, 0] = seed % 2
    counts = rle_counts(mask)
    packed = coco.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"].decode()
    for form in (counts, packed):
        np.testing.assert_array_equal(draw_mask({"size": list(size), "counts": form}, size, "a mask"), mask)
    polygon = [[2.5, 1.5, 12.0, 3.0, 7.0, 8.5]]
    expected = coco.decode(coco.merge(coco.frPyObjects(polygon, *size)))
    np.testing.assert_array_equal(draw_mask(polygon, size, "a mask"), expected)


@pytest.mark.parametrize(
    "segmentation",
    [
        *({"size": [12, 20], "counts": counts} for counts in ([1, 2, 3], [241, -1], ["a"], None, [])),
        *({"size": [12, 20], "counts": counts} for counts in ("12", "oooo", "o" * 40 + "1", "é", "")),
        *({"size": [20, 12], "counts": [240]}, {"counts": [240]}, "mask"),
        *([one] for one in ([0, 0, 2], [0, 0, 2, 2, 1, float("nan")], [0, 0, 2, 2, 1, 1e9], [0] * 7, 3, ["a"] * 6)),
    ],
)
def test_damaged_segmentations_are_refused_by_name(segmentation):
    with pytest.raises(ShardError, match="frame 0 of instance 7"):
        draw_mask(json.loads(json.dumps(segmentation)), (12, 20), "frame 0 of instance 7")


# -- files, sizes and names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "said"),
    [
        ("b.avi", "ffv1", "bgr0", "12 frames"),
        ("b.mp4", "libx264", "yuv420p", "12 frames"),
        ("b.mkv", "ffv1", "bgr0", r"1\.20 seconds"),
        ("b.gif", "gif", "rgb8", "mark of its end"),
    ],
)
@pytest.mark.parametrize("words", [(), ("--clip-frames", 2)])
def test_a_file_that_was_cut_off_is_told_by_its_header(tmp_path, name, codec, pixels, said, words):
    root = tmp_path / "in"
    root.mkdir()
    encode_file(root / "a.mkv", smooth_video(12, 32, 32))
    noise = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    path = encode_file(root / name, noise, codec, pixels, {"movflags": "faststart"})
    assert inspect_video(path, name).frames == 12
    path.write_bytes(path.read_bytes()[: path.stat().st_size - 5 if name == "b.gif" else path.stat().st_size * 2 // 3])
    with pytest.raises(ShardError, match=rf"{name} to be a whole video, but got a part: .*{said}"):
        convert("videos", root, tmp_path / "out", *words)
    convert("videos", root, tmp_path / "out", *words, "--on-bad-sample", "skip")
    assert {sample["info.json"]["video"] for sample in load_back(tmp_path / "out", "videos")} == {"a.mkv"}


@pytest.mark.parametrize("options", [{}, {"x264-params": "open-gop=1:keyint=6:bframes=3:min-keyint=1:scenecut=0"}])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_reading_from_the_middle_gives_the_frames_of_the_whole(tmp_path, name, options):
    small = np.random.default_rng(3).integers(0, 255, (26, 4, 6, 3), dtype=np.uint8)
    path = encode_file(tmp_path / name, small.repeat(8, 1).repeat(8, 2), "libx264", "yuv420p", **options)
    whole, facts = [*media.read_frames(path, None, None, None, name)], inspect_video(path, name)
    assert len(whole) == facts.frames == 26
    for first in range(1, 24, 3):
        stamp = facts.stamps[first] if facts.stamps else None
        part = media.read_frames(path, None, range(first, first + 2), stamp, name)
        np.testing.assert_array_equal([*part], whole[first : first + 2])


def test_gifs_are_read_as_they_are_shown(tmp_path):
    pictures = []
    for k in range(4):
        picture = np.zeros((20, 30, 4), np.uint8)
        picture[2 + k : 9 + k, 3 + 2 * k : 12 + 2 * k] = (200, 50 * k, 30, 255)
        pictures.append(Image.fromarray(picture))
    save = {"save_all": True, "append_images": pictures[1:], "loop": 3, "disposal": 2}
    pictures[0].save(tmp_path / "a.gif", duration=[100, 300, 200, 200], **save)
    expected = np.stack([np.asarray(picture)[..., :3] for picture in pictures])  # transparency over black
    found = np.stack([*media.read_frames(tmp_path / "a.gif", None, None, None, "a")])
    assert np.abs(found.astype(int) - expected).max() < 8  # colours of a palette
    facts = inspect_video(tmp_path / "a.gif", "a")
    assert (facts.frames, facts.rate) == (4, 5.0)


def test_names_sort_by_their_numbers_and_sizes_keep_proportions(tmp_path, monkeypatch):
    names = ["9.png", "10.png", "F1.png", "f01.png", "f9.png", "f10.png", "x1y9", "x1y10", "²", "١"]
    assert sorted(set(names), key=media.natural_key) == names
    for size, short_side, expected in (((72, 128), 32, (32, 56)), ((128, 72), 51, (90, 51)), ((4, 6), None, (4, 6))):
        assert media.stack_frames([np.zeros((*size, 3), np.uint8)], short_side, "a")[0].shape[1:3] == expected
    board = np.zeros((8, 8, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 200
    np.testing.assert_allclose(media.stack_frames([board], 4, "a")[0][0, 1:3, 1:3], 100, atol=2)  # anti-aliased
    np.testing.assert_array_equal(media.resize_ids(np.array([[[1, 2]]]), (1, 4)), [[[1, 1, 2, 2]]])
    own_set(tmp_path / "in")
    monkeypatch.setattr(media, "_MAX_BYTES", 4 * 10 * 14 * 3)  # what does not fit into memory
    with pytest.raises(ShardError, match="--clip-frames"):
        convert("videos", tmp_path / "in", tmp_path / "out")
    assert convert("videos", tmp_path / "in", tmp_path / "out2", "--clip-frames", 4) == 0


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_bar_counts_videos_an_error_is_one_line_and_help_lists_all(tmp_path, capsys):
    write_movi(tmp_path / "tfds", counts=(3,))
    words = ["data", "convert", "movi", "--out", str(tmp_path / "out"), "--workers", "0", "--root"]
    assert main([*words, str(tmp_path / "tfds")]) == 0
    bar = capsys.readouterr().err
    assert "writing movi_c-train: 100%" in bar
    assert "3/3" in bar
    assert main([*words, "/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("ssync-pl: error: Expected --root to be a folder, but got /nowhere. Name")
    for name in ("movi", "ytvis2019", "ytvis2021", "davis", "videos"):
        assert main(["data", "convert", name, "--help"]) == 0
        assert "--on-bad-sample" in capsys.readouterr().out
    assert main(["data", "convert", "videos", "--root", "a", "--out", "b", "--short-side", "9000"]) == 2


@pytest.mark.parametrize(
    ("source", "missing", "extra"),
    [("movi", "tfrecord", "convert"), ("ytvis2021", "pycocotools", "convert"), ("videos", "av", "video")],
)
def test_each_command_says_which_extra_it_misses(tmp_path, monkeypatch, source, missing, extra):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else real(name, *rest))
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(ConfigError, match=rf'pip install "ssync-pl\[{extra}\]"'):
        convert(source, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
