import numpy as np
import pytest

from ssync_pl.errors import ShapeError
from ssync_pl.tools.viz import (
    REGION_COLORS,
    color_labels,
    color_regions,
    label_masks,
    overlay_labels,
    resize_nearest,
    slot_colors,
    to_uint8,
)


def test_slot_colors_are_distinct_and_do_not_depend_on_the_count() -> None:
    many = slot_colors(64)
    assert len({tuple(color) for color in many.tolist()}) == 64
    for count in (0, 1, 8, 16, 17, 33):
        assert np.array_equal(slot_colors(count), many[:count])


def test_first_slots_are_far_apart() -> None:
    colors = slot_colors(11).astype(float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 1e9 * np.eye(11)
    assert distances.min() > 60


def test_color_labels_paints_each_label_and_leaves_holes_black() -> None:
    labels = np.array([[2, -1], [0, 2]])
    picture = color_labels(labels)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture[0, 0], slot_colors(3)[2])
    assert np.array_equal(picture[1, 1], slot_colors(3)[2])
    assert picture[0, 1].tolist() == [0, 0, 0]
    assert color_labels(np.full((2, 2), -1)).max() == 0


def test_color_labels_refuses_probabilities() -> None:
    with pytest.raises(TypeError, match="argmax over slots"):
        color_labels(np.zeros((2, 2)))


def test_label_masks_takes_the_first_channel_of_overlaps() -> None:
    masks = np.zeros((1, 3, 2, 2), dtype=bool)
    masks[0, 1, 0] = True
    masks[0, 2, :, 0] = True
    assert label_masks(masks).tolist() == [[[1, 1], [2, -1]]]
    assert label_masks(np.zeros((1, 0, 1, 2), dtype=bool)).tolist() == [[[-1, -1]]]


def test_color_regions_tells_four_cases_apart() -> None:
    picture = color_regions(np.array([[False, True, False, True]]), np.array([[False, False, True, True]]))
    expected = [REGION_COLORS[name] for name in ("neither", "boundary", "interior", "both")]
    assert picture[0].tolist() == [list(color) for color in expected]
    with pytest.raises(ShapeError, match="`interior`"):
        color_regions(np.zeros((1, 2), bool), np.zeros((2, 1), bool))


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_resize_nearest_repeats_pixels(factor: int) -> None:
    images = np.arange(2 * 3 * 4 * 3).reshape(2, 3, 4, 3)
    expected = images.repeat(factor, axis=1).repeat(factor, axis=2)
    assert np.array_equal(resize_nearest(images, (3 * factor, 4 * factor)), expected)
    assert np.array_equal(resize_nearest(resize_nearest(images, (3 * factor, 4 * factor)), (3, 4)), images)


def test_overlay_blends_labels_and_keeps_the_background() -> None:
    frames = np.full((1, 4, 4, 3), 200, dtype=np.uint8)
    labels = np.array([[[0, 1], [-1, 1]]])
    picture = overlay_labels(frames, labels, alpha=1.0, background=0)
    assert np.array_equal(picture[0, 0, 0], [200, 200, 200])
    assert np.array_equal(picture[0, 3, 3], slot_colors(2)[1])
    assert np.array_equal(picture[0, 3, 0], [200, 200, 200])


def test_to_uint8_undoes_normalisation() -> None:
    rng = np.random.default_rng(0)
    expected = rng.integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    video = ((expected / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    assert np.array_equal(to_uint8(video, mean, std), expected)


def test_to_uint8_without_statistics_spreads_over_the_range() -> None:
    video = np.random.default_rng(0).normal(5.0, 3.0, (2, 3, 16, 16))
    frames = to_uint8(video)
    assert frames.min() == 0
    assert frames.max() == 255
    assert 90 < frames.mean() < 165
    assert to_uint8(np.full((3, 2, 2), np.nan)).shape == (2, 2, 3)
    with pytest.raises(ShapeError, match=r"\(\.\.\., 3, H, W\)"):
        to_uint8(np.zeros((4, 4, 3)))
