"""Targets and loss of VideoSAUR's similarity prediction, by hand and by loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.temporal_similarity import temporal_similarity, temporal_similarity_loss


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


def test_gradient() -> None:
    target = torch.rand(1, 2, 3, 3, dtype=torch.float64).softmax(-1)
    prediction = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: temporal_similarity_loss(x, target), prediction)


def test_refusals() -> None:
    with pytest.raises(ShapeError, match=r"T > 2, but got \(1, 2, 3, 4\). Raise `clip_length`"):
        temporal_similarity(torch.zeros(1, 2, 3, 4), shift=2)
    with pytest.raises(ConfigError, match="`temperature` to be above 0, but got 1 and 0"):
        temporal_similarity(torch.zeros(1, 2, 3, 4), temperature=0)
    with pytest.raises(ShapeError, match="shape of the target"):
        temporal_similarity_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3))
