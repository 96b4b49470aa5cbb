"""Folders of own videos to shards and back."""

from __future__ import annotations

import os

import numpy as np
import pytest
from folder_sets import encode_file, load_back, run_convert, smooth_video, write_frames
from PIL import Image

from ssync_pl.data import ShardDataModule
from ssync_pl.data.convert import videos as videos_module
from ssync_pl.data.convert.pictures import resize_frame, resize_ids
from ssync_pl.data.convert.video_sources import scan_folder
from ssync_pl.data.index import read_index
from ssync_pl.errors import ConfigError, ShardError


def convert(root, out, *words):
    return run_convert("videos", "--root", root, "--out", out, *words)


def ids_like(video, objects=(1, 2)):
    ids = np.zeros(video.shape[:3], np.uint8)
    for t in range(len(ids)):
        for place, number in enumerate(objects):
            ids[t, 2 * place : 2 * place + 2, t : t + 4] = number
    return ids


def write_ids(folder, ids):
    folder.mkdir(parents=True)
    for index, one in enumerate(ids):
        Image.fromarray(one).save(folder / f"{index}.png")


@pytest.fixture
def mixed(tmp_path):
    """A video of each kind, in natural order, among other files."""
    pytest.importorskip("av")
    root = tmp_path / "my videos ü"
    root.mkdir()
    made = {"clip 2.mkv": smooth_video(6, 10, 14, 1), "clip 10.avi": smooth_video(5, 10, 14, 2)}
    for name, video in made.items():
        encode_file(root / name, video)
    grey = smooth_video(3, 10, 14, 3)[..., :1].repeat(3, -1)
    pictures = [Image.fromarray(frame[..., 0]) for frame in grey]
    pictures[0].save(root / "x.GIF", save_all=True, append_images=pictures[1:], duration=100)
    made["x.GIF"] = grey
    made["frames é"] = smooth_video(12, 10, 14, 4)
    write_frames(root / "frames é", made["frames é"], "f{}.png")  # f10 comes after f9
    (root / ".DS_Store").write_bytes(b"x")
    (root / "notes.txt").write_text("x")
    (root / "empty").mkdir()
    return root, {name: made[name] for name in ("clip 2.mkv", "clip 10.avi", "frames é", "x.GIF")}


def test_every_kind_of_video_comes_back_exactly(mixed, tmp_path, capsys):
    root, made = mixed
    assert convert(root, tmp_path / "out") == 0
    samples = load_back(tmp_path / "out", "videos")
    assert [sample["info.json"]["video"] for sample in samples] == list(made)
    for sample, (name, video) in zip(samples, made.items(), strict=True):
        np.testing.assert_array_equal(sample["video.npy"], video)
        info = sample["info.json"]
        assert (info["source_frames"], info["original_size"]) == (len(video), [10, 14])
        assert info["fps"] == (None if name == "frames é" else 10)
    text = capsys.readouterr().out
    assert "videos: 4 videos, 26 frames" in text
    assert "masks: 0 of 4 videos" in text
    for line in ("ignored 1 (hidden): .DS_Store", "(no media): notes.txt", "(folders without frames): empty"):
        assert line in text


def test_the_loader_takes_the_shards(mixed, tmp_path):
    root, made = mixed
    convert(root, tmp_path / "out", "--split-name", "train", "--samples-per-shard", 2)
    data = ShardDataModule(
        predict=str(tmp_path / "out" / "videos-train-*.tar"), batch_size=1, num_workers=0, mean=(0, 0, 0), std=(1, 1, 1)
    )
    data.setup("predict")
    for batch, video in zip(data.predict_dataloader(), made.values(), strict=True):
        frames = data.on_after_batch_transfer(batch, 0)["video"][0] * 255
        np.testing.assert_array_equal(frames.round().byte().permute(0, 2, 3, 1).numpy(), video)


def test_processes_write_the_same_bytes(mixed, tmp_path):
    root, _ = mixed
    words = ("--clip-frames", 2, "--samples-per-shard", 5)
    convert(root, tmp_path / "one", *words)
    convert(root, tmp_path / "two", *words, "--workers", 2)
    names = sorted(path.name for path in (tmp_path / "one").glob("*.tar"))
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_long_videos_are_cut_into_samples(mixed, tmp_path, capsys):
    root, made = mixed
    convert(root, tmp_path / "out", "--clip-frames", 4)
    samples = load_back(tmp_path / "out", "videos")
    expected = [("clip 2.mkv", 0, 4), ("clip 10.avi", 0, 4), ("frames é", 0, 4), ("frames é", 4, 8),
                ("frames é", 8, 12), ("x.GIF", 0, 3)]  # fmt: skip
    assert len(samples) == len(expected)
    for sample, (name, first, end) in zip(samples, expected, strict=True):
        np.testing.assert_array_equal(sample["video.npy"], made[name][first:end])
        assert sample["info.json"]["frames"] == list(range(first, end))
    assert "left out 3 frames after the last whole clips" in capsys.readouterr().out
    convert(root, tmp_path / "kept", "--clip-frames", 4, "--rest", "keep")
    lengths = [len(sample["video.npy"]) for sample in load_back(tmp_path / "kept", "videos")]
    assert lengths == [4, 2, 4, 1, 4, 4, 4, 3]


def test_rates_and_durations(mixed, tmp_path):
    root, made = mixed
    convert(root, tmp_path / "out", "--fps", 5, "--frames-fps", "20", "--clip-seconds", 0.6, "--max-frames", 3)
    samples = load_back(tmp_path / "out", "videos")
    frames = [sample["info.json"]["frames"] for sample in samples]
    assert frames == [[0, 2, 4], [0, 2, 4], [0, 4, 8], [0, 2]]
    for sample, video in zip(samples, made.values(), strict=True):
        np.testing.assert_array_equal(sample["video.npy"], video[sample["info.json"]["frames"]])
        assert sample["info.json"]["fps"] == 5
    for words in (("--fps", 5), ("--clip-seconds", 1)):
        with pytest.raises(ConfigError, match=r"frame rate for video .*frames é.*--frames-fps"):
            convert(root, tmp_path / "other", *words)


def test_sizes(mixed, tmp_path):
    root, made = mixed
    convert(root, tmp_path / "short", "--short-side", 5)
    convert(root, tmp_path / "size", "--size", "8x6", "--resample", "nearest")
    for short, size, video in zip(
        load_back(tmp_path / "short", "videos"), load_back(tmp_path / "size", "videos"), made.values(), strict=True
    ):
        np.testing.assert_array_equal(short["video.npy"], [resize_frame(frame, (5, 7)) for frame in video])
        np.testing.assert_array_equal(size["video.npy"], [resize_ids(frame, (8, 6)) for frame in video])


@pytest.mark.parametrize("kind", ["a_masks", "masks/a", "a.masks.npy", "a.masks.npz"])
def test_masks_are_found_and_cut_as_their_video(tmp_path, kind):
    root, video = tmp_path / "in", smooth_video(6, 10, 14)
    write_frames(root / "a", video)
    write_frames(root / "b", video)
    ids = ids_like(video, (255, 3))
    if kind.endswith("npy"):
        np.save(root / kind, ids.astype(np.int32) * 1000)
    elif kind.endswith("npz"):
        np.savez(root / kind, masks=ids[..., None])
    else:
        write_ids(root / kind, ids)
    expected = (ids == 3) * np.uint8(1) + (ids == 255) * np.uint8(2)
    convert(root, tmp_path / "out", "--clip-frames", 3)
    samples = load_back(tmp_path / "out", "videos")
    np.testing.assert_array_equal(np.concatenate([s["segmentations.npy.gz"] for s in samples[:2]])[..., 0], expected)
    assert samples[0]["info.json"]["object_ids"] == ([3000, 255000] if kind.endswith("npy") else [3, 255])
    assert all("segmentations.npy.gz" not in sample for sample in samples[2:])
    convert(root, tmp_path / "small", "--short-side", 5, "--frames-fps", 10, "--fps", 5)
    small = load_back(tmp_path / "small", "videos")[0]["segmentations.npy.gz"][..., 0]
    np.testing.assert_array_equal(small, expected[::2, 1::2, 1::2])


def test_masks_of_one_channel_an_object_stay_so(tmp_path):
    root, video = tmp_path / "in", smooth_video(4, 10, 14)
    write_frames(root / "a", video)
    masks = np.random.default_rng(0).integers(0, 2, (4, 10, 14, 3)).astype(bool)
    np.save(root / "a.masks.npy", masks)
    convert(root, tmp_path / "out")
    (sample,) = load_back(tmp_path / "out", "videos")
    np.testing.assert_array_equal(sample["segmentations.npy.gz"], masks)
    data = ShardDataModule(
        validation=str(tmp_path / "out" / "*.tar"), batch_size=1, num_workers=0, has_background=False
    )
    data.prepare_data()
    data.setup("validate")
    found = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)["segmentations"][0]
    np.testing.assert_array_equal(found.numpy(), np.moveaxis(masks, -1, 1))


def test_masks_of_a_file_go_by_its_stem(tmp_path):
    pytest.importorskip("av")
    video = smooth_video(5, 10, 14)
    encode_file(tmp_path / "a b.mkv", video)
    write_ids(tmp_path / "a b_masks", ids_like(video))
    convert(tmp_path, tmp_path / "out", "--max-frames", 2)
    (sample,) = load_back(tmp_path / "out", "videos")
    np.testing.assert_array_equal(sample["segmentations.npy.gz"][..., 0], ids_like(video)[:2])


def _fewer(root):
    os.unlink(root / "a_masks" / "3.png")


def _other_size(root):
    Image.new("L", (14, 11)).save(root / "a_masks" / "3.png")


def _colour(root):
    Image.new("RGB", (14, 10)).save(root / "a_masks" / "3.png")


def _cut_mask(root):
    (root / "a_masks" / "3.png").write_bytes((root / "a_masks" / "3.png").read_bytes()[:40])


def _array(array):
    def damage(root):
        for path in (root / "a_masks").iterdir():
            path.unlink()
        (root / "a_masks").rmdir()
        np.save(root / "a.masks.npy", array, allow_pickle=True)

    return damage


def _frame_size(root):
    Image.new("RGB", (14, 11)).save(root / "a" / "00003.png")


def _cut_frame(root):
    (root / "a" / "00003.png").write_bytes(b"")


SHADES = np.arange(6 * 10 * 14).reshape(6, 10, 14)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_fewer, r"video .*a, but got 5 masks in .*a_masks and 6 frames"),
        (_other_size, "to be 10 x 14 .* but mask 3 is 11 x 14"),
        (_colour, r"mask .*3\.png of video .* mode 'RGB'"),
        (_cut_mask, r"mask .*3\.png of video .*a damaged one"),
        (_frame_size, r"first has 10 x 14 and frame 3 \(00003\.png\) has 11 x 14"),
        (_cut_frame, r"00003\.png of video .* an empty file"),
        (_array(np.zeros((5, 10, 14), int)), r"got 5 masks in .*a\.masks\.npy and 6 frames"),
        (_array(np.zeros((6, 10, 14))), "to be integers .* but got float64"),
        (_array(np.zeros((6, 10), int)), r"but got int64 \(6, 10\)"),
        (_array(np.full((6, 10, 14), None)), "an array of numbers, but reading it failed"),
        (_array(np.full((6, 10, 14), -1)), "ids from 0 on .* but mask 0 holds -1"),
        (_array(SHADES), "at most 255 objects .* but got 839"),
    ],
)
@pytest.mark.parametrize("words", [(), ("--clip-frames", 3)])
def test_videos_and_masks_that_do_not_fit_are_refused_or_skipped(tmp_path, damage, message, words):
    root, video = tmp_path / "in", smooth_video(6, 10, 14)
    write_frames(root / "a", video)
    write_frames(root / "b", video)
    write_ids(root / "a_masks", ids_like(video))
    damage(root)
    if words and "839" in message:
        message = "at most 255 objects .* but got 419"
    if words and "first has 10" in message:
        message = r"first has 11 x 14 and frame 4 \(00004\.png\) has 10 x 14"  # frame 3 begins the second clip
    with pytest.raises(ShardError, match=message):
        convert(root, tmp_path / "out", *words)
    convert(root, tmp_path / "out", *words, "--on-bad-sample", "skip")
    names = [sample["info.json"]["video"] for sample in load_back(tmp_path / "out", "videos")]
    assert names.count("b") == (2 if words else 1)
    assert names.count("a") <= (1 if words else 0)


@pytest.mark.parametrize("words", [(), ("--clip-frames", 2)])
def test_damaged_files_are_skipped_and_named(mixed, tmp_path, words, capsys):
    root, _ = mixed
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_bytes(b"this is no video" * 99)
    with pytest.raises(ShardError, match=r"video .*empty\.mp4 to be a whole video file, but got an empty file"):
        convert(root, tmp_path / "out", *words)
    convert(root, tmp_path / "out", *words, "--on-bad-sample", "skip")
    assert "skipped 2 videos" in capsys.readouterr().out
    skipped = read_index(tmp_path / "out").recipe["videos"]["skipped"]
    assert {name for name in ("empty.mp4", "text.mp4") for reason in skipped.values() if name in reason} == {
        "empty.mp4", "text.mp4",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "but got nothing"),
        (["a.txt", ".b.mp4"], r"but got 1 hidden \(\.b\.mp4, …\), 1 no media \(a\.txt"),
        (["0.png", "1.png"], r"but got 2 pictures \(0\.png, …\)\. Move the frames of each video into a sub-folder"),
        (["sub/a.mp4"], "1 folders without frames"),
        (["a/0.png", "masks/b/0.png"], "masks/b to belong to one video called 'b', but got no such video"),
        (["a/0.png", "b_masks/0.png"], "b_masks to belong to one video called 'b'"),
        (["a/0.png", "b.masks.npy"], "'b', but got no such video"),
        (["a.mp4", "a.avi", "a.masks.npy"], "'a', but got the videos a.avi, a.mp4"),
        (["a/0.png", "a_masks/0.png", "a.masks.npy"], "one place with masks of a, but got a.masks.npy, a_masks"),
    ],
)
def test_folders_that_hold_no_videos_or_stray_masks_are_refused(tmp_path, entries, message):
    for entry in entries:
        (tmp_path / entry).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / entry).write_bytes(b"x")
    with pytest.raises(ConfigError, match=message):
        scan_folder(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "8x8", "--short-side", 5), "one of --size and --short-side"),
        (("--max-frames", 0), "--max-frames to be above 0, but got 0"),
        (("--clip-frames", -2), "--clip-frames to be above 0"),
        (("--clip-seconds", "nan"), "--clip-seconds to be above 0, but got nan"),
        (("--short-side", 9000), "from 1 to 8192"),
    ],
)
def test_settings_that_do_not_fit_write_nothing(tmp_path, words, message):
    write_frames(tmp_path / "in" / "a", smooth_video(2, 8, 8))
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "in", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fps", "0"), "above 0 and up to 1000"),
        (("--fps", "fast"), "such as 12 or 30000/1001"),
        (("--size", "0x4"), "such as 128 or 240x320"),
        (("--short-side", "small"), "a number of pixels or `none`"),
        (("--clip-frames", 2, "--clip-seconds", 2), "not allowed with argument"),
    ],
)
def test_words_that_are_no_numbers_stop_the_parser(tmp_path, words, message, capsys):
    with pytest.raises(SystemExit):
        convert(tmp_path, tmp_path / "out", *words)
    assert message in capsys.readouterr().err


def test_a_sample_that_would_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    write_frames(tmp_path / "in" / "a", smooth_video(9, 8, 8))
    monkeypatch.setattr(videos_module, "_MAX_BYTES", 4 * 8 * 8 * 3)
    with pytest.raises(ShardError, match=r"first 5 frames of 8 x 8 take more\. Cut the video with --clip-frames"):
        convert(tmp_path / "in", tmp_path / "out")
    assert convert(tmp_path / "in", tmp_path / "out2", "--clip-frames", 4) == 0


def test_mp4_shards_and_a_missing_root(tmp_path):
    pytest.importorskip("av")
    write_frames(tmp_path / "in" / "a", smooth_video(3, 16, 16))
    convert(tmp_path / "in", tmp_path / "out", "--video-format", "mp4", "--prefix", "mine")
    (sample,) = load_back(tmp_path / "out", "mine")
    assert sample["video.mp4"].shape == (3, 16, 16, 3)
    with pytest.raises(ConfigError, match=r"--root to be a folder of videos, but .*none is none"):
        convert(tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize(("name", "codec", "pixels"), [("b.avi", "ffv1", "bgr0"), ("b.mp4", "libx264", "yuv420p")])
@pytest.mark.parametrize("words", [(), ("--clip-frames", 2), ("--fps", 5)])
def test_a_video_with_an_unreadable_tail_is_refused_and_its_start_can_be_had(tmp_path, name, codec, pixels, words):
    pytest.importorskip("av")
    root = tmp_path / "in"
    root.mkdir()
    encode_file(root / "a.mkv", smooth_video(12, 32, 32))
    noise = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    path = encode_file(root / name, noise, codec, pixels=pixels, container={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    message = rf"video .*{name} to be whole, but its header says 12 frames and it ends after \d+.*--max-frames \d"
    with pytest.raises(ShardError, match=message):
        convert(root, tmp_path / "out", *words)
    convert(root, tmp_path / "out", *words, "--on-bad-sample", "skip")
    assert {sample["info.json"]["video"] for sample in load_back(tmp_path / "out", "videos")} == {"a.mkv"}
    convert(root, tmp_path / "start", *words, "--max-frames", 2)
    samples = load_back(tmp_path / "start", "videos")
    assert [sample["info.json"]["video"] for sample in samples] == ["a.mkv", name]
    assert [len(sample["video.npy"]) for sample in samples] == [2, 2]


def test_frames_that_vanish_in_decoding_are_missed(tmp_path, monkeypatch):
    pytest.importorskip("av")
    encode_file(tmp_path / "a.mkv", smooth_video(6, 16, 16))
    real = videos_module.read_frames
    monkeypatch.setattr(videos_module, "read_frames", lambda *words: list(real(*words))[:4])
    with pytest.raises(ShardError, match=r"only 4 of its 6 frames can be decoded\. .* --max-frames 4"):
        convert(tmp_path, tmp_path / "out")
