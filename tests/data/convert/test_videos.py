"""Folders of own videos to shards and back: files, GIFs, folders of frames, and their masks."""

from __future__ import annotations

import numpy as np
import pytest
from folder_sets import encode_file, load_back, run_convert, smooth_video, write_pictures
from PIL import Image

from ssync_pl.data.convert import media
from ssync_pl.data.convert.media import inspect_video, natural_key, read_frames, resize_ids, stack_frames
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


@pytest.fixture
def mixed(tmp_path):
    """A video of each kind, in natural order, among other files."""
    root = tmp_path / "my videos ü"
    root.mkdir()
    made = {"12:30.mkv": smooth_video(6, seed=1), "clip 10.avi": smooth_video(5, seed=2)}
    encode_file(root / "x.mkv", made["12:30.mkv"]).rename(root / "12:30.mkv")  # no protocol
    encode_file(root / "clip 10.avi", made["clip 10.avi"])
    made["frames é"] = smooth_video(12, seed=4)
    write_pictures(root / "frames é", made["frames é"], "f{}.png")  # f10 comes after f9
    grey = smooth_video(3, seed=3)[..., :1].repeat(3, -1)
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
    assert "masks: 0 of 4 videos" in text
    assert "ignored 4: .DS_Store, empty, gone.mp4, notes.txt" in text


def test_long_videos_are_cut(mixed, tmp_path, capsys):
    root, made = mixed
    words = ("--clip-frames", 4, "--samples-per-shard", 4, "--prefix", "own-train")
    convert(root, tmp_path / "out", *words)
    expected = [("12:30.mkv", 0, 4), ("clip 10.avi", 0, 4), ("frames é", 0, 4), ("frames é", 4, 8),
                ("frames é", 8, 12), ("x.GIF", 0, 3)]  # fmt: skip
    for sample, (name, first, end) in zip(load_back(tmp_path / "out", "own-train"), expected, strict=True):
        np.testing.assert_array_equal(sample["video.npy"], made[name][first:end])
        assert sample["info.json"]["frames"] == list(range(first, end))
        assert sample["info.json"]["source_frames"] == len(made[name])
    assert "left out 3 frames after the last whole clips" in capsys.readouterr().out


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a_masks", "a_mask", "masks/a", "a.masks.npy"])
def test_masks_are_found_and_cut_as_their_video(tmp_path, kind):
    root, video = tmp_path / "in", smooth_video(6)
    write_pictures(root / "a", video)
    write_pictures(root / "b", video)
    ids = ids_like(video, (255, 3))
    if kind.endswith("npy"):
        np.save(root / kind, ids.astype(np.int32) * 1000)
    else:
        write_pictures(root / kind, ids, "{}.png")
    expected = (ids == 3) * np.uint8(1) + (ids == 255) * np.uint8(2)
    convert(root, tmp_path / "out", "--clip-frames", 3, "--short-side", 5)
    samples = load_back(tmp_path / "out", "videos")
    found = np.concatenate([sample["segmentations.npy.gz"] for sample in samples[:2]])[..., 0]
    np.testing.assert_array_equal(found, expected[:, 1::2, 1::2])
    assert samples[0]["info.json"]["object_ids"] == ([3000, 255000] if kind.endswith("npy") else [3, 255])
    assert len(samples) == 4
    assert all("segmentations.npy.gz" not in sample for sample in samples[2:])


def test_masks_of_channels_and_masks_of_files(tmp_path):
    video = smooth_video(4)
    write_pictures(tmp_path / "a", video)
    masks = np.random.default_rng(0).integers(0, 2, (4, 10, 14, 3)).astype(bool)
    np.save(tmp_path / "a.masks.npy", masks)
    encode_file(tmp_path / "b b.mkv", video)
    write_pictures(tmp_path / "b b_masks", ids_like(video), "mask_{:03d}.png")
    convert(tmp_path, tmp_path / "out")
    a, b = load_back(tmp_path / "out", "videos")
    np.testing.assert_array_equal(a["segmentations.npy.gz"], masks)
    np.testing.assert_array_equal(b["segmentations.npy.gz"][..., 0], ids_like(video))


def test_names_and_numbers_pair_masks_and_never_their_position(tmp_path):
    root, video = tmp_path / "in", smooth_video(5)
    ids = np.stack([np.full((10, 14), t + 1, np.uint8) for t in range(5)])
    write_pictures(root / "a", video, "frame{:03d}.png")
    write_pictures(root / "a_masks", ids, "m{}.png")
    convert(root, tmp_path / "out")
    np.testing.assert_array_equal(load_back(tmp_path / "out", "videos")[0]["segmentations.npy.gz"][..., 0], ids)
    (root / "a" / "frame003.png").unlink()
    (root / "a_masks" / "m2.png").unlink()
    with pytest.raises(ShardError, match=r"frame002\.png.*m3\.png"):
        convert(root, tmp_path / "out2")
    file = tmp_path / "file"
    write_pictures(file / "a_masks", np.concatenate([ids, ids[:1]]), "{}.png")
    encode_file(file / "a.mkv", video)
    (file / "a_masks" / "2.png").unlink()
    with pytest.raises(ShardError, match=r"without a mask 2, .*5\.png"):
        convert(file, tmp_path / "out3")
    write_pictures(tmp_path / "beside" / "clip", video, "{:03d}.jpg")
    write_pictures(tmp_path / "beside" / "clip", ids, "{:03d}.png")
    with pytest.raises(ConfigError, match=r"000\.jpg and 000\.png"):
        convert(tmp_path / "beside", tmp_path / "out4")


def _array(array):
    def damage(root):
        (root / "a_masks").rename(root.parent / "gone")
        np.save(root / "a.masks.npy", array, allow_pickle=True)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "a_masks" / "3.png").unlink(), r"00003\.png"),
        (lambda root: Image.new("L", (14, 11)).save(root / "a_masks" / "3.png"), "11 x 14"),
        (lambda root: Image.new("RGB", (14, 10)).save(root / "a_masks" / "3.png"), "RGB"),
        (lambda root: (root / "a_masks" / "3.png").write_bytes(b"\x89PNG\r\n"), r"mask .*3\.png of video"),
        (lambda root: (root / "a" / "00004.png").write_bytes(b""), r"00004\.png of video .* empty"),
        (lambda root: Image.new("RGB", (14, 11)).save(root / "a" / "00004.png"), r"00004\.png"),
        (_array(np.zeros((5, 10, 14), int)), "5 masks"),
        (_array(np.zeros((6, 10, 14))), "integer"),
        (_array(np.zeros((6, 10), int)), "integer"),
        (_array(np.full((6, 10, 14), None)), "array"),
        (_array(np.full((6, 10, 14), -1)), "ids from 0 on"),
        (_array(np.arange(6 * 10 * 14).reshape(6, 10, 14)), "at most 255 objects"),
    ],
)
@pytest.mark.parametrize("words", [(), ("--clip-frames", 3)])
def test_videos_and_masks_that_do_not_fit_are_refused_or_skipped(tmp_path, damage, message, words):
    root, video = tmp_path / "in", smooth_video(6)
    write_pictures(root / "a", video)
    write_pictures(root / "b", video)
    write_pictures(root / "a_masks", ids_like(video), "{}.png")
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
        (["a.txt", ".b.mp4"], r"\.b\.mp4"),
        (["0.png", "1.png"], "sub-folder"),
        (["sub/a.mp4"], "got sub"),
        (["a/0.png", "masks/b/0.png"], "masks/b"),
        (["a/0.png", "b_masks/0.png"], "b_masks"),
        (["a/0.png", "b.masks.npy"], "b.masks.npy"),
        (["a.mp4", "a.avi", "a.masks.npy"], "a.avi', 'a.mp4"),
        (["a/0.png", "a_masks/0.png", "a.masks.npy"], "a.masks.npy', 'a_masks"),
    ],
)
def test_folders_that_hold_no_videos_or_stray_masks_are_refused(tmp_path, entries, message):
    (tmp_path / "in").mkdir()
    for entry in entries:
        (tmp_path / "in" / entry).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / entry).write_bytes(b"x")
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ConfigError, match="none"):
        convert(tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--clip-frames", -2), "--clip-frames"),
        (("--clip-frames", 0), "--clip-frames"),
        (("--workers", -1), "--workers"),
        (("--samples-per-shard", 0), "--samples-per-shard"),
        (("--prefix", "a/b"), "prefix"),
        (("--short-side", 9000), "from 1 to 8192"),
    ],
)
def test_settings_that_do_not_fit_write_nothing(tmp_path, words, message, capsys):
    write_pictures(tmp_path / "in" / "a", smooth_video(2))
    with pytest.raises((ConfigError, SystemExit)) as caught:
        convert(tmp_path / "in", tmp_path / "out", *words)
    assert message in str(caught.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sample_that_would_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    write_pictures(tmp_path / "in" / "a", smooth_video(9, 8, 8))
    monkeypatch.setattr(media, "_MAX_BYTES", 4 * 8 * 8 * 3)
    with pytest.raises(ShardError, match="--clip-frames"):
        convert(tmp_path / "in", tmp_path / "out")
    assert convert(tmp_path / "in", tmp_path / "out2", "--clip-frames", 4) == 0


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--clip-frames", 2)])
def test_damaged_files_are_skipped_and_named(mixed, tmp_path, words, capsys):
    root, _ = mixed
    gif = (root / "x.GIF").read_bytes()
    for name, content in (
        ("empty.mp4", b""),
        ("text.mp4", b"no video" * 99),
        ("bad.gif", b"GIF89a"),
        ("c.gif", gif[:-5]),
    ):
        (root / name).write_bytes(content)
    with pytest.raises(ShardError, match=r"bad\.gif"):
        convert(root, tmp_path / "out", *words)
    convert(root, tmp_path / "out", *words, "--on-bad-sample", "skip")
    assert "skipped 4 videos" in capsys.readouterr().out
    reasons = " ".join(read_index(tmp_path / "out").recipe["videos"]["skipped"].values())
    assert all(name in reasons for name in ("empty.mp4", "text.mp4", "bad.gif", "c.gif", "an empty file"))


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "said"),
    [
        ("b.avi", "ffv1", "bgr0", "12 frames"),
        ("b.mp4", "libx264", "yuv420p", "12 frames"),
        ("b.mkv", "ffv1", "bgr0", r"1\.20 seconds"),
    ],
)
@pytest.mark.parametrize("words", [(), ("--clip-frames", 2)])
def test_a_file_that_was_cut_off_is_told_by_its_header(tmp_path, name, codec, pixels, said, words):
    root = tmp_path / "in"
    root.mkdir()
    encode_file(root / "a.mkv", smooth_video(12, 32, 32))
    noise = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    path = encode_file(root / name, noise, codec, pixels, {"movflags": "faststart"})
    assert inspect_video(path, name).missing is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ShardError, match=rf"{name} to be whole, but its header says {said}"):
        convert(root, tmp_path / "out", *words)
    convert(root, tmp_path / "out", *words, "--on-bad-sample", "skip")
    assert {sample["info.json"]["video"] for sample in load_back(tmp_path / "out", "videos")} == {"a.mkv"}


def read(path, wanted=None, stamp=None):
    return np.stack(list(read_frames(path, None, wanted, stamp, f"video {path}")))


@pytest.mark.parametrize("options", [{}, {"x264-params": "open-gop=1:keyint=6:bframes=3:min-keyint=1:scenecut=0"}])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_reading_from_the_middle_gives_the_frames_of_the_whole(tmp_path, name, options):
    small = np.random.default_rng(3).integers(0, 255, (26, 4, 6, 3), dtype=np.uint8)
    path = encode_file(tmp_path / name, small.repeat(8, 1).repeat(8, 2), "libx264", "yuv420p", **options)
    whole, facts = read(path), inspect_video(path, name)
    assert len(whole) == facts.frames == 26
    for first in range(1, 24, 3):
        stamp = facts.stamps[first] if facts.stamps else None
        np.testing.assert_array_equal(read(path, range(first, first + 2), stamp), whole[first : first + 2])


def test_gifs_come_back_as_they_are_shown(tmp_path):
    pictures = []
    for k in range(4):
        picture = np.zeros((20, 30, 4), np.uint8)
        picture[2 + k : 9 + k, 3 + 2 * k : 12 + 2 * k] = (200, 50 * k, 30, 255)
        pictures.append(Image.fromarray(picture))
    save = {"save_all": True, "append_images": pictures[1:], "loop": 3, "disposal": 2}
    pictures[0].save(tmp_path / "a.gif", duration=[100, 300, 200, 200], **save)
    expected = np.stack([np.asarray(picture)[..., :3] for picture in pictures])  # transparency over black
    assert np.abs(read(tmp_path / "a.gif").astype(int) - expected).max() < 8  # colours of a palette
    facts = inspect_video(tmp_path / "a.gif", "a")
    assert (facts.frames, facts.rate, facts.missing) == (4, 5.0, None)


def test_names_sort_by_their_numbers_and_sizes_keep_proportions():
    names = ["9.png", "10.png", "F1.png", "f01.png", "f9.png", "f10.png", "x1y9", "x1y10", "²", "١"]
    assert sorted(set(names), key=natural_key) == names
    for size, short_side, expected in (((72, 128), 32, (32, 56)), ((128, 72), 51, (90, 51)), ((4, 6), None, (4, 6))):
        assert stack_frames([np.zeros((*size, 3), np.uint8)], short_side, "a")[0].shape[1:3] == expected
    board = np.zeros((8, 8, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 200
    np.testing.assert_allclose(stack_frames([board], 4, "a")[0][0, 1:3, 1:3], 100, atol=2)  # anti-aliased
    np.testing.assert_array_equal(resize_ids(np.array([[[1, 2]]]), (1, 4)), [[[1, 1, 2, 2]]])
