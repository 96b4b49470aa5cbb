"""Pictures of every mode, and their sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ssync_pl.data.convert.pictures import (
    natural_key,
    read_ids,
    read_picture,
    resize_frame,
    resize_ids,
    short_side_size,
)
from ssync_pl.data.transforms import resize_masks
from ssync_pl.errors import ShardError

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
COLOUR = np.stack([GREY, GREY // 2, 255 - GREY], axis=-1)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.fromarray(COLOUR), COLOUR),
        (Image.fromarray(GREY), np.repeat(GREY[..., None], 3, -1)),
        (Image.fromarray(GREY > 100), np.repeat(((GREY > 100) * np.uint8(255))[..., None], 3, -1)),
        (Image.fromarray(GREY.astype(np.uint16) * 256 + 7), np.repeat(GREY[..., None], 3, -1)),
        (Image.fromarray(np.dstack([COLOUR, np.full_like(GREY, 255)])), COLOUR),
        (Image.fromarray(np.dstack([COLOUR, np.zeros_like(GREY)])), COLOUR * 0),
        (Image.fromarray(np.dstack([GREY, np.full_like(GREY, 255)]), "LA"), np.repeat(GREY[..., None], 3, -1)),
        (Image.fromarray(GREY).convert("P"), np.repeat(GREY[..., None], 3, -1)),
    ],
    ids=["rgb", "grey", "bits", "grey16", "opaque", "transparent", "grey alpha", "palette"],
)
def test_png_pictures_of_every_mode_become_rgb(tmp_path, picture, expected):
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", "video a"), expected)


def test_cmyk_pictures_become_rgb(tmp_path):
    Image.new("CMYK", (16, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    frame = read_picture(tmp_path / "a.jpg", "video a")
    assert frame.shape == (8, 16, 3)
    assert frame[..., 0].min() > 245
    assert frame[..., 1:].max() < 10


def test_exif_orientation_is_followed_where_masks_do_not_count_stored_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", "a", upright=True), np.rot90(COLOUR, -1))
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", "a"), COLOUR)


@pytest.mark.parametrize(("content", "got"), [(b"", "an empty file"), (b"no picture", "a damaged one")])
def test_what_is_no_picture_is_named(tmp_path, content, got):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ShardError, match=rf"frame .*a\.jpg of video 7 to be a whole picture .*got {got}"):
        read_picture(tmp_path / "a.jpg", "video 7")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp"])
def test_a_cut_picture_is_refused(tmp_path, name):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ShardError, match="whole picture"):
        read_picture(tmp_path / name, "video 7")


def test_ids_keep_their_numbers(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    palette = Image.fromarray(GREY)
    palette = Image.frombytes("P", palette.size, GREY.tobytes())
    palette.putpalette([255 - k % 256 for k in range(768)])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(GREY.astype(np.uint16) * 200).save(tmp_path / "deep.png")
    Image.fromarray(GREY > 100).save(tmp_path / "bits.png")
    for name, expected in (("grey", GREY), ("palette", GREY), ("deep", GREY.astype(int) * 200), ("bits", GREY > 100)):
        np.testing.assert_array_equal(read_ids(tmp_path / f"{name}.png", "a"), expected)
    Image.fromarray(COLOUR).save(tmp_path / "colour.png")
    with pytest.raises(ShardError, match=r"colour\.png of video 7 to be a grey or palette picture .* mode 'RGB'"):
        read_ids(tmp_path / "colour.png", "video 7")


def test_names_sort_by_their_numbers():
    names = ["f10.png", "f9.png", "F1.png", "f01.png", "10.png", "9.png", "x1y10", "x1y9", "²", "١"]
    expected = ["9.png", "10.png", "F1.png", "f01.png", "f9.png", "f10.png", "x1y9", "x1y10", "²", "١"]
    assert sorted(names, key=natural_key) == expected
    assert sorted(set(names), key=natural_key) == expected


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [((720, 1280), 320, (320, 568)), ((1280, 720), 518, (920, 518)), ((5, 5), 3, (3, 3)), ((4, 6), None, (4, 6))],
)
def test_short_sides(size, short, expected):
    assert short_side_size(size, short) == expected


@pytest.mark.parametrize("size", [(5, 7), (20, 31), (12, 20), (1, 1)])
def test_masks_resize_as_the_loader_resizes_them(size):
    ids = np.random.default_rng(0).integers(0, 9, (12, 20), dtype=np.uint8)
    np.testing.assert_array_equal(resize_ids(ids, size), resize_masks(torch.from_numpy(ids), size).numpy())
    np.testing.assert_array_equal(resize_ids(ids[..., None], size)[..., 0], resize_ids(ids, size))


def test_frames_resize_with_the_named_filter():
    board = np.zeros((8, 8, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 200
    assert set(np.unique(resize_frame(board, (4, 4), "nearest"))) <= {0, 200}
    for name in ("bilinear", "bicubic"):
        # anti-aliased: a checkerboard averages out
        np.testing.assert_allclose(resize_frame(board, (4, 4), name)[1:3, 1:3], 100, atol=2)
    assert resize_frame(board, (8, 8)) is board
