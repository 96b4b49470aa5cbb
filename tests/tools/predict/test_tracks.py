import numpy as np
import pytest

from ssync_pl.errors import ShapeError
from ssync_pl.tools.predict.files import TRACK_COLUMNS, slot_tracks


def naive(labels, num_slots):
    rows = []
    for frame in labels:
        for slot in range(num_slots):
            pixels = [(y, x) for y in range(frame.shape[0]) for x in range(frame.shape[1]) if frame[y, x] == slot]
            if not pixels:
                rows.append((0.0, None, None))
                continue
            ys, xs = [y for y, _ in pixels], [x for _, x in pixels]
            center = (sum(xs) / len(xs) + 0.5, sum(ys) / len(ys) + 0.5)
            rows.append((len(pixels) / frame.size, center, (min(xs), min(ys), max(xs) + 1, max(ys) + 1)))
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_tracks_equal_a_loop_over_pixels(seed):
    generator = np.random.default_rng(seed)
    labels = generator.choice(np.array([0, 1, 3, 255], np.uint8), (3, 7, 11), p=[0.5, 0.3, 0.1, 0.1])
    lines = slot_tracks(labels, 5).splitlines()[1:]
    for place, (line, (area, center, box)) in enumerate(zip(lines, naive(labels, 5), strict=True)):
        cells = line.split(",")
        assert (int(cells[0]), int(cells[1])) == divmod(place, 5)
        assert float(cells[2]) == pytest.approx(area, abs=1e-6)
        if center is None:
            assert cells[3:] == [""] * 6
        else:
            assert [float(cell) for cell in cells[3:5]] == pytest.approx(center, abs=0.006)
            assert tuple(int(cell) for cell in cells[5:]) == box


def test_the_table_has_a_row_a_frame_and_slot():
    labels = np.zeros((2, 3, 4), np.uint8)
    labels[1, :, 2:] = 1
    lines = slot_tracks(labels, 2).splitlines()
    assert lines[0] == ",".join(TRACK_COLUMNS)
    assert lines[1:] == [
        "0,0,1.000000,2.00,1.50,0,0,4,3",
        "0,1,0.000000,,,,,,",
        "1,0,0.500000,1.00,1.50,0,0,2,3",
        "1,1,0.500000,3.00,1.50,2,0,4,3",
    ]


@pytest.mark.parametrize("labels", [np.zeros((2, 3), np.uint8), np.zeros((1, 2, 3)), np.full((1, 2, 3), -1)])
def test_other_labels_are_refused(labels):
    with pytest.raises(ShapeError, match="`labels` to be integers"):
        slot_tracks(labels, 2)
