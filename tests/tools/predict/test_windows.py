import itertools

import numpy as np
import pytest

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.tools.predict.windows import cut_windows, match_slots, relabel, window_length


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8, 9, 15, 16, 64, 65])
@pytest.mark.parametrize("most", [2, 3, 8])
def test_windows_share_a_frame_and_cover_all(total, most):
    frames = [np.full((1, 1, 3), number, np.uint8) for number in range(total)]
    length = window_length(total, most)
    windows = list(cut_windows(iter(frames), length))
    assert length <= most
    joined: list[int] = []
    for window in windows:
        numbers = window.frames[:, 0, 0, 0].tolist()
        assert numbers == list(range(window.start, window.start + len(numbers)))
        assert len(numbers) <= most
        assert not joined or (numbers[0] == joined[-1] and len(numbers) > 1)
        joined += numbers if not joined else numbers[1:]
    assert joined == list(range(total))
    assert [window.last for window in windows] == [False] * (len(windows) - 1) + [True]
    assert len(windows) == max(1, -(-(total - 1) // (most - 1)))


def test_windows_are_about_as_long():
    sizes = [
        len(w.frames) for w in cut_windows((np.zeros((1, 1, 3), np.uint8) for _ in range(66)), window_length(66, 64))
    ]
    assert sizes == [34, 33]


def test_one_window_is_decoded_at_a_time():
    asked = []

    def frames():
        for number in range(100):
            asked.append(number)
            yield np.zeros((1, 1, 3), np.uint8)

    next(cut_windows(frames(), 8))
    assert len(asked) == 9


def test_a_window_of_one_frame_is_refused():
    with pytest.raises(ConfigError, match="--clip-frames to be at least 2"):
        window_length(10, 1)


@pytest.mark.parametrize("seed", range(5))
def test_matching_keeps_most_pixels(seed):
    generator = np.random.default_rng(seed)
    slots = 5
    before = generator.integers(0, 4, (6, 6)).astype(np.uint8)
    after = np.where(generator.random((6, 6)) < 0.6, generator.permutation(slots)[before], generator.integers(0, slots))
    names = match_slots(before, after, slots)
    assert sorted(names.tolist()) == list(range(slots))
    kept = int((names[after] == before).sum())
    best = max(int((np.array(order)[after] == before).sum()) for order in itertools.permutations(range(slots)))
    assert kept == best


def test_renamed_slots_are_found_again():
    before = np.repeat(np.array([[0, 1, 2, 255]], np.uint8), 4, axis=0)
    renamed = relabel(before, np.array([2, 0, 1]))
    assert renamed[0].tolist() == [2, 0, 1, 255]
    names = match_slots(before, renamed, 3)
    assert np.array_equal(relabel(renamed, names), before)


def test_slots_that_no_pixel_decides_on_keep_their_number():
    labels = np.full((3, 3), 2, np.uint8)
    assert match_slots(labels, labels, 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_sizes_must_agree():
    with pytest.raises(ShapeError, match="one size"):
        match_slots(np.zeros((2, 2), int), np.zeros((2, 3), int), 2)
