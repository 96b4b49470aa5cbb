from __future__ import annotations

import pytest
import torch

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn import ConditionedSlots, GaussianSlots, LearnedSlots, first_frame_hints


def _masks() -> torch.Tensor:
    masks = torch.zeros(2, 2, 4, 8, 10, dtype=torch.bool)
    masks[0, 0, 1, 2:4, 5:10] = True
    masks[0, 0, 3, 0, 0] = True
    masks[0, 1, 2] = True
    masks[1, 0, 2, 7, 3] = True
    masks[:, :, 0] = ~masks[:, :, 1:].any(dim=2)
    return masks


def test_boxes_of_the_first_frame_in_order_then_filled() -> None:
    boxes = first_frame_hints(_masks(), num_slots=4)
    torch.testing.assert_close(boxes[0, 0], torch.tensor([2 / 8, 5 / 10, 4 / 8, 1.0]))
    # Channel 2 shows up in the second frame only, so channel 3 moves up.
    torch.testing.assert_close(boxes[0, 1], torch.tensor([0, 0, 1 / 8, 1 / 10]))
    torch.testing.assert_close(boxes[1, 0], torch.tensor([7 / 8, 3 / 10, 1.0, 4 / 10]))
    assert (boxes[0, 2:] == -1).all()
    assert (boxes[1, 1:] == -1).all()


def test_centres_are_the_middle_of_the_boxes() -> None:
    centres = first_frame_hints(_masks(), num_slots=2, kind="centres")
    torch.testing.assert_close(centres[0], torch.tensor([[3 / 8, 7.5 / 10], [0.5 / 8, 0.5 / 10]]))


def test_objects_beyond_the_slots_are_dropped() -> None:
    boxes = first_frame_hints(_masks(), num_slots=1)
    assert boxes.shape == (2, 1, 4)
    torch.testing.assert_close(boxes[0, 0], torch.tensor([2 / 8, 5 / 10, 4 / 8, 1.0]))


def test_without_background_every_channel_is_an_object() -> None:
    with_all = first_frame_hints(_masks(), num_slots=4, has_background=False)
    assert with_all[0, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_gaussian_slots_differ_by_slot_and_draw_and_follow_mean_and_std() -> None:
    torch.manual_seed(0)
    initializer = GaussianSlots(4, 3)
    with torch.no_grad():
        initializer.mean.fill_(5.0)
        initializer.log_std.fill_(-2.0)
    slots = initializer(2000)
    assert slots.mean().item() == pytest.approx(5.0, abs=0.01)
    assert slots.std().item() == pytest.approx(0.1353, abs=0.005)
    assert not torch.equal(slots[:, 0], slots[:, 1])
    assert not torch.equal(slots, initializer(2000))


def test_learned_slots_are_the_same_for_each_clip() -> None:
    slots = LearnedSlots(4, 3)(2)
    assert torch.equal(slots[0], slots[1])
    assert not torch.equal(slots[0, 0], slots[0, 1])


def test_conditioned_slots_depend_on_their_own_hint_only() -> None:
    torch.manual_seed(0)
    initializer = ConditionedSlots(3, 8, hint_dim=2)
    hints = torch.tensor([[[0.1, 0.2], [0.5, 0.5], [-1.0, -1.0]]])
    slots = initializer(hints)
    torch.testing.assert_close(slots[0, 2], initializer.empty[0, 2])
    changed = initializer(torch.tensor([[[0.1, 0.2], [0.9, 0.5], [-1.0, -1.0]]]))
    assert torch.equal(slots[0, 0], changed[0, 0])
    assert not torch.allclose(slots[0, 1], changed[0, 1])


def test_errors() -> None:
    with pytest.raises(ShapeError, match=r"`segmentations` to be \(B, T, C, H, W\)"):
        first_frame_hints(torch.zeros(2, 4, 8, 8), 3)
    with pytest.raises(ConfigError, match="`kind` to be 'boxes'"):
        first_frame_hints(_masks(), 3, "points")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"to be \(B, 3, 2\), but got \(2, 4, 2\)"):
        ConditionedSlots(3, 8, hint_dim=2)(torch.zeros(2, 4, 2))


def test_spread_at_the_start() -> None:
    torch.manual_seed(0)
    assert LearnedSlots(100, 64, initial_std=0.25).slots.std().item() == pytest.approx(0.25, rel=0.05)
    assert GaussianSlots(100, 64, initial_std=0.25)(4).std().item() == pytest.approx(0.25, rel=0.05)
    for kind in (LearnedSlots, GaussianSlots):
        with pytest.raises(ConfigError, match="initial spread of the slots to be above 0, but got 0"):
            kind(4, 8, initial_std=0)
