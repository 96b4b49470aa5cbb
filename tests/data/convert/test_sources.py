import importlib.util
import json
import os
import shutil

import folder_sets as sets
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from ssync_pl.cli import main, run_command
from ssync_pl.cli.commands import data
from ssync_pl.data.convert import media
from ssync_pl.data.convert.ytvis import draw_mask
from ssync_pl.data.decode import inspect_video
from ssync_pl.errors import ConfigError, ShardError

ALL = ("--splits", "train", "--holdout", 0)  # of YouTube-VIS
equal = np.testing.assert_array_equal


@pytest.fixture
def root(tmp_path):
    return tmp_path / "set ü"


@pytest.fixture
def convert(root, tmp_path):
    """Run `ssync-pl data convert` in this process, and load what it wrote: samples by prefix."""

    def convert(source, *words, out="out"):
        options = ("--root", root, "--out", tmp_path / out, "--workers", 0, *words)
        assert run_command("data", data, ["convert", source, *map(str, options)]) == 0
        return sets.load_back(tmp_path / out)

    return convert


@pytest.mark.parametrize("layout", ["", "movi_c/8x8/1.0.0"])
def test_movi_comes_back_exactly(convert, root, tmp_path, layout, capsys):
    truths = sets.write_movi(root / layout)
    sets.write_movi(root / layout, "validation", (1,))
    sets.write_movi(root / f"{layout}x.incompleteABC123", counts=(1,))  # an unfinished download
    words = ("--samples-per-shard", 2)
    samples = convert("movi", *words)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("movi_c-train: videos: 5, shards: 3 (0 were there before)")
    assert lines[1] == f"  shards: {tmp_path}/out/movi_c-train-[0-9]*.tar"
    assert len(samples["movi_c-validation"]) == 1
    for number, (sample, (video, masks)) in enumerate(zip(samples["movi_c-train"], truths, strict=True)):
        assert sorted(sample) == ["info.json", "key", "segmentations.npy.gz", "video.npy"]
        equal(sample["video.npy"], video)
        equal(sample["segmentations.npy.gz"], masks[..., None])
        assert (sample["info.json"]["fps"], sample["info.json"]["video_name"]) == (12, str(number))
    before = sets.contents(tmp_path / "out")
    root.rename(tmp_path / "moved")  # the originals may move
    convert("movi", *words, "--splits", "train", "--root", tmp_path / "moved")
    assert "3 were there before" in capsys.readouterr().out
    assert sets.contents(tmp_path / "out") == before


def test_ytvis_comes_back_and_the_last_videos_are_held_out(convert, root):
    content, frames, masks = sets.ytvis_set(root, videos=4)
    made = convert("ytvis2021", "--holdout", 2, "--short-side", "none")
    samples = [*made["ytvis-train"], *made["ytvis-validation"]]
    assert [sample["key"] for sample in samples] == ["000000", "000001"] * 2
    for video, sample, frame, mask in zip(content["videos"], samples, frames, masks, strict=True):
        equal(sample["video.npy"], frame)
        equal(sample["segmentations.npy.gz"], mask)
        info = sample["info.json"]
        assert (info["video_id"], info["file_names"]) == (video["id"], video["file_names"])
        assert info["categories"] == [f"thing {number}" for number in info["category_ids"]]
        assert len(info["instance_ids"]) == video["id"] - 10
    small = convert("ytvis2021", *ALL, "--short-side", 7, out="small")["ytvis-train"]
    for sample, video, mask in zip(small, frames, masks, strict=True):
        resized = [Image.fromarray(frame).resize((11, 7), Image.Resampling.BICUBIC) for frame in video]
        equal(sample["video.npy"], np.stack(list(map(np.asarray, resized))))
        rows, columns = ((np.arange(7) + 0.5) * 12 / 7).astype(int), ((np.arange(11) + 0.5) * 20 / 11).astype(int)
        equal(sample["segmentations.npy.gz"], mask[:, rows[:, None], columns])


def test_ytvis_without_annotations_and_with_crowds(convert, root, caplog):
    content, _, _ = sets.ytvis_set(root, "valid")
    sets.write_json(root / "valid" / "instances.json", {**content, "annotations": None})
    samples = convert("ytvis2019", "--splits", "valid")["ytvis-valid"]
    assert [sorted(sample) for sample in samples] == [["info.json", "key", "video.npy"]] * 3
    content, _, _ = sets.ytvis_set(root)
    content["annotations"][1]["iscrowd"] = 1
    sets.write_json(root / "train" / "train.json", content)  # an official place
    os.unlink(root / "train" / "instances.json")
    assert convert("ytvis2019", *ALL)["ytvis-train"][2]["segmentations.npy.gz"].shape[-1] == 1
    assert "Leaving out 1 crowds" in caplog.text


def test_davis_comes_back_and_void_is_background(convert, root):
    made = sets.davis_set(root)
    sets.davis_set(root, ("zoo",), "val")
    samples = convert("davis")
    assert len(samples["davis-validation"]) == 1
    for sample, (name, (frames, ids)) in zip(samples["davis-train"], made.items(), strict=True):
        equal(sample["video.npy"], frames)
        equal(sample["segmentations.npy.gz"], np.where(ids == 255, 0, ids)[..., None])
        info = sample["info.json"]
        assert (info["video"], info["object_ids"]) == (f"JPEGImages/480p/{name}", [1, 2])


def test_every_kind_of_own_video_comes_back_exactly_whole_or_in_clips(convert, root, capsys):
    made = {
        "12:30.mkv": sets.smooth_video(6, seed=6),
        "clip 10.avi": sets.smooth_video(5, seed=5),
    }  # a colon names no protocol
    root.mkdir()
    for name, video in made.items():
        sets.encode_file(root / f"x{name[-4:]}", video).rename(root / name)
    made["frames é"] = sets.smooth_video(12, seed=4)
    sets.write_pictures(root / "frames é", made["frames é"], "f{}.png")  # f10 comes after f9
    made["x.GIF"] = sets.smooth_video(3, seed=3)[..., :1].repeat(3, -1)
    shades = [Image.fromarray(frame[..., 0]) for frame in made["x.GIF"]]
    shades[0].save(root / "x.GIF", save_all=True, append_images=shades[1:], duration=100)
    for name in (".DS_Store", "notes.txt", "frames é/a.tif"):
        (root / name).write_bytes(b"x")
    (root / "empty").mkdir()
    os.mkfifo(root / "pipe.mp4")
    (root / "gone.mp4").symlink_to(root / "nowhere")
    for sample, (name, video) in zip(convert("videos")["videos"], made.items(), strict=True):
        equal(sample["video.npy"], video)
        info, fps = sample["info.json"], None if name == "frames é" else 10
        expected = (name, fps, len(video), [10, 14])
        assert (info["video"], info["fps"], info["source_frames"], info["original_size"]) == expected
    text = capsys.readouterr().out
    for line in (
        "videos: videos: 4,",
        "0 of 4 videos",
        "ignored 6: .DS_Store, empty, frames é/a.tif, gone.mp4, notes.txt, pipe",
    ):
        assert line in text
    samples = convert("videos", "--clip-frames", 4, "--prefix", "own-train")["own-train"]
    clips = [("12:30.mkv", 0, 4), ("clip 10.avi", 0, 4), *(("frames é", k, k + 4) for k in (0, 4, 8)), ("x.GIF", 0, 3)]
    for sample, (name, first, end) in zip(samples, clips, strict=True):
        equal(sample["video.npy"], made[name][first:end])
        info = sample["info.json"]
        assert (info["frames"], info["source_frames"]) == ([*range(first, end)], len(made[name]))
    assert "left out 3 frames after the last whole clips" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["a_mask", "masks/a", "a-Masks", "Labels/a", "a.masks.npy", "channels"])
def test_masks_are_found_and_cut_as_their_video(convert, root, tmp_path, kind):
    ids = sets.own_set(root)
    (root / "a_masks").rename(tmp_path / "gone")
    expected = (ids == 3) * np.uint8(1) + (ids == 255) * np.uint8(2)
    if kind == "channels":
        np.save(root / "a.masks.npy", np.stack([expected == 1, expected == 2], -1))
    elif kind == "a.masks.npy":
        np.save(root / kind, ids.astype(np.int32) * 1000)
    else:
        sets.write_pictures(root / kind, ids, "{}.png")
    samples = convert("videos", "--clip-frames", 3, "--short-side", 5)["videos"]
    found = np.concatenate([sample["segmentations.npy.gz"] for sample in samples[:2]])
    if kind == "channels":
        assert found.shape[-1] == 2
        found = found * np.array([1, 2])
    equal(found.sum(-1), expected[:, 1::2, 1::2])
    of = {"a.masks.npy": [3000, 255000], "channels": [0, 1]}
    assert samples[0]["info.json"]["object_ids"] == of.get(kind, [3, 255])
    assert ["segmentations.npy.gz" in sample for sample in samples] == [True, True, False, False]


def test_names_and_numbers_pair_masks_and_never_their_position(convert, root):
    ids = np.stack([np.full((10, 14), t + 1, np.uint8) for t in range(5)])
    sets.write_pictures(root / "a", sets.smooth_video(5), "frame{:03d}.png")
    sets.write_pictures(root / "a_masks", ids, "m{}.png")
    sets.encode_file(root / "b.mkv", sets.smooth_video(5))
    sets.write_pictures(root / "b_masks", ids, "mask_{:03d}.png")
    for sample in convert("videos")["videos"]:
        equal(sample["segmentations.npy.gz"][..., 0], ids)
    (root / "a" / "frame003.png").unlink()
    (root / "a_masks" / "m2.png").unlink()
    with pytest.raises(ShardError, match=r"frame002\.png.*m3\.png"):
        convert("videos", out="out2")
    (root / "b_masks" / "mask_002.png").rename(root / "b_masks" / "mask_005.png")
    with pytest.raises(ShardError, match=r"without a mask 2, .*mask_005\.png"):
        media.pair_masks(None, media.list_pictures(root / "b_masks"), "b", root / "b_masks")


# What makes a tiny set of each source, and what may be done to it.
SETS = {"movi": lambda root: sets.write_movi(root, counts=(1, 1)), "davis": sets.davis_set, "videos": sets.own_set}
SETS["ytvis2021"] = SETS["ytvis2019"] = sets.ytvis_set
FIRST, SECOND = (f"movi_c-train.tfrecord-0000{number}-of-00002" for number in range(2))
MASKS, IDS, JPEG = "Annotations/480p/bear/00002.png", "a.masks.npy", "train/JPEGImages/vid 2 é/00001.jpg"


def gone(path):
    return lambda root: (root / path).unlink()


def put(path, content):
    """Write bytes, an array, or a black picture of a size."""

    def damage(root):
        if isinstance(content, np.ndarray):
            (root / "a_masks").rename(root.parent / "gone")
            np.save(root / path, content, allow_pickle=True)
        elif isinstance(content, bytes):
            (root / path).parent.mkdir(exist_ok=True)
            (root / path).write_bytes(content)
        else:
            Image.new("L", content).save(root / path)

    return damage


def record(**change):
    def damage(root):
        features = {**sets.movi_features(0), **change}
        sets.write_records(root / FIRST, [{name: feature for name, feature in features.items() if feature}])

    return damage


def pngs(*shapes, dtype=np.uint8):
    return [sets.png(np.zeros(shape, dtype)) for shape in shapes], "byte"


def flip(root):
    data = bytearray((root / FIRST).read_bytes())
    data[100] ^= 1
    (root / FIRST).write_bytes(data)


def edit(change):
    """Change the JSON of YouTube-VIS."""

    def damage(root):
        content = json.loads((root / "train/instances.json").read_bytes())
        sets.write_json(root / "train/instances.json", change(content) or content)

    return damage


def thing(**values):
    return edit(lambda content: content["annotations"][1].update(values))


def video(**values):
    return edit(lambda content: content["videos"][2].update(values))


@pytest.mark.parametrize(
    ("source", "damage", "message"),
    [
        ("movi", record(video=None), "`video`"),
        ("movi", record(segmentations=pngs(*[(8, 8)] * 3, dtype=np.uint16)), "8 bits"),
        ("movi", record(segmentations=pngs((8, 8))), "segmentations"),
        ("movi", record(video=pngs((8, 8, 3), (8, 9, 3))), "one size"),
        ("movi", flip, r"at byte 0 to fit its checksum"),
        ("ytvis2021", gone(JPEG), r"00001\.jpg"),
        ("ytvis2021", put(JPEG, (21, 12)), "12 x 21"),
        ("ytvis2021", video(height=13), r"\[13, 20\]"),
        ("ytvis2021", video(file_names=[], length=0), "frames"),
        ("ytvis2021", thing(category_id=256), "instance 200"),
        ("ytvis2021", thing(segmentations=None), "instance 200"),
        ("ytvis2021", thing(segmentations=[{"size": [12, 20], "counts": [1, 2]}] * 4), "frame 0 of instance 200"),
        ("davis", gone(MASKS), r"bear.*00002\.jpg"),
        ("davis", gone("JPEGImages/480p/bear/00002.jpg"), r"bear.*00002\.png"),
        ("davis", put(MASKS, (10, 12)), "12 x 10"),
        ("davis", lambda root: shutil.rmtree(root / "JPEGImages/480p/bear"), "have frames"),
        ("videos", gone("a_masks/3.png"), r"00003\.png"),
        ("videos", put(IDS, np.zeros((5, 10, 14), int)), "5 masks"),
        ("videos", put(IDS, np.zeros((6, 10, 14))), "integer"),
        ("videos", put(IDS, np.zeros((6, 10, 14, 0), int)), "integer"),
        ("videos", put(IDS, np.full((6, 10, 14), None)), "an array"),
        ("videos", put(IDS, np.full((6, 10, 14), -1)), "integers from 0 on"),
        ("videos", put(IDS, np.arange(6 * 10 * 14).reshape(6, 10, 14)), "at most 255 objects"),
        ("videos", put("c.mp4", b""), r"c\.mp4.*an empty file"),
    ],
)
def test_a_bad_video_is_refused_by_name_or_left_out(convert, root, tmp_path, source, damage, message, capsys):
    SETS[source](root)
    damage(root)
    words = ALL if source.startswith("ytvis") else ("--splits", "train") if source == "davis" else ()
    with pytest.raises(ShardError, match=message):
        convert(source, *words)
    assert not list((tmp_path / "out").glob("*.tar"))
    (samples,) = convert(source, *words, "--on-bad-sample", "skip").values()
    assert len(samples) == (1 if source != "ytvis2021" and r"c\." not in message else 2)
    assert "skipped: 1\n    00000" in capsys.readouterr().out


def names(text, encoding="utf-8"):
    return put("ImageSets/2017/val.txt", text.encode(encoding))


def tfds(text):
    """Say how many records the files have, as TensorFlow Datasets does."""
    return put("dataset_info.json", text.encode())


def only(*files):
    """Leave nothing but these files."""

    def make(root):
        shutil.rmtree(root)
        for name in files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x")

    return make


def intact(root):
    pass


@pytest.mark.parametrize(
    ("source", "damage", "words", "message"),
    [
        ("movi", gone(SECOND), (), "got 00001-of-00002"),
        ("movi", put(FIRST.replace("00000", "00002"), b""), (), "got 00002-of-00002"),
        ("movi", lambda root: sets.write_movi(root / "movi_e", name="movi_e"), (), "movi_e in"),
        ("movi", lambda root: os.truncate(root / SECOND, 200), (), "truncated"),
        ("movi", put(SECOND, b""), (), "truncated"),
        (
            "movi",
            tfds('{"splits": [{"name": "train", "shardLengths": ["1", 2]}]}'),
            (),
            f"{SECOND} to hold the records .*got 1",
        ),
        ("movi", tfds("[" * 9999), (), "dataset_info.json to be JSON"),
        ("movi", intact, ("--splits", "test"), "among train"),
        ("ytvis2021", intact, ("--holdout", 3), "--holdout"),
        ("ytvis2021", intact, ("--holdout", 0), "--holdout"),
        ("ytvis2021", intact, ("--splits", "valid"), "valid/JPEGImages"),
        ("ytvis2021", only("test/JPEGImages/a"), ("--splits", "test"), "annotations of split `test`"),
        ("ytvis2021", edit(lambda c: {**c, "videos": c["videos"] * 2}), ALL, "twice"),
        ("ytvis2021", video(length=9), ALL, "length is 9"),
        ("ytvis2021", video(file_names=["../a"] * 4), ALL, "relative"),
        ("ytvis2021", thing(video_id=99), ALL, "unknown video 99"),
        ("ytvis2021", thing(segmentations=[{"counts": [1], "size": [1e30, 1]}]), ALL, "JSON"),
        ("davis", names("bear\nbear\n"), (), "each once"),
        ("davis", names("bear\n", "utf-16"), (), "UTF-8"),
        ("davis", names("../bear\n"), (), r"\.\./bear"),
        ("davis", intact, (), "val.txt"),
        ("davis", intact, ("--annotations", "Annotations_unsupervised"), "--annotations"),
        ("videos", only("a.txt", ".b.mp4"), (), r"\.b\.mp4"),
        ("videos", only("0.png", "1.png"), (), "sub-folder"),
        ("videos", only("a/0.png", "b_masks/0.png"), (), "b_masks"),
        ("videos", only("a.mp4", "a.avi", "a.masks.npy"), (), "a.avi', 'a.mp4"),
        ("videos", only("a/0.png", "a_masks/0.png", "a.masks.npy"), (), "a.masks.npy', 'a_masks"),
        # frames and masks side by side
        ("videos", only("a/0.jpg", "a/0.png"), (), "0.jpg and 0.png"),
        *(("videos", only("a/f_01.jpg", f"a/{name}.png"), (), rf"{name}\.png") for name in ("m1", "01_gt", "2_Masks")),
        ("videos", intact, ("--clip-frames", 0), "--clip-frames"),
        ("videos", intact, ("--workers", -1), "--workers"),
        ("videos", intact, ("--samples-per-shard", 0), "--samples-per-shard"),
        ("videos", intact, ("--prefix", "a/b"), "prefix"),
        *((source, lambda root: shutil.rmtree(root), (), "none|nowhere|folder") for source in SETS),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    convert, root, tmp_path, source, damage, words, message
):
    SETS[source](root)
    damage(root)
    with pytest.raises((ConfigError, ShardError), match=message):
        convert(source, *words, "--on-bad-sample", "skip")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(3))
def test_segmentations_of_every_kind_are_drawn_as_pycocotools_draws_them(seed):
    size = (9, 13)
    mask = (np.random.default_rng(seed).random(size) < (0.1, 0.5, 0.9)[seed]).astype(np.uint8)
    mask[0, 0] = seed % 2
    plain = {"size": list(size), "counts": sets.rle_counts(mask)}
    packed = {**plain, "counts": coco.frPyObjects(plain, *size)["counts"].decode()}
    polygon = [[2.5, 1.5, 12.0, 3.0, 7.0, 8.5]]
    drawn = coco.decode(coco.merge(coco.frPyObjects(polygon, *size)))
    for form, expected in ((plain, mask), (packed, mask), (polygon, drawn)):
        equal(draw_mask(form, size, "a mask"), expected)


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


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "said"),
    [
        ("b.avi", "ffv1", "bgr0", "12 frames"),
        ("b.mp4", "libx264", "yuv420p", "12 frames"),
        ("b.mkv", "ffv1", "bgr0", r"1\.20 seconds"),
        ("b.gif", "gif", "rgb8", "mark of its end"),
    ],
)
def test_a_file_that_was_cut_off_is_told_by_its_header(convert, root, name, codec, pixels, said):
    root.mkdir()
    sets.encode_file(root / "a.mkv", sets.smooth_video(12, 32, 32))
    noise = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    path = sets.encode_file(root / name, noise, codec, pixels, {"movflags": "faststart"})
    assert inspect_video(path, name).frames == 12
    path.write_bytes(path.read_bytes()[: path.stat().st_size - 5 if name == "b.gif" else path.stat().st_size * 2 // 3])
    for words in ((), ("--clip-frames", 2)):
        with pytest.raises(ShardError, match=rf"{name} to be a whole video, but got a part: .*{said}"):
            convert("videos", *words, out=f"out{len(words)}")
        samples = convert("videos", *words, "--on-bad-sample", "skip", out=f"out{len(words)}")["videos"]
        assert {sample["info.json"]["video"] for sample in samples} == {"a.mkv"}


@pytest.mark.parametrize("options", [{}, {"x264-params": "open-gop=1:keyint=6:bframes=3:min-keyint=1:scenecut=0"}])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_reading_from_the_middle_gives_the_frames_of_the_whole(tmp_path, name, options):
    small = np.random.default_rng(3).integers(0, 255, (26, 4, 6, 3), dtype=np.uint8)
    path = sets.encode_file(tmp_path / name, small.repeat(8, 1).repeat(8, 2), "libx264", "yuv420p", **options)
    whole, facts = [*media.read_frames(path, None, None, None, name)], inspect_video(path, name)
    assert len(whole) == facts.frames == 26
    for first in range(0, 25, 3):
        stamp = facts.stamps[first] if facts.stamps else None
        equal([*media.read_frames(path, None, range(first, first + 2), stamp, name)], whole[first : first + 2])


def test_names_sort_by_their_numbers_and_sizes_keep_proportions(convert, root, monkeypatch):
    names = ["9.png", "10.png", "F1.png", "f01.png", "f9.png", "f10.png", "x1y9", "x1y10", "²", "١"]
    assert sorted(set(names), key=media.natural_key) == names
    for size, short_side, expected in (((72, 128), 32, (32, 56)), ((128, 72), 51, (90, 51)), ((4, 6), None, (4, 6))):
        assert media.stack_frames([np.zeros((*size, 3), np.uint8)], short_side, "a")[0].shape[1:3] == expected
    sets.own_set(root)
    monkeypatch.setattr(media, "MAX_BYTES", 4 * 10 * 14 * 3)  # what does not fit into memory
    with pytest.raises(ShardError, match="--clip-frames"):
        convert("videos")
    assert convert("videos", "--clip-frames", 4, out="out2")


def test_an_error_is_one_line_and_help_lists_all(tmp_path, capsys):
    assert main(["data", "convert", "movi", "--out", str(tmp_path / "out"), "--root", "/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("ssync-pl: error: Expected --root to be a folder, but got /nowhere. Name")
    for name in ("movi", "ytvis2019", "ytvis2021", "davis", "videos"):
        assert main(["data", "convert", name, "--help"]) == 0
        assert "--on-bad-sample" in capsys.readouterr().out
    assert main(["data", "convert", "videos", "--root", "a", "--out", "b", "--short-side", "9000"]) == 2


@pytest.mark.parametrize(
    ("source", "missing", "extra"),
    [("movi", "tfrecord", "convert"), ("ytvis2021", "pycocotools", "convert"), ("videos", "av", "video")],
)
def test_each_command_says_which_extra_it_misses(convert, root, tmp_path, monkeypatch, source, missing, extra):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else real(name, *rest))
    root.mkdir()
    (root / "a.mp4").write_bytes(b"x")
    with pytest.raises(ConfigError, match=rf'pip install "ssync-pl\[{extra}\]"'):
        convert(source)
    assert not (tmp_path / "out").exists()
