import itertools

import numpy as np
import pytest
import torch

from ssync_pl.data.samples import SampleRules, crop_offsets
from ssync_pl.data.transforms import BatchTransform
from ssync_pl.hosts import DINOSAUR, SAVi, SlotContrast
from ssync_pl.tools.predict.windows import OUTSIDE, CarrySlots, cut_windows, match_slots, restore_labels, seen_region
from ssync_pl.tools.predict.writer import share_labels
from tiny_run import TINY_SAVI


def blank(count):
    for number in range(count):
        yield np.full((1, 1, 3), number, np.uint8)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8, 9, 15, 16, 64, 65])
@pytest.mark.parametrize("most", [2, 3, 8])
def test_windows_share_a_frame_and_cover_all(total, most):
    windows, joined = list(cut_windows(blank(total), most)), []
    for window in windows:
        numbers = window.frames[:, 0, 0, 0].tolist()
        assert numbers == list(range(window.start, window.start + len(numbers)))
        assert len(numbers) <= most
        assert not joined or (numbers[0] == joined[-1] and len(numbers) > 1)
        joined += numbers if not joined else numbers[1:]
    assert joined == list(range(total))
    assert [window.last for window in windows] == [False] * (len(windows) - 1) + [True]
    assert len(windows) == max(1, -(-(total - 1) // (most - 1)))
    frames = blank(total)  # decoded one window at a time
    assert len(next(cut_windows(frames, most)).frames) + len(list(frames)) >= total - 1


FEATURES = {"backbone": None, "feature_dim": 6, "grid": (2, 2), "num_slots": 3, "slot_dim": 8, "encoder_hidden": 8}
HOSTS = [(kind, FEATURES, (1, 5, 4, 6), kind is SlotContrast) for kind in (SlotContrast, DINOSAUR)]
HOSTS += [(SAVi, TINY_SAVI | {"slot_init": "learned"}, (1, 5, 3, 16, 16), True)]


@pytest.mark.parametrize(("kind", "options", "shape", "carries"), HOSTS)
def test_a_window_begins_with_the_slots_that_the_one_before_ended_with(kind, options, shape, carries):
    torch.manual_seed(0)
    host, inputs, given = kind(**options).eval(), torch.rand(shape), []

    def run(goes_on, frames):
        carry.next_window(goes_on)
        torch.manual_seed(1)
        with torch.no_grad():
            return host(frames).slots

    carry = CarrySlots(host)
    plain, first = run(False, inputs[:, 2:]), run(False, inputs[:, :3])
    with host.initializer.register_forward_hook(lambda module, args, output: given.append(output)):
        second = run(True, inputs[:, 2:])
    assert torch.equal(second, plain) == (not carries)
    assert torch.equal(given[0][0], first[0, -1]) == carries
    assert torch.equal(run(False, inputs[:, 2:]), plain)  # another video
    carry.next_window(True)
    carry.close()
    assert not host._forward_hooks
    assert not host.initializer._forward_hooks


@pytest.mark.parametrize("seed", range(5))
def test_matching_keeps_most_pixels_and_numbers_where_pixels_do_not_decide(seed):
    generator = np.random.default_rng(seed)
    slots = 5
    before = generator.integers(0, 4, (6, 6)).astype(np.uint8)
    after = np.where(generator.random((6, 6)) < 0.6, generator.permutation(slots)[before], generator.integers(0, slots))
    names = match_slots(before, after, slots)
    assert sorted(names.tolist()) == list(range(slots))
    kept = int((names[after] == before).sum())
    assert kept == max(int((np.array(order)[after] == before).sum()) for order in itertools.permutations(range(slots)))

    before = np.repeat(np.array([[0, 1, 2, 255]], np.uint8), 4, axis=0)
    assert match_slots(before, np.array([2, 0, 1, *range(3, 256)], np.uint8)[before], 3).tolist() == [1, 2, 0]
    assert match_slots(before * 0 + 2, before * 0 + 2, 6).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("crop", ["none", "center", "random"])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("source", [(40, 60), (60, 40), (33, 71), (16, 16)])
def test_what_the_model_sees_goes_back_to_its_place(crop, reference, source):
    """The position of each pixel, sent through the transform, comes back as itself."""
    size = (16, 16)
    frames = np.zeros((1, *source, 3), np.uint8)
    frames[..., 0] = np.arange(source[0])[:, None] * 3
    offsets = crop_offsets(frames, SampleRules(image_size=size, crop=crop, reference=reference))
    transform = BatchTransform(size, crop=crop, mean=[0.0] * 3, std=[1.0] * 3, reference=reference)
    seen = transform({"video": torch.from_numpy(frames)[None], "crop": offsets[None]})["video"][0]
    rows, columns = seen_region(source, offsets.tolist(), transform)
    back = restore_labels((seen[:, 0] * 255 / 3).round().long(), source, (rows, columns))
    inside = back[0, rows, columns].astype(int)
    assert np.abs(inside - np.arange(source[0])[rows, None]).max() <= max(source) / 16 + 1
    outside = np.ones(source, bool)
    outside[rows, columns] = False
    assert (back[0][outside] == OUTSIDE).all()
    assert outside.any() == (crop != "none" and source[0] != source[1])


def test_masks_give_smooth_outlines():
    masks = torch.tensor([[[[0.9, 0.2]], [[0.1, 0.8]]]])  # (1, 2, 1, 2)
    labels = restore_labels(masks, (2, 8), (slice(0, 2), slice(0, 8)))
    assert labels[0].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 2


def test_slots_that_were_joined_once_stay_so_and_the_largest_label_goes_on():
    def step(table, winners, sizes):
        sizes = np.array([*sizes, *[0] * (OUTSIDE + 1 - len(sizes))])
        table = np.array([*table, *range(len(table), OUTSIDE + 1)], np.uint8)
        joined = share_labels(table, np.array(winners), sizes)
        assert joined[len(winners) :].tolist() == list(range(len(winners), OUTSIDE + 1))
        return joined[: len(winners)].tolist()

    nothing = [0, 1, 2, 3]
    assert step(nothing, nothing, [5, 5, 5, 5]) == nothing
    assert step(nothing, [0, 2, 2, 3], [5, 1, 4, 5]) == [0, 2, 2, 3]
    assert step([0, 2, 2, 3], nothing, [5, 0, 9, 5]) == [0, 2, 2, 3]  # joined before
    assert step([0, 2, 2, 3], [1, 1, 2, 3], [5, 0, 9, 5]) == [2, 2, 2, 3]  # 0 joins 1, which is called 2
    assert step([0, 2, 2, 3], [0, 1, 2, 1], [5, 0, 2, 9]) == [0, 3, 3, 3]
