"""Slot contrast and temporal similarity against their definitions, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.losses import slot_contrast_loss, temporal_similarity, temporal_similarity_loss


def _by_loops(slots: Tensor, temperature: float, across_batch: bool, valid: Tensor | None = None) -> float:
    """Each slot of a later frame asks which slot of the earlier frame it is."""
    clips, frames, count, _ = slots.shape
    losses = []
    for t in range(frames - 1):
        counted = [b for b in range(clips) if valid is None or (valid[b, t] and valid[b, t + 1])]
        for b in counted:
            for s in range(count):
                among = [(o, k) for o in (counted if across_batch else [b]) for k in range(count)]
                scores = {
                    (o, k): F.cosine_similarity(slots[o, t, k], slots[b, t + 1, s], dim=0).item() / temperature
                    for o, k in among
                }
                losses.append(math.log(sum(math.exp(score) for score in scores.values())) - scores[b, s])
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("across_batch", [True, False])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_equals_the_definition(across_batch: bool, temperature: float) -> None:
    slots = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = slot_contrast_loss(slots, temperature=temperature, across_batch=across_batch)
    assert loss.item() == pytest.approx(_by_loops(slots, temperature, across_batch), rel=1e-10)


def test_two_orthogonal_slots_by_hand() -> None:
    slots = torch.tensor([[[[3.0, 0.0], [0.0, 0.5]], [[1.0, 0.0], [0.0, 1.0]]]])
    # Own slot: cosine 1, the other: 0.
    assert slot_contrast_loss(slots, temperature=0.5).item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_the_later_slot_asks_among_the_earlier_ones() -> None:
    # Both later slots look like earlier slot 0: only the second one's answer is wrong, by cosine 1 against 0.
    slots = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
    assert slot_contrast_loss(slots, temperature=1.0).item() == pytest.approx(expected)
    # The other way round each earlier slot would be asked for: a different number.
    assert slot_contrast_loss(slots.flip(1), temperature=1.0).item() != pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("across_batch", [True, False])
def test_frames_that_do_not_count_are_neither_asked_for_nor_looked_among(across_batch: bool) -> None:
    slots = torch.randn(3, 4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    valid = torch.tensor([[True, True, True, True], [True, True, False, False], [False, False, False, False]])
    loss = slot_contrast_loss(slots, temperature=0.5, across_batch=across_batch, valid=valid)
    assert loss.item() == pytest.approx(_by_loops(slots, 0.5, across_batch, valid), rel=1e-10)
    everything = slot_contrast_loss(slots, across_batch=across_batch, valid=torch.ones_like(valid))
    torch.testing.assert_close(everything, slot_contrast_loss(slots, across_batch=across_batch))


def test_nothing_counts() -> None:
    slots = torch.randn(2, 2, 3, 4, requires_grad=True)
    loss = slot_contrast_loss(slots, valid=torch.zeros(2, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert slots.grad is not None
    assert torch.equal(slots.grad, torch.zeros_like(slots))


def test_gradient() -> None:
    slots = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[True, True, True], [True, True, False]])
    assert torch.autograd.gradcheck(lambda x: slot_contrast_loss(x, temperature=0.7), slots)
    assert torch.autograd.gradcheck(lambda x: slot_contrast_loss(x, temperature=0.7, valid=valid), slots)


def test_half_precision_slots_are_compared_in_float32() -> None:
    slots = torch.randn(2, 3, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = slot_contrast_loss(slots)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, slot_contrast_loss(slots))
    assert slot_contrast_loss(slots.bfloat16()).dtype == torch.float32


def test_refusals() -> None:
    with pytest.raises(ShapeError, match=r"T >= 2, but got \(2, 1, 3, 4\). Raise `clip_length`"):
        slot_contrast_loss(torch.zeros(2, 1, 3, 4))
    with pytest.raises(ShapeError, match="`slots` to be"):
        slot_contrast_loss(torch.zeros(2, 3, 4))
    with pytest.raises(ConfigError, match="`temperature` to be above 0, but got 0"):
        slot_contrast_loss(torch.zeros(2, 2, 3, 4), temperature=0)


@pytest.mark.parametrize(("shift", "threshold"), [(1, 0.0), (2, 0.0), (1, None), (1, 0.4)])
def test_target_equals_the_definition(shift: int, threshold: float | None) -> None:
    features = torch.randn(2, 4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = temporal_similarity(features, shift=shift, temperature=0.3, threshold=threshold)
    assert target.shape == (2, 4 - shift, 5, 5)
    for b in range(2):
        for t in range(4 - shift):
            for n in range(5):
                scores = [F.cosine_similarity(features[b, t, n], features[b, t + shift, m], dim=0) for m in range(5)]
                kept = [threshold is None or score >= threshold for score in scores]
                shares = [math.exp(s / 0.3) if keep else 0.0 for s, keep in zip(scores, kept, strict=True)]
                if not any(kept):
                    shares = [1.0] * 5
                expected = torch.tensor(shares, dtype=torch.float64) / sum(shares)
                torch.testing.assert_close(target[b, t, n], expected)


def test_a_patch_that_resembles_nothing_is_spread_evenly() -> None:
    features = torch.tensor([[[[1.0, 0.0], [-1.0, 0.0]], [[-1.0, 0.0], [-2.0, 0.0]]]])
    target = temporal_similarity(features, temperature=0.1, threshold=0.0)
    assert target.tolist() == [[[[0.5, 0.5], [0.5, 0.5]]]]
    assert torch.isfinite(target).all()


def test_target_by_hand() -> None:
    features = torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]]]]).expand(1, 2, 2, 2).clone()
    features[0, 1, 1] = torch.tensor([5.0, 0.0])  # the second patch of frame 1 continues both of frame 0
    target = temporal_similarity(features, temperature=0.5, threshold=None)
    share = 1 / (1 + math.exp(2))
    torch.testing.assert_close(target[0, 0], torch.tensor([[share, 1 - share], [share, 1 - share]]))


def test_target_has_no_gradient() -> None:
    features = torch.randn(1, 2, 3, 4, requires_grad=True)
    assert not temporal_similarity(features).requires_grad


def test_loss_by_hand() -> None:
    target = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
    prediction = torch.tensor([[[[math.log(3), 0.0], [0.0, 0.0]]]])
    expected = (-math.log(3 / 4) + math.log(2)) / 2
    assert temporal_similarity_loss(prediction, target).item() == pytest.approx(expected)


def test_perfect_prediction_leaves_the_entropy_of_the_target() -> None:
    target = torch.rand(2, 3, 4, 4, dtype=torch.float64).softmax(-1)
    loss = temporal_similarity_loss(target.log(), target)
    assert loss.item() == pytest.approx(-(target * target.log()).sum(-1).mean().item())


def test_only_frames_that_count() -> None:
    target = torch.rand(2, 3, 4, 4).softmax(-1)
    prediction = torch.randn(2, 3, 4, 4)
    valid = torch.tensor([[True, False, True], [False, False, False]])
    expected = temporal_similarity_loss(prediction[:1, ::2], target[:1, ::2])
    torch.testing.assert_close(temporal_similarity_loss(prediction, target, valid), expected)
    assert temporal_similarity_loss(prediction, target, torch.zeros_like(valid)).item() == 0.0


def test_similarity_gradient() -> None:
    target = torch.rand(1, 2, 3, 3, dtype=torch.float64).softmax(-1)
    prediction = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: temporal_similarity_loss(x, target), prediction)


def test_similarity_refusals() -> None:
    with pytest.raises(ShapeError, match=r"T > 2, but got \(1, 2, 3, 4\). Raise `clip_length`"):
        temporal_similarity(torch.zeros(1, 2, 3, 4), shift=2)
    with pytest.raises(ConfigError, match="`temperature` to be above 0, but got 1 and 0"):
        temporal_similarity(torch.zeros(1, 2, 3, 4), temperature=0)
    with pytest.raises(ShapeError, match="shape of the target"):
        temporal_similarity_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3))
