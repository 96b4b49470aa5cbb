"""Frames and their times out of real files."""

from __future__ import annotations

import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from folder_sets import encode_file, smooth_video, write_frames
from PIL import Image

from ssync_pl.data import decode
from ssync_pl.data.convert.media import Timeline, read_frames, read_timeline, select_frames
from ssync_pl.errors import ConfigError, ShardError


def read(path, wanted=None, stamp=None, names=None):
    return np.stack(list(read_frames(path, names, wanted, stamp, f"video {path}")))


def noise(frames, height=32, width=48):
    # blocks, so that lossy codecs keep frames apart
    small = np.random.default_rng(3).integers(0, 255, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return small.repeat(8, 1).repeat(8, 2)


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.mov"])
def test_lossless_files_come_back_exactly(tmp_path, name):
    pytest.importorskip("av")
    video = smooth_video(7, 18, 22)
    codec, pixels = ("qtrle", "rgb24") if name.endswith("mov") else ("ffv1", "bgr0")
    path = encode_file(tmp_path / name, video, codec, pixels=pixels)
    np.testing.assert_array_equal(read(path), video)
    np.testing.assert_array_equal(read(path, [0, 2, 2, 6]), video[[0, 2, 2, 6]])
    timeline = read_timeline(path, None, None, name)
    assert timeline.frames == 7
    assert timeline.rate == 10
    assert timeline.times is not None
    np.testing.assert_allclose([float(time) for time in timeline.times], np.arange(7) / 10, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"x264-params": "open-gop=1:keyint=6:bframes=3:min-keyint=1:scenecut=0"}])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_reading_from_the_middle_gives_the_frames_of_the_whole(tmp_path, name, options):
    pytest.importorskip("av")
    path = encode_file(tmp_path / name, noise(26), "libx264", pixels="yuv420p", **options)
    whole = read(path)
    assert len(whole) == 26
    timeline = read_timeline(path, None, None, name)
    for first in range(1, 24):
        stamp = timeline.stamps[first] if timeline.stamps else None
        np.testing.assert_array_equal(read(path, [first, first + 2], stamp), whole[[first, first + 2]])


def test_seeking_spares_decoding_and_a_wrong_stamp_does_no_harm(tmp_path, monkeypatch):
    pytest.importorskip("av")
    path = encode_file(tmp_path / "a.mp4", noise(20), "libx264", pixels="yuv420p", g="5")
    whole, stamps = read(path), read_timeline(path, None, None, "a").stamps
    converted = []
    monkeypatch.setattr(
        decode, "_shown", lambda frame, where, n, real=decode._shown: converted.append(n) or real(frame, where, n)
    )
    np.testing.assert_array_equal(read(path, [12, 14], stamps[12]), whole[[12, 14]])
    assert converted == [12, 14]
    for wrong in (stamps[12] + 1, -999, 10**9):
        np.testing.assert_array_equal(read(path, [12, 14], wrong), whole[[12, 14]])


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_notes_of_phones_are_followed(tmp_path, degrees):
    pytest.importorskip("av")
    path = encode_file(tmp_path / "a.mp4", noise(3), "libx264", pixels="yuv420p")
    plain = read(path)
    data = bytearray(path.read_bytes())
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = [cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30]
    start = data.index(b"tkhd") + 4 + 40  # version, times, track, duration, layer, group, volume
    data[start : start + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in matrix)
    path.write_bytes(data)
    # The note says how far to turn clockwise.
    np.testing.assert_array_equal(read(path), np.rot90(plain, -degrees // 90, axes=(1, 2)))


def test_gifs_come_back_with_their_times(tmp_path):
    shades = [Image.new("P", (9, 7), number) for number in (10, 60, 200)]
    for picture in shades:
        picture.putpalette([k % 256 for k in range(768)])
    shades[0].save(tmp_path / "a.gif", save_all=True, append_images=shades[1:], duration=[100, 300, 200], loop=0)
    expected = np.stack([np.array(picture.convert("RGB")) for picture in shades])
    np.testing.assert_array_equal(read(tmp_path / "a.gif"), expected)
    np.testing.assert_array_equal(read(tmp_path / "a.gif", [1]), expected[1:2])
    timeline = read_timeline(tmp_path / "a.gif", None, None, "a")
    assert timeline == Timeline((Fraction(0), Fraction(1, 10), Fraction(2, 5)), 3, Fraction(5))


def test_gifs_of_pyav_come_back(tmp_path):
    pytest.importorskip("av")
    video = np.full((4, 16, 16, 3), 255, np.uint8)
    video[1, 4:8] = 0
    video[3, :, 4:8] = 0
    encode_file(tmp_path / "a.gif", video, "gif", pixels="rgb8")
    np.testing.assert_allclose(read(tmp_path / "a.gif").astype(int), video, atol=36)  # one palette for all colours


def test_folders_sort_by_number_and_may_mix_modes(tmp_path):
    video = smooth_video(3, 8, 10)
    names = write_frames(tmp_path, video)
    Image.fromarray(video[1]).convert("RGBA").save(tmp_path / names[1])
    np.testing.assert_array_equal(read(tmp_path, names=names), video)
    np.testing.assert_array_equal(read(tmp_path, [2], names=names), video[2:])
    Image.new("RGB", (11, 8)).save(tmp_path / names[2])
    with pytest.raises(ShardError, match=r"first has 8 x 10 and frame 2 \(00002\.png\) has 8 x 11"):
        read(tmp_path, names=names)


def test_frames_are_chosen_by_time():
    steady = Timeline(tuple(Fraction(i, 30) for i in range(30)), 30, Fraction(30))
    assert select_frames(steady, Fraction(10), "a") == list(range(0, 30, 3))
    assert select_frames(steady, Fraction(30), "a") == list(range(30))
    rounded = Timeline(tuple(Fraction(round(1000 * i / 30), 1000) for i in range(30)), 30, Fraction(30))
    assert select_frames(rounded, Fraction(30), "a") == list(range(30))  # Matroska counts milliseconds
    assert select_frames(Timeline((Fraction(0), Fraction(1)), 2, Fraction(1)), Fraction(2), "a") == [0, 0, 1]
    uneven = Timeline((Fraction(0), Fraction(1, 10), Fraction(2)), 3, None)
    assert select_frames(uneven, Fraction(2), "a") == [0, 1, 1, 2, 2]
    assert select_frames(Timeline((), 0, None), Fraction(1), "a") == []
    with pytest.raises(ConfigError, match=r"frame rate for video x, which is a folder .* --frames-fps"):
        select_frames(read_timeline(Path("x"), ["0.png"], None, "video x"), Fraction(1), "video x")


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.avi"])
@pytest.mark.parametrize(("content", "got"), [(b"", "an empty file"), (b"no video at all", "a damaged one")])
def test_what_is_no_video_is_named(tmp_path, name, content, got):
    pytest.importorskip("av")
    (tmp_path / name).write_bytes(content)
    for work in (lambda path: read(path), lambda path: read_timeline(path, None, None, f"video {path}")):
        with pytest.raises(ShardError, match=rf"Expected video .*{name} to be a whole .* got {got}"):
            work(tmp_path / name)


def test_a_file_without_pictures_is_refused(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ShardError, match="video stream"):
        read(tmp_path / "a.mkv")


@pytest.mark.parametrize(
    ("name", "said"),
    [("a.mp4", "12 frames"), ("a.avi", "12 frames"), ("a.mkv", r"1\.20 seconds"), ("a.webm", r"1\.20 seconds")],
)
def test_a_file_that_was_cut_off_is_told_by_its_header(tmp_path, name, said):
    pytest.importorskip("av")
    video = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    codec, pixels = {"a.mp4": ("libx264", "yuv420p"), "a.webm": ("libvpx-vp9", "yuv420p")}.get(name, ("ffv1", "bgr0"))
    path = encode_file(tmp_path / name, video, codec, pixels=pixels, container={"movflags": "faststart"})
    whole, data = read(path), path.read_bytes()
    assert read_timeline(path, None, None, name).missing is None
    path.write_bytes(data[: len(data) * 2 // 3])
    timeline = read_timeline(path, None, None, name)
    assert timeline.frames < 12
    assert re.match(rf"its header says {said} and it ends after ", timeline.missing or "")
    np.testing.assert_array_equal(read(path, range(4)), whole[:4])
    with pytest.raises(
        ShardError, match=r"Expected .*a\.\w+ to (have at least 12 frames|be a whole video file|decode)"
    ):
        read(path, range(12))


def test_damaged_bytes_within_a_file_are_refused(tmp_path):
    pytest.importorskip("av")
    rng = np.random.default_rng(0)
    video = rng.integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
    path = encode_file(tmp_path / "a.mp4", video, "libx264", pixels="yuv420p")
    data = bytearray(path.read_bytes())
    fifth = len(data) // 5
    data[2 * fifth : 3 * fifth] = rng.bytes(fifth)
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"a\.mp4 to (be a whole video file|decode)"):
        read(path)


def test_pyav_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match="PyAV"):
        read(tmp_path / "a.mp4")
