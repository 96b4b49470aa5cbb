"""COCO segmentations against a decoder that walks pixel by pixel, and against pycocotools where it is installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from folder_sets import rle_counts
from hypothesis import given, settings
from hypothesis import strategies as st
from ssync_pl.data.convert.rle import compress_counts, decompress_counts, segmentation_mask

from ssync_pl.errors import ConfigError, ShardError


def naive_decompress(text):
    """Character by character."""
    counts, place = [], 0
    while place < len(text):
        value, shift = 0, 0
        while True:
            group = ord(text[place]) - 48
            place += 1
            value |= (group & 31) << shift
            shift += 5
            if not group & 32:
                if group & 16:
                    value -= 1 << shift
                break
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
    return counts


def naive_mask(counts, height, width):
    mask = np.zeros((height, width), np.uint8)
    place, value = 0, 0
    for count in counts:
        for _ in range(count):
            mask[place % height, place // height] = value
            place += 1
        value = 1 - value
    return mask


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2**40), max_size=30))
def test_compressed_counts_come_back_and_the_naive_reader_agrees(counts):
    text = compress_counts(counts)
    assert decompress_counts(text).tolist() == counts
    assert naive_decompress(text) == counts


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32), st.floats(0, 1))
def test_masks_of_random_runs_equal_the_naive_ones(height, width, seed, density):
    mask = (np.random.default_rng(seed).random((height, width)) < density).astype(np.uint8)
    counts = rle_counts(mask)
    np.testing.assert_array_equal(naive_mask(counts, height, width), mask)
    for stored in (counts, compress_counts(counts), compress_counts(counts).encode()):
        drawn = segmentation_mask({"size": [height, width], "counts": stored}, (height, width))
        assert drawn.dtype == np.uint8
        np.testing.assert_array_equal(drawn, mask)


def test_run_lengths_and_pictures_of_pycocotools_agree():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (7, 5), (96, 130)):
        for density in (0.0, 0.02, 0.5, 1.0):
            mask = (rng.random(shape) < density).astype(np.uint8)
            theirs = coco.encode(np.asfortranarray(mask))
            assert compress_counts(rle_counts(mask)) == theirs["counts"].decode()
            np.testing.assert_array_equal(segmentation_mask(theirs, shape), mask)


def test_polygons_are_drawn_and_joined():
    pytest.importorskip("pycocotools.mask")
    polygons = [[1, 1, 1, 4, 5, 4, 5, 1], [6.0, 0.0, 8.0, 0.0, 8.0, 2.0, 6.0, 2.0]]
    expected = np.zeros((6, 9), np.uint8)
    expected[1:4, 1:5] = 1
    expected[0:2, 6:8] = 1
    np.testing.assert_array_equal(segmentation_mask(polygons, (6, 9)), expected)


def test_a_polygon_without_pycocotools_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ConfigError, match=r'frame 3 is a polygon.*pip install "ssync-pl\[ytvis\]"'):
        segmentation_mask([[0, 0, 4, 0, 4, 4]], (6, 6), "frame 3")


@pytest.mark.parametrize("polygon", [[0, 0, 4, 4], [0, 0, 4, 0, 4], [0, 0, 4, 0, 4, float("nan")], 7, "abc"])
def test_bad_polygons_are_refused(polygon):
    with pytest.raises(ShardError, match="polygons of frame 3 to be lists of at least three points"):
        segmentation_mask([polygon], (6, 6), "frame 3")


def test_null_and_no_polygons_are_empty():
    assert not segmentation_mask(None, (2, 3)).any()
    assert segmentation_mask([], (2, 3)).shape == (2, 3)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 2], "runs of 3 pixels together instead of 2 x 3 = 6"),
        ([], "runs of 0 pixels together"),
        ([7], "runs of 7 pixels"),
        ([8, -2], "the run lengths"),
        ([1.5, 4.5], "the run lengths"),
        ([[6]], "the run lengths"),
        (["6"], "the run lengths"),
        ([1, [2]], "COCO segmentation"),
        (None, "the run lengths"),
        ("6\x20", "other characters"),
        ("6é", "other characters"),
        ("V", "cut off"),
        ("Q" + "P" * 20 + "1", "more than 60 bits"),
        ("O", "negative length"),
        ("7", "runs of 7 pixels"),
    ],
)
def test_bad_run_lengths_are_refused(counts, message):
    with pytest.raises(ShardError, match=message):
        segmentation_mask({"size": [2, 3], "counts": counts}, (2, 3), "frame 3 of instance 9")


def test_another_size_and_another_form_are_refused():
    with pytest.raises(ShardError, match=r"height and width \[2, 3\], but got \[3, 2\]"):
        segmentation_mask({"size": [3, 2], "counts": [6]}, (2, 3))
    with pytest.raises(ShardError, match=r"Expected frame 3 to be a COCO segmentation .* but got \{'size': \[2, 3\]\}"):
        segmentation_mask({"size": [2, 3]}, (2, 3), "frame 3")
    with pytest.raises(ShardError, match="but got 'abc'"):
        segmentation_mask("abc", (2, 3))
