"""Colours, overlays and sheets."""

import io

import numpy as np
from PIL import Image

from ssync_pl.tools.viz import (
    color_labels,
    draw_sheet,
    encode_png,
    label_masks,
    overlay_labels,
    resize_nearest,
    slot_colors,
    to_uint8,
)


def test_slot_colors_are_distinct_and_do_not_depend_on_the_count():
    many = slot_colors(64)
    assert len({tuple(color) for color in many.tolist()}) == 64
    for count in (0, 1, 16, 17, 33):
        assert np.array_equal(slot_colors(count), many[:count])
    first = many[:11].astype(float)
    assert (np.linalg.norm(first[:, None] - first[None], axis=-1) + 1e9 * np.eye(11)).min() > 60


def test_labels_are_painted_blended_and_hidden():
    picture = color_labels(np.array([[2, -1], [0, 2]]), background=0)
    assert picture.tolist() == [[slot_colors(3)[2].tolist(), [0, 0, 0]], [[70, 70, 70], slot_colors(3)[2].tolist()]]
    frames = np.full((1, 4, 4, 3), 200, dtype=np.uint8)
    overlay = overlay_labels(frames, np.array([[[0, 1], [-1, 1]]]))
    assert overlay[0, 3, 0].tolist() == [200, 200, 200]
    assert np.array_equal(overlay[0, 3, 3], np.rint(90 + 0.55 * slot_colors(2)[1]))


def test_the_first_of_overlapping_masks_is_taken_and_labels_grow_by_nearest_pixel():
    masks = np.zeros((1, 3, 2, 2), dtype=bool)
    masks[0, 1, 0] = True
    masks[0, 2, :, 0] = True
    assert label_masks(masks).tolist() == [[[1, 1], [2, -1]]]
    assert label_masks(np.zeros((1, 0, 1, 2), dtype=bool)).tolist() == [[[-1, -1]]]
    images = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    expected = images.repeat(3, axis=1).repeat(3, axis=2)
    assert np.array_equal(resize_nearest(images, (9, 12)), expected)
    assert np.array_equal(resize_nearest(expected, (3, 4)), images)


def test_normalisation_is_undone_or_guessed():
    rng = np.random.default_rng(0)
    expected = rng.integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    frames = ((expected / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    assert np.array_equal(to_uint8(frames, mean, std), expected)
    guessed = to_uint8(rng.normal(5.0, 3.0, (2, 3, 16, 16)))
    assert (guessed.min(), guessed.max()) == (0, 255)
    assert 90 < guessed.mean() < 165
    assert to_uint8(np.full((3, 2, 2), np.nan)).shape == (2, 2, 3)


def solid(color, frames=2, size=(8, 8)):
    return np.broadcast_to(np.array(color, dtype=np.uint8), (frames, *size, 3))


def boxes_of(sheet, color):
    rows, columns = np.nonzero((sheet == np.array(color)).all(axis=-1))
    return sorted(set(rows.tolist())), sorted(set(columns.tolist()))


def test_cells_are_aligned_and_captions_stay_left_of_them():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    rows = [("a caption\n" * (1 + 4 * k), solid(color)) for k, color in enumerate(colors)]
    sheet = draw_sheet([*rows, ("short", solid((0, 200, 200), 1))], title="title", cell=32)
    places = [boxes_of(sheet, color) for color in colors]
    assert all((len(y), len(x)) == (32, 64) and x == places[0][1] for y, x in places)
    assert [y for y, _ in places] == sorted(y for y, _ in places)
    assert boxes_of(sheet, (0, 200, 200))[1] == places[0][1][:32]
    left = places[0][1][0]
    assert (sheet[places[0][0][0] :, left - 4 : left] == 255).all()
    assert (sheet[:, :left] < 128).any()


def test_wide_frames_keep_their_shape_and_long_titles_fit():
    sheet = draw_sheet([("x", solid((200, 0, 0), 1, (30, 60)))], title="a title of many words " * 4, cell=20)
    rows, columns = boxes_of(sheet, (200, 0, 0))
    assert (len(rows), len(columns)) == (10, 20)
    assert (sheet[:, -10:] == 255).all()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(sheet)))), sheet)
