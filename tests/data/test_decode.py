from __future__ import annotations

import builtins
import gzip
import importlib
import io

import numpy as np
import pytest
from PIL import Image

from ssync_pl.data import decode
from ssync_pl.errors import ShardError


class _Boom:
    """Pickles to a call that leaves a trace when it is loaded."""

    def __reduce__(self):
        return (exec, ("import builtins; builtins.ssync_boom = True",))


def test_npy_and_gz_give_the_array_back(npy_bytes):
    array = np.random.default_rng(0).integers(0, 255, (3, 4, 5, 3)).astype(np.uint8)
    assert np.array_equal(decode.decode_member("video.npy", npy_bytes(array)), array)
    assert np.array_equal(decode.decode_member("video.npy.gz", gzip.compress(npy_bytes(array))), array)
    fortran = np.asfortranarray(array)
    assert np.array_equal(decode.decode_member("video.npy", npy_bytes(fortran)), array)


def test_view_npy_does_not_copy(npy_bytes):
    data = npy_bytes(np.arange(100, dtype=np.uint8))
    view = decode.view_npy(memoryview(data), "video.npy")
    assert np.shares_memory(view, np.frombuffer(data, np.uint8))
    assert not view.flags.writeable


def test_pictures_keep_ids_and_colours():
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    colours = np.random.default_rng(0).integers(0, 255, (3, 4, 3)).astype(np.uint8)
    for array in (ids, colours):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        assert np.array_equal(decode.decode_member("segmentations.png", buffer.getvalue()), array)
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(buffer, "JPEG")
    decoded = decode.decode_member("image.jpg", buffer.getvalue())
    assert decoded.shape == (8, 8, 3)
    assert np.abs(decoded.astype(int) - 77).max() <= 2


def test_a_picture_of_another_kind_is_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(buffer, "TIFF")
    with pytest.raises(ShardError, match=r"`image\.png` of a\.tar, key 7 to be a readable png"):
        decode.decode_member("image.png", buffer.getvalue(), "a.tar, key 7")


@pytest.mark.parametrize("name", ["video.pyd", "video.pkl", "video.pth", "video.pickle", "video.pt"])
def test_executable_members_are_refused_unread(name, tmp_path):
    with pytest.raises(ShardError, match=r"a\.tar, key 7 .* can execute code"):
        decode.decode_member(name, b"anything", "a.tar, key 7")


@pytest.mark.parametrize("name", ["video.tiff", "video", "video.npz", "video.gz", "video.txt.gz"])
def test_unknown_extensions_are_refused(name):
    with pytest.raises(ShardError, match="not on the allow-list"):
        decode.decode_member(name, b"")


def test_object_arrays_are_refused_without_running_them(npy_bytes):
    array = np.array([_Boom()], dtype=object)
    data = npy_bytes(array)
    for name, payload in (("video.npy", data), ("video.npy.gz", gzip.compress(data))):
        with pytest.raises(ShardError, match=r"`video\.npy.*a\.tar, key 7 .*Python objects"):
            decode.decode_member(name, payload, "a.tar, key 7")
    assert not hasattr(builtins, "ssync_boom")


@pytest.mark.parametrize("keep", [0, 5, 100, 200])
def test_half_written_npy_is_refused(npy_bytes, keep):
    data = npy_bytes(np.zeros((10, 10), np.uint8))
    with pytest.raises(ShardError, match=r"`video\.npy` of a\.tar, key 7 .*half written"):
        decode.decode_member("video.npy", data[:keep], "a.tar, key 7")


def test_surplus_bytes_are_refused(npy_bytes):
    data = npy_bytes(np.zeros((10, 10), np.uint8)) + b"more"
    for name, payload in (("video.npy", data), ("video.npy.gz", gzip.compress(data))):
        with pytest.raises(ShardError, match="100 bytes of elements"):
            decode.decode_member(name, payload)


@pytest.mark.parametrize("keep", [0, 8, 60])
def test_half_written_gzip_is_refused(npy_bytes, keep):
    noise = np.random.default_rng(0).integers(0, 255, 200).astype(np.uint8)
    data = gzip.compress(npy_bytes(noise))
    with pytest.raises(ShardError, match="key 7"):
        decode.decode_member("video.npy.gz", data[:keep], "a.tar, key 7")


def test_a_header_that_claims_too_much_is_refused():
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40,)})
    with pytest.raises(ShardError, match="at most"):
        decode.decode_member("video.npy.gz", gzip.compress(buffer.getvalue()))


def test_json_and_bad_json():
    assert decode.decode_member("info.json", b'{"fps": 12}') == {"fps": 12}
    with pytest.raises(ShardError, match=r"`info\.json`"):
        decode.decode_member("info.json", b"{")


def test_mp4_round_trip_and_slices():
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for level in range(0, 200, 20):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = buffer.getvalue()
    assert decode.count_video_frames(data, "video.mp4") == 10
    whole = decode.decode_member("video.mp4", data)
    assert whole.shape == (10, 16, 32, 3)
    assert np.abs(whole.mean((1, 2, 3)) - np.arange(0, 200, 20)).max() < 6
    part = decode.decode_video(data, "video.mp4", start=2, stride=3, count=2)
    assert np.array_equal(part, whole[[2, 5]])
    with pytest.raises(ShardError, match="key 7 to be a readable mp4"):
        decode.decode_video(data[:200], "video.mp4", "a.tar, key 7")


def test_missing_pyav_says_what_to_install(monkeypatch):
    real = importlib.import_module

    def without_av(name, *args):
        if name == "av":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without_av)
    with pytest.raises(ShardError, match=r"pip install \"ssync-pl\[video\]\""):
        decode.decode_video(b"", "video.mp4", "a.tar, key 7")


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (4, 2, 1, 3)])
@pytest.mark.parametrize(
    "dtype", ["u1", "<u2", ">f4", "?", "<f8", "<i8", "S3", "<U2", "<M8[s]", [("a", "<i4"), ("b", "u1")]]
)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_headers_read_as_numpy_reads_them(shape, dtype, order, version):
    array = np.zeros(shape, dtype, order=order)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    header = decode.read_npy_header(buffer.getvalue(), "a.npy")
    buffer.seek(0)
    np.lib.format.read_magic(buffer)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    assert (header.shape, header.fortran_order, header.dtype) == read(buffer)
    assert header.data_offset == buffer.tell()


@pytest.mark.parametrize("descr", ["O", "|O", "|O8"])
def test_headers_of_objects_are_refused_however_they_are_written(descr):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': (1,), }}".encode().ljust(117) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    with pytest.raises(ShardError, match=r"Python objects|unreadable"):
        decode.read_npy_header(data, "a.npy")
