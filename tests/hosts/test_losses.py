import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssync_pl.hosts.losses import slot_contrast_loss, temporal_similarity, temporal_similarity_loss


def _by_loops(slots: Tensor, temperature: float, across_batch: bool, valid: Tensor) -> float:
    losses = []
    for t in range(slots.shape[1] - 1):
        counted = [b for b in range(len(slots)) if valid[b, t] and valid[b, t + 1]]
        for b in counted:
            clips = counted if across_batch else [b]
            earlier, own = slots[clips, t].flatten(0, 1), clips.index(b) * slots.shape[2]
            for s, later in enumerate(slots[b, t + 1]):
                scores = F.cosine_similarity(earlier, later[None]) / temperature
                losses.append(-scores.log_softmax(0)[own + s].item())
    return sum(losses) / len(losses)


SOME = torch.tensor([[True, True, True, True], [True, True, False, False], [False, False, False, False]])


@pytest.mark.parametrize("across_batch", [True, False])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("valid", [SOME, torch.ones_like(SOME)])
def test_contrast_equals_the_definition(across_batch: bool, temperature: float, valid: Tensor) -> None:
    slots = torch.randn(3, 4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = slot_contrast_loss(slots, valid, temperature=temperature, across_batch=across_batch)
    assert loss.item() == pytest.approx(_by_loops(slots, temperature, across_batch, valid), rel=1e-10)


def test_contrast_where_nothing_counts_and_in_half_precision() -> None:
    slots, every = torch.randn(2, 3, 4, 8, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    loss = slot_contrast_loss(slots, ~every)
    loss.backward()
    assert loss.item() == 0.0
    assert not slots.grad.any()
    assert not temporal_similarity(slots).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = slot_contrast_loss(slots, every)
    torch.testing.assert_close(loss, slot_contrast_loss(slots, every))
    assert slot_contrast_loss(slots.bfloat16(), every).dtype == torch.float32


@pytest.mark.parametrize(("shift", "threshold"), [(1, 0.0), (2, 0.0), (1, None), (1, 0.4)])
def test_similarity_equals_the_definition(shift: int, threshold: float | None) -> None:
    features = torch.randn(2, 4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = temporal_similarity(features, shift=shift, temperature=0.3, threshold=threshold)
    assert target.shape == (2, 4 - shift, 5, 5)
    for b in range(2):
        for t in range(4 - shift):
            for n in range(5):
                scores = F.cosine_similarity(features[b, t, n][None], features[b, t + shift])
                shares = (scores / 0.3).exp() * (threshold is None or scores >= threshold)
                shares = shares if shares.any() else torch.ones_like(shares)  # what resembles nothing is spread evenly
                torch.testing.assert_close(target[b, t, n], shares / shares.sum())


def test_similarity_loss_by_hand() -> None:
    target = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
    prediction = torch.tensor([[[[math.log(3), 0.0], [0.0, 0.0]]]])
    expected = (-math.log(3 / 4) + math.log(2)) / 2
    assert temporal_similarity_loss(prediction, target, torch.ones(1, 1).bool()).item() == pytest.approx(expected)
    target, valid = torch.rand(2, 3, 4, 4).softmax(-1), torch.tensor([[True, False, True], [False, False, False]])
    prediction = torch.randn(2, 3, 4, 4)
    expected = temporal_similarity_loss(prediction[:1, ::2], target[:1, ::2], valid[:1, ::2])
    torch.testing.assert_close(temporal_similarity_loss(prediction, target, valid), expected)
    assert temporal_similarity_loss(prediction, target, torch.zeros_like(valid)).item() == 0.0
