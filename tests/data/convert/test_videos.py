"""Folders of own videos to shards and back: files, GIFs, folders of frames, and their masks."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from folder_sets import encode_file, load_back, run_convert, smooth_video, write_frames
from PIL import Image

from ssync_pl.data.convert import pictures
from ssync_pl.data.convert.media import Timeline, read_frames, read_timeline, select_frames
from ssync_pl.data.convert.pictures import natural_key, resize_frame, resize_ids, short_side_size
from ssync_pl.data.convert.videos import scan_folder
from ssync_pl.data.index import read_index
from ssync_pl.errors import ConfigError, ShardError

SHADES = np.arange(6 * 10 * 14).reshape(6, 10, 14)


def convert(root, out, *words):
    return run_convert("videos", "--root", root, "--out", out, *words)


def ids_like(video, objects=(1, 2)):
    ids = np.zeros(video.shape[:3], np.uint8)
    for t in range(len(ids)):
        for place, number in enumerate(objects):
            ids[t, 2 * place : 2 * place + 2, t : t + 4] = number
    return ids


def write_ids(folder, ids, pattern="{}.png"):
    folder.mkdir(parents=True)
    for index, one in enumerate(ids):
        Image.fromarray(one).save(folder / pattern.format(index))


@pytest.fixture
def mixed(tmp_path):
    """A video of each kind, in natural order, among other files."""
    root = tmp_path / "my videos ü"
    root.mkdir()
    made = {"12:30.mkv": smooth_video(6, 10, 14, 1), "clip 10.avi": smooth_video(5, 10, 14, 2)}
    for name, video in made.items():
        encode_file(root / "x.mkv", video) if name.endswith("mkv") else encode_file(root / name, video)
    (root / "x.mkv").rename(root / "12:30.mkv")  # no protocol
    made["frames é"] = smooth_video(12, 10, 14, 4)
    write_frames(root / "frames é", made["frames é"], "f{}.png")  # f10 comes after f9
    grey = smooth_video(3, 10, 14, 3)[..., :1].repeat(3, -1)
    shades = [Image.fromarray(frame[..., 0]) for frame in grey]
    shades[0].save(root / "x.GIF", save_all=True, append_images=shades[1:], duration=100)
    made["x.GIF"] = grey
    (root / ".DS_Store").write_bytes(b"x")
    (root / "notes.txt").write_text("x")
    (root / "empty").mkdir()
    (root / "gone.mp4").symlink_to(root / "nowhere")
    return root, made


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
    for line in ("(hidden): .DS_Store", "(no media): notes.txt", "frames): empty", "1 (dangling links): gone.mp4"):
        assert line in text


def test_long_videos_are_cut_and_processes_write_the_same_bytes(mixed, tmp_path, capsys):
    root, made = mixed
    words = ("--clip-frames", 4, "--samples-per-shard", 4)
    convert(root, tmp_path / "out", *words)
    samples = load_back(tmp_path / "out", "videos")
    expected = [("12:30.mkv", 0, 4), ("clip 10.avi", 0, 4), ("frames é", 0, 4), ("frames é", 4, 8),
                ("frames é", 8, 12), ("x.GIF", 0, 3)]  # fmt: skip
    for sample, (name, first, end) in zip(samples, expected, strict=True):
        np.testing.assert_array_equal(sample["video.npy"], made[name][first:end])
        assert sample["info.json"]["frames"] == list(range(first, end))
    assert "left out 3 frames after the last whole clips" in capsys.readouterr().out
    convert(root, tmp_path / "two", *words, "--workers", 2)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.tar")} for n in ("out", "two"))
    assert one == two
    convert(root, tmp_path / "kept", "--clip-frames", 4, "--rest", "keep", "--split-name", "all")
    lengths = [len(sample["video.npy"]) for sample in load_back(tmp_path / "kept", "videos-all")]
    assert lengths == [4, 2, 4, 1, 4, 4, 4, 3]


def test_rates_durations_and_sizes(mixed, tmp_path):
    root, made = mixed
    words = ("--fps", 5, "--frames-fps", "20", "--clip-seconds", 0.6, "--max-frames", 3, "--size", "8x6")
    convert(root, tmp_path / "out", *words)
    samples = load_back(tmp_path / "out", "videos")
    assert [sample["info.json"]["frames"] for sample in samples] == [[0, 2, 4], [0, 2, 4], [0, 4, 8], [0, 2]]
    for sample, video in zip(samples, made.values(), strict=True):
        frames = video[sample["info.json"]["frames"]]
        np.testing.assert_array_equal(sample["video.npy"], [resize_frame(frame, (8, 6)) for frame in frames])
        assert sample["info.json"]["fps"] == 5
    for words in (("--fps", 5), ("--clip-seconds", 1)):
        with pytest.raises(ConfigError, match=r"frames é.*--frames-fps"):
            convert(root, tmp_path / "other", *words)


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a_masks", "a_mask", "masks/a", "a.masks.npy", "a.masks.npz"])
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
    assert len(samples) == 4
    assert all("segmentations.npy.gz" not in sample for sample in samples[2:])
    convert(root, tmp_path / "small", "--short-side", 5, "--frames-fps", 10, "--fps", 5)
    small = load_back(tmp_path / "small", "videos")[0]["segmentations.npy.gz"][..., 0]
    np.testing.assert_array_equal(small, expected[::2, 1::2, 1::2])


def test_masks_of_channels_and_masks_of_files(tmp_path):
    video = smooth_video(4, 10, 14)
    write_frames(tmp_path / "a", video)
    masks = np.random.default_rng(0).integers(0, 2, (4, 10, 14, 3)).astype(bool)
    np.save(tmp_path / "a.masks.npy", masks)
    encode_file(tmp_path / "b b.mkv", video)
    write_ids(tmp_path / "b b_masks", ids_like(video), "mask_{:03d}.png")
    convert(tmp_path, tmp_path / "out", "--max-frames", 2)
    a, b = load_back(tmp_path / "out", "videos")
    np.testing.assert_array_equal(a["segmentations.npy.gz"], masks[:2])
    np.testing.assert_array_equal(b["segmentations.npy.gz"][..., 0], ids_like(video)[:2])


def test_names_and_numbers_pair_masks_and_never_their_position(tmp_path):
    video = smooth_video(5, 10, 14)
    ids = np.stack([np.full((10, 14), t + 1, np.uint8) for t in range(5)])
    write_frames(tmp_path / "in" / "a", video, "frame{:03d}.png")
    write_ids(tmp_path / "in" / "a_masks", ids, "m{}.png")
    convert(tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(load_back(tmp_path / "out", "videos")[0]["segmentations.npy.gz"][..., 0], ids)
    (tmp_path / "in" / "a" / "frame003.png").unlink()
    (tmp_path / "in" / "a_masks" / "m2.png").unlink()
    with pytest.raises(ShardError, match=r"frame002\.png.*m3\.png"):
        convert(tmp_path / "in", tmp_path / "out2")
    encode_file(tmp_path / "file" / "a.mkv", video) if (tmp_path / "file").mkdir() is None else None
    write_ids(tmp_path / "file" / "a_masks", np.concatenate([ids, ids[:1]]))
    (tmp_path / "file" / "a_masks" / "2.png").unlink()
    with pytest.raises(ShardError, match=r"3\.png.*number 2"):
        convert(tmp_path / "file", tmp_path / "out3")


def test_mask_pictures_are_never_frames(tmp_path):
    write_frames(tmp_path / "clip", smooth_video(3, 10, 14), "{:03d}.jpg")
    for k in range(3):
        Image.new("L", (14, 10)).save(tmp_path / "clip" / f"{k:03d}.png")
    with pytest.raises(ConfigError, match=r"000\.jpg and 000\.png"):
        convert(tmp_path, tmp_path / "out")


def _change_masks(work):
    return lambda root: work(root / "a_masks")


def _array(array):
    def damage(root):
        for path in (root / "a_masks").iterdir():
            path.unlink()
        (root / "a_masks").rmdir()
        np.save(root / "a.masks.npy", array, allow_pickle=True)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_change_masks(lambda masks: (masks / "3.png").unlink()), r"00003\.png"),
        (_change_masks(lambda masks: Image.new("L", (14, 11)).save(masks / "3.png")), "11 x 14"),
        (_change_masks(lambda masks: Image.new("RGB", (14, 10)).save(masks / "3.png")), "RGB"),
        (_change_masks(lambda masks: (masks / "3.png").write_bytes(b"\x89PNG\r\n")), r"mask .*3\.png of video"),
        (lambda root: (root / "a" / "00004.png").write_bytes(b""), r"00004\.png of video .* empty"),
        (lambda root: Image.new("RGB", (14, 11)).save(root / "a" / "00004.png"), r"00004\.png"),
        (_array(np.zeros((5, 10, 14), int)), "5 masks"),
        (_array(np.zeros((6, 10, 14))), "integers"),
        (_array(np.zeros((6, 10), int)), "integers"),
        (_array(np.full((6, 10, 14), None)), "integers"),
        (_array(np.full((6, 10, 14), -1)), "ids from 0 on"),
        (_array(SHADES), "at most 255 objects"),
    ],
)
@pytest.mark.parametrize("words", [(), ("--clip-frames", 3)])
def test_videos_and_masks_that_do_not_fit_are_refused_or_skipped(tmp_path, damage, message, words):
    root, video = tmp_path / "in", smooth_video(6, 10, 14)
    write_frames(root / "a", video)
    write_frames(root / "b", video)
    write_ids(root / "a_masks", ids_like(video))
    damage(root)
    with pytest.raises(ShardError, match=message):
        convert(root, tmp_path / "out", *words)
    convert(root, tmp_path / "out", *words, "--on-bad-sample", "skip")
    names = [sample["info.json"]["video"] for sample in load_back(tmp_path / "out", "videos")]
    assert names.count("b") == (2 if words else 1)
    assert names.count("a") <= (1 if words else 0)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "nothing"),
        (["a.txt", ".b.mp4"], "1 hidden"),
        (["0.png", "1.png"], "sub-folder"),
        (["sub/a.mp4"], "folders without frames"),
        (["a/0.png", "masks/b/0.png"], "masks/b"),
        (["a/0.png", "b_masks/0.png"], "b_masks"),
        (["a/0.png", "b.masks.npy"], "b.masks.npy"),
        (["a.mp4", "a.avi", "a.masks.npy"], "a.avi, a.mp4"),
        (["a/0.png", "a_masks/0.png", "a.masks.npy"], "a.masks.npy, a_masks"),
    ],
)
def test_folders_that_hold_no_videos_or_stray_masks_are_refused(tmp_path, entries, message):
    for entry in entries:
        (tmp_path / entry).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / entry).write_bytes(b"x")
    with pytest.raises(ConfigError, match=message):
        scan_folder(tmp_path)
    with pytest.raises(ConfigError, match="none"):
        scan_folder(tmp_path / "none")


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "8x8", "--short-side", 5), "--size and --short-side"),
        (("--max-frames", 0), "--max-frames"),
        (("--clip-frames", -2), "--clip-frames"),
        (("--clip-seconds", "nan"), "--clip-seconds"),
        (("--workers", -1), "--workers"),
        (("--samples-per-shard", 0), "--samples-per-shard"),
        (("--short-side", 9000), "from 1 to 8192"),
        (("--fps", "0"), "above 0 and up to 1000"),
        (("--fps", "fast"), "30000/1001"),
        (("--size", "0x4"), "240x320"),
        (("--clip-frames", 2, "--clip-seconds", 2), "not allowed with"),
    ],
)
def test_settings_that_do_not_fit_write_nothing(tmp_path, words, message, capsys):
    write_frames(tmp_path / "in" / "a", smooth_video(2, 8, 8))
    with pytest.raises((ConfigError, SystemExit)) as caught:
        convert(tmp_path / "in", tmp_path / "out", *words)
    assert message in str(caught.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sample_that_would_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    write_frames(tmp_path / "in" / "a", smooth_video(9, 8, 8))
    monkeypatch.setattr(pictures, "_MAX_BYTES", 4 * 8 * 8 * 3)
    with pytest.raises(ShardError, match="--clip-frames"):
        convert(tmp_path / "in", tmp_path / "out")
    assert convert(tmp_path / "in", tmp_path / "out2", "--clip-frames", 4) == 0


# -- files that are damaged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--clip-frames", 2)])
def test_damaged_files_are_skipped_and_named(mixed, tmp_path, words, capsys):
    root, _ = mixed
    for name, content in (("empty.mp4", b""), ("text.mp4", b"this is no video" * 99), ("bad.gif", b"GIF89a")):
        (root / name).write_bytes(content)
    with pytest.raises(ShardError, match=r"bad\.gif"):
        convert(root, tmp_path / "out", *words)
    convert(root, tmp_path / "out", *words, "--on-bad-sample", "skip")
    assert "skipped 3 videos" in capsys.readouterr().out
    reasons = " ".join(read_index(tmp_path / "out").recipe["videos"]["skipped"].values())
    assert all(name in reasons for name in ("empty.mp4", "text.mp4", "bad.gif", "an empty file"))


@pytest.mark.parametrize(("name", "codec", "pixels"), [("b.avi", "ffv1", "bgr0"), ("b.mp4", "libx264", "yuv420p")])
@pytest.mark.parametrize("words", [(), ("--clip-frames", 2), ("--fps", 5)])
def test_a_video_with_an_unreadable_tail_is_refused_and_its_start_can_be_had(tmp_path, name, codec, pixels, words):
    root = tmp_path / "in"
    root.mkdir()
    encode_file(root / "a.mkv", smooth_video(12, 32, 32))
    noise = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    path = encode_file(root / name, noise, codec, pixels=pixels, container={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ShardError, match=rf"{name} to be whole, but its header says 12 frames.*--max-frames \d"):
        convert(root, tmp_path / "out", *words)
    convert(root, tmp_path / "out", *words, "--on-bad-sample", "skip")
    assert {sample["info.json"]["video"] for sample in load_back(tmp_path / "out", "videos")} == {"a.mkv"}
    convert(root, tmp_path / "start", *words, "--max-frames", 2)
    assert [len(sample["video.npy"]) for sample in load_back(tmp_path / "start", "videos")] == [2, 2]


@pytest.mark.parametrize(("name", "said"), [("a.mp4", "12 frames"), ("a.mkv", r"1\.20 seconds")])
def test_a_file_that_was_cut_off_is_told_by_its_header(tmp_path, name, said):
    video = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    codec, pixels = ("libx264", "yuv420p") if name == "a.mp4" else ("ffv1", "bgr0")
    path = encode_file(tmp_path / name, video, codec, pixels=pixels, container={"movflags": "faststart"})
    assert read_timeline(path, None, None, name).missing is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert re.match(f"its header says {said}", read_timeline(path, None, None, name).missing or "")


# -- frames, times and sizes ------------------------------------------------------------------------------------------


def read(path, wanted=None, stamp=None, names=None):
    return np.stack(list(read_frames(path, names, wanted, stamp, f"video {path}")))


@pytest.mark.parametrize("options", [{}, {"x264-params": "open-gop=1:keyint=6:bframes=3:min-keyint=1:scenecut=0"}])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_reading_from_the_middle_gives_the_frames_of_the_whole(tmp_path, name, options):
    small = np.random.default_rng(3).integers(0, 255, (26, 4, 6, 3), dtype=np.uint8)
    path = encode_file(tmp_path / name, small.repeat(8, 1).repeat(8, 2), "libx264", pixels="yuv420p", **options)
    whole, timeline = read(path), read_timeline(path, None, None, name)
    assert len(whole) == timeline.frames == 26
    for first in range(1, 24, 3):
        stamp = timeline.stamps[first] if timeline.stamps else None
        np.testing.assert_array_equal(read(path, [first, first + 2], stamp), whole[[first, first + 2]])


def test_gifs_and_folders_come_back_with_their_times(tmp_path):
    shades = [Image.new("P", (9, 7), number) for number in (10, 60, 200)]
    for picture in shades:
        picture.putpalette([k % 256 for k in range(768)])
    shades[0].save(tmp_path / "a.gif", save_all=True, append_images=shades[1:], duration=[100, 300, 200], loop=0)
    expected = np.stack([np.array(picture.convert("RGB")) for picture in shades])
    np.testing.assert_array_equal(read(tmp_path / "a.gif"), expected)
    np.testing.assert_array_equal(read(tmp_path / "a.gif", [1, 1]), expected[[1, 1]])
    timeline = read_timeline(tmp_path / "a.gif", None, None, "a")
    assert timeline == Timeline((Fraction(0), Fraction(1, 10), Fraction(2, 5)), 3, Fraction(5))
    video = smooth_video(3, 8, 10)
    names = write_frames(tmp_path / "f", video)
    np.testing.assert_array_equal(read(tmp_path / "f", [2], names=names), video[2:])
    assert read_timeline(Path("f"), names, Fraction(5), "f").times == (0, Fraction(1, 5), Fraction(2, 5))


def test_frames_are_chosen_by_time():
    steady = Timeline(tuple(Fraction(i, 30) for i in range(30)), 30, Fraction(30))
    assert select_frames(steady, Fraction(10), "a") == list(range(0, 30, 3))
    rounded = Timeline(tuple(Fraction(round(1000 * i / 30), 1000) for i in range(30)), 30, Fraction(30))
    assert select_frames(rounded, Fraction(30), "a") == list(range(30))  # Matroska counts milliseconds
    assert select_frames(Timeline((Fraction(0), Fraction(1)), 2, Fraction(1)), Fraction(2), "a") == [0, 0, 1]
    uneven = Timeline((Fraction(0), Fraction(1, 10), Fraction(2)), 3, None)
    assert select_frames(uneven, Fraction(2), "a") == [0, 1, 1, 2, 2]
    assert select_frames(Timeline((), 0, None), Fraction(1), "a") == []


def test_names_sort_by_their_numbers_and_sizes_keep_proportions():
    names = ["9.png", "10.png", "F1.png", "f01.png", "f9.png", "f10.png", "x1y9", "x1y10", "²", "١"]
    assert sorted(set(names), key=natural_key) == names
    sizes = {((720, 1280), 320): (320, 568), ((1280, 720), 518): (920, 518), ((4, 6), None): (4, 6)}
    assert all(short_side_size(*words) == expected for words, expected in sizes.items())
    board = np.zeros((8, 8, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 200
    assert set(np.unique(resize_frame(board, (4, 4), "nearest"))) <= {0, 200}
    np.testing.assert_allclose(resize_frame(board, (4, 4))[1:3, 1:3], 100, atol=2)  # anti-aliased
    np.testing.assert_array_equal(resize_ids(np.array([[1, 2]]), (1, 4)), [[1, 1, 2, 2]])
