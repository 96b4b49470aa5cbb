import builtins
import gzip
import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from ssync_pl.data import decode
from ssync_pl.errors import ConfigError, ShardError

HERE = "a.tar, key 7"
COLOURS = np.random.default_rng(0).integers(0, 255, (3, 4, 3)).astype(np.uint8)


class _Boom:
    """Pickles to a call that leaves a trace when it is loaded."""

    def __reduce__(self):
        return (exec, ("import builtins; builtins.ssync_boom = True",))


TURNED = Image.Exif()
TURNED[0x0112] = 6  # by 90 degrees to the right


def picture_bytes(array, kind="PNG", mode=None, palette=False, **options):
    buffer = io.BytesIO()
    picture = Image.fromarray(array).convert(mode) if mode else Image.fromarray(array)
    if palette:
        picture.putpalette(bytes(range(255, 0, -17)))
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def video_bytes(frames, codec="mpeg4", container="mp4", pixels="yuv420p", **options):
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=12, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        kind = "rgba" if frames[0].shape[-1] == 4 else "rgb24"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=kind)))
        output.mux(stream.encode())
    return buffer.getvalue()


def edited(data, *edits):
    """An MP4 of 12 frames per second whose edit list shows parts of it, as (first frame, frames)."""
    movie, track = (int.from_bytes(data[data.index(name) + 16 :][:4], "big") // 12 for name in (b"mvhd", b"mdhd"))
    parts = b"".join(struct.pack(">IiI", count * movie, first * track, 1 << 16) for first, count in edits)
    new = struct.pack(">I4sI4sII", 24 + len(parts), b"edts", 16 + len(parts), b"elst", 0, len(edits)) + parts
    start = data.index(b"edts") - 4
    old = int.from_bytes(data[start : start + 4], "big")
    changed = bytearray(data[:start] + new + data[start + old :])
    for at in (changed.index(b"moov") - 4, changed.index(b"trak") - 4):
        struct.pack_into(">I", changed, at, int.from_bytes(changed[at : at + 4], "big") + len(new) - old)
    return bytes(changed)


def sounding(video, container, disposition=0):
    """A file with two seconds of silence and, as its only pictures, those of a video."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(buffer, "w", format=container) as output:
        sound, stream = output.add_stream("aac", rate=8000), output.add_stream_from_template(source.streams.video[0])
        stream.disposition = disposition
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
        for number in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * number
            output.mux(sound.encode(frame))
        output.mux(sound.encode())
    return buffer.getvalue()


def npy_header(kind, shape):
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({shape}), }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def grey(level, height=16, width=32):
    return np.full((height, width, 3), level, np.uint8)


def test_arrays_come_back_whatever_their_order_and_packing(npy_bytes):
    array = np.random.default_rng(0).integers(0, 255, (3, 4, 5, 3)).astype(np.uint8)
    for stored in (array, np.asfortranarray(array)):
        assert np.array_equal(decode.decode_member("video.npy", npy_bytes(stored)), array)
        assert np.array_equal(decode.decode_member("video.npy.gz", gzip.compress(npy_bytes(stored))), array)
    for kind in ("<f4", ">f4", "?", "<M8[s]", [("a", "<i4"), ("b", "u1")]):
        for shape in ((), (0,), (4, 2, 1, 3)):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ones(shape, kind), version=(2, 0))
            np.testing.assert_array_equal(decode.decode_member("a.npy", buffer.getvalue()), np.ones(shape, kind))
    data = npy_bytes(array)
    assert np.shares_memory(decode.decode_member("video.npy", memoryview(data)), np.frombuffer(data, np.uint8))


@pytest.mark.parametrize(
    ("member", "data", "expected"),
    [
        ("segmentations.png", picture_bytes(COLOURS[..., 0]), COLOURS[..., 0]),
        ("segmentations.png", picture_bytes(COLOURS[..., 0].astype(np.uint16) + 300), COLOURS[..., 0] + np.int64(300)),
        ("image.png", picture_bytes(COLOURS), COLOURS),
        ("image.png", picture_bytes(COLOURS[..., 0]), np.repeat(COLOURS[..., :1], 3, -1)),
        ("image.png", picture_bytes(np.dstack([COLOURS, np.zeros((3, 4), np.uint8)])), COLOURS * 0),
        ("image.png", picture_bytes(COLOURS, exif=TURNED), np.rot90(COLOURS, -1)),
        ("segmentations.png", picture_bytes(COLOURS[..., 0], exif=TURNED), COLOURS[..., 0]),
        ("segmentations.png", picture_bytes(COLOURS[..., 0] % 5, palette=True), COLOURS[..., 0] % 5),
        ("image.png", picture_bytes(COLOURS[..., 0].astype(np.uint16) << 8), np.repeat(COLOURS[..., :1], 3, -1)),
        ("image.jpg", picture_bytes(COLOURS * 0 + 255, "JPEG", "CMYK"), COLOURS * 0 + 255),
        ("info.json", b'\xef\xbb\xbf{"fps": 12}', {"fps": 12}),
        ("info.json", b"[NaN]", [np.nan]),
    ],
)
def test_pictures_keep_ids_and_become_colours_and_json_is_parsed(member, data, expected):
    np.testing.assert_equal(decode.decode_member(member, data), expected)


@pytest.mark.parametrize(
    ("member", "data", "word"),
    [
        *((f"video.{name}", b"anything", "can execute code") for name in ("pyd", "pkl", "pth", "pickle", "pt")),
        *((name, b"", "allow-list") for name in ("video.tiff", "video", "video.npz", "video.gz", "video.txt.gz")),
        ("image.png", picture_bytes(COLOURS, "TIFF"), "picture"),
        ("segmentations.png", picture_bytes(COLOURS), "grey or palette"),
        ("video.npy", npy_header("|u1", "-" * 9000 + "1"), "NPY header"),
        ("video.npy", npy_header("|u1", "-1,"), "NPY header"),
        ("video.npy", npy_header("|O8", "1,"), "NPY header|numbers"),
        ("info.json", b"[" * 100_000, "JSON"),
        ("video.mp4", video_bytes([grey(9)] * 9)[:-200], "frames"),
    ],
)
def test_other_members_are_refused_by_name(member, data, word):
    with pytest.raises(ShardError, match=rf"`{member}` of {HERE}.*{word}"):
        decode.decode_member(member, data, HERE)


def test_arrays_of_objects_are_refused_without_running_them(npy_bytes):
    data = npy_bytes(np.array([_Boom()], dtype=object))
    for name, payload in (("video.npy", data), ("video.npy.gz", gzip.compress(data))):
        with pytest.raises(ShardError, match="Python objects"):
            decode.decode_member(name, payload, HERE)
    assert not hasattr(builtins, "ssync_boom")


def test_half_written_and_surplus_bytes_are_refused(npy_bytes):
    data = npy_bytes(np.random.default_rng(0).integers(0, 255, (10, 10), dtype=np.uint8))
    for wrong in (data[:-1], data + b"more"):
        for name, payload in (("video.npy", wrong), ("video.npy.gz", gzip.compress(wrong))):
            with pytest.raises(ShardError, match="100 bytes"):
                decode.decode_member(name, payload)


def test_members_over_the_limit_are_refused_and_an_option_raises_it(npy_bytes):
    array = npy_bytes(np.zeros((10, 32, 32, 3), np.uint8))
    members = {
        "video.npy": array,
        "video.npy.gz": gzip.compress(array),
        "image.png": picture_bytes(np.zeros((100, 100, 3), np.uint8)),
        "video.mp4": video_bytes([grey(0)] * 10),
    }
    for name, data in members.items():
        decode.decode_member(name, data, HERE, max_bytes=40_000)
        with pytest.raises(ShardError, match="max_member_bytes"):
            decode.decode_member(name, data, HERE, max_bytes=10_000)
    with pytest.raises(ShardError, match="at most"):
        decode.decode_member("video.npy.gz", gzip.compress(npy_header("|u1", f"{1 << 40}, 0")))


def test_frames_of_a_video_come_back_in_part_and_whole():
    data = video_bytes([grey(level) for level in range(0, 200, 20)])
    assert decode.inspect_video(data, HERE).frames == 10
    whole = decode.decode_member("video.mp4", data)
    assert whole.shape == (10, 16, 32, 3)
    assert np.abs(whole.mean((1, 2, 3)) - np.arange(0, 200, 20)).max() < 6
    np.testing.assert_array_equal(np.stack(list(decode.decode_video(data, HERE, range(2, 6, 3)))), whole[[2, 5]])
    with pytest.raises(ShardError, match="only 10"):
        list(decode.decode_video(data, HERE, range(8, 13, 4)))


def test_headers_that_ask_for_absurd_sizes_are_damage_and_memory_that_ran_out_is_not(monkeypatch):
    av = pytest.importorskip("av")
    for raised, seen in (
        (av.error.MemoryError(12, "Cannot allocate memory"), ShardError),
        (MemoryError(), MemoryError),
    ):
        monkeypatch.setattr(av, "open", lambda *args, raised=raised, **options: (_ for _ in ()).throw(raised))
        with pytest.raises(seen):
            decode.inspect_video(b"", HERE)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_turned_and_mirrored_as_the_display_matrix_says(turns, mirrored):
    frame = np.zeros((16, 32, 3), np.uint8)
    frame[:8, :16] = 255
    data = bytearray(video_bytes([frame] * 2))
    (plain,) = decode.decode_video(data, HERE, range(1))
    # The matrix maps (x, y) to (a x + c y, b x + d y); a mirror turns x around first.
    a, b, c, d = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)][turns]
    a, b = (-a, -b) if mirrored else (a, b)
    start = data.index(b"tkhd") + 4 + 40  # version, times, track, duration, layer, group, volume
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[start : start + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in matrix)
    (shown,) = decode.decode_video(data, HERE, range(1))
    np.testing.assert_array_equal(shown, np.rot90(plain[:, ::-1] if mirrored else plain, turns))


@pytest.mark.parametrize(
    "kind", [("qtrle", "mov", "argb"), *((f"libvpx{n}", "webm", "yuva420p") for n in ("", "-vp9"))]
)
def test_transparent_pixels_are_black_in_videos_as_in_pictures(tmp_path, kind):
    clear = np.dstack([grey(200), np.full((16, 32), 100, np.uint8)])
    (tmp_path / "a.mov").write_bytes(
        video_bytes([clear], *kind, **({"auto-alt-ref": "0"} if kind[1] == "webm" else {}))
    )
    (frame,) = decode.decode_video(tmp_path / "a.mov", HERE)
    np.testing.assert_allclose(frame, decode.decode_picture(picture_bytes(clear), HERE), atol=3)


@pytest.mark.parametrize("edits", [[(0, 5)], [(2, 4)], [(4, 8)], [(0, 3), (8, 3)], [(0, 3), (0, 3)]])
def test_what_an_edit_list_shows_is_a_whole_video(edits):
    data = video_bytes([grey(20 * level) for level in range(12)], "libx264", g="4", bf="0")
    shown = [level for first, count in edits for level in range(first, first + count)]
    whole = decode.decode_member("video.mp4", edited(data, *edits))
    np.testing.assert_allclose(whole.mean((1, 2, 3)), np.multiply(20, shown), atol=6)
    assert decode.inspect_video(edited(data, *edits), HERE).frames == len(shown)


def test_sound_does_not_hide_that_a_file_is_cut_off_and_a_cover_is_no_video():
    data = sounding(video_bytes([grey(level) for level in range(24)]), "matroska")
    assert decode.inspect_video(data, HERE).frames == 24
    with pytest.raises(ShardError, match="seconds and it ends"):
        decode.inspect_video(data[: len(data) * 4 // 5], HERE)
    with pytest.raises(ShardError, match="without a video stream"):
        decode.inspect_video(sounding(video_bytes([grey(0)], "mjpeg", pixels="yuvj420p"), "mp4", 1024), HERE)


def test_a_video_whose_size_changes_is_refused_by_name():
    av = pytest.importorskip("av")
    parts = [video_bytes([grey(9, *size)] * 3, "libx264", "h264", bf="0") for size in ((32, 32), (48, 64))]
    buffer = io.BytesIO()
    with av.open(io.BytesIO(b"".join(parts)), format="h264") as source, av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            packet.pts = packet.dts = number * 1000
            packet.stream = stream
            output.mux(packet)
    for wanted in (None, range(3, 6)):  # a clip behind the change is no better
        with pytest.raises(ShardError, match=f"{HERE} to have one size"):
            list(decode.decode_video(buffer.getvalue(), HERE, wanted))


def test_files_are_never_taken_for_addresses_and_playlists_never_followed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "12:30.mp4").write_bytes(video_bytes([grey(0)] * 2))
    assert len(list(decode.decode_video("12:30.mp4", HERE))) == 2
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n12:30.mp4\n#EXT-X-ENDLIST\n")
    with pytest.raises(ShardError, match=HERE):
        list(decode.decode_video(tmp_path / "list.mp4", HERE))


def test_missing_pyav_says_what_to_install_and_is_no_bad_sample(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"ssync-pl\[video\]"):
        decode.decode_member("video.mp4", b"", HERE)
