from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.relative_slot_attention import RelativeSlotAttention, SlotPose, attention_pose

GRID, S, D, C = (3, 4), 3, 8, 5


def _binder(**changes: object) -> RelativeSlotAttention:
    torch.manual_seed(0)
    options = {"num_slots": S, "slot_dim": D, "feature_dim": C, "iterations": 2, "dropout": 0.0}
    binder = RelativeSlotAttention(GRID, **(options | changes))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in binder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return binder


def _pair(binder: RelativeSlotAttention, projected: Tensor, relative: Tensor) -> Tensor:
    """The published order: the whole MLP on one pair of slot and patch."""
    inner = projected + binder.from_position(relative)
    return binder.pair_out(binder.pair_in(inner).clamp(min=0))


def _by_hand(binder: RelativeSlotAttention, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One frame, pair by pair."""
    embedded = binder.embed(tokens)
    points = binder.points[places]
    slots, position, spread = binder.slots, binder.position, binder.log_spread.exp()
    count = len(tokens)
    for iteration in range(binder.iterations + 1):
        norm = binder.norm_slots
        normed = layer_norm(slots, (D,), norm.weight, norm.bias)
        logits, values = torch.zeros(S, count), torch.zeros(S, count, D)
        for s in range(S):
            for n in range(count):
                relative = (points[n] - position[s]) / (5.0 * spread[s])
                key = _pair(binder, binder.to_k(embedded[n]), relative)
                logits[s, n] = (binder.to_q(normed[s]) * key).sum() * D**-0.5
                values[s, n] = _pair(binder, binder.to_v(embedded[n]), relative)
        attention = logits.softmax(0) + binder.eps
        attention = attention / attention.sum(1, keepdim=True)
        if iteration == binder.iterations:
            break
        position = attention @ points
        spread = torch.stack([(attention[s] @ (points - position[s]).square() + 1e-4).sqrt() for s in range(S)])
        updates = torch.stack([attention[s] @ values[s] for s in range(S)])
        slots = binder.gru(updates, slots)
        slots = slots + binder.mlp(slots)
    return binder.to_output(binder.norm_slots(slots)), logits, attention


def test_equals_the_published_order_pair_by_pair() -> None:
    binder = _binder()
    tokens = torch.randn(2, 2, 7, C)
    indices = torch.stack([torch.randperm(12)[:7].sort().values for _ in range(4)]).view(2, 2, 7)
    bound = binder(tokens, indices)
    for b in range(2):
        for t in range(2):
            slots, logits, attention = _by_hand(binder, tokens[b, t], indices[b, t])
            torch.testing.assert_close(bound.slots[b, t], slots, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(bound.logits[b, t], logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(bound.attention[b, t], attention, rtol=1e-4, atol=1e-6)


def test_gradients_equal_those_of_the_published_order() -> None:
    binder = _binder(iterations=1).double()
    tokens, indices = torch.randn(1, 1, 4, C).double(), torch.tensor([[[0, 3, 5, 10]]])
    weights = torch.randn(S, D).double()
    torch.set_default_dtype(torch.float64)
    try:
        own = torch.autograd.grad((binder(tokens, indices).slots[0, 0] * weights).sum(), list(binder.parameters()))
        hand = torch.autograd.grad(
            (_by_hand(binder, tokens[0, 0], indices[0, 0])[0] * weights).sum(), list(binder.parameters())
        )
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, _), mine, theirs in zip(binder.named_parameters(), own, hand, strict=True):
        # Logits are rounded to float32 on purpose.
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_pose_is_mean_and_spread_of_what_is_attended_to() -> None:
    points = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    pose = attention_pose(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]), points)
    torch.testing.assert_close(pose.position, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(pose.spread, torch.tensor([[1.0001**0.5, 0.01], [0.01, 0.01]]))
    relative = SlotPose(pose.position, pose.spread).relative(points)
    torch.testing.assert_close(relative[0, 1], torch.tensor([1.0 / (5 * 1.0001**0.5), 0.0]))


def test_a_slot_on_one_patch_has_a_finite_gradient() -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    pose = attention_pose(logits.softmax(1), torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    (grad,) = torch.autograd.grad(pose.spread.sum(), logits)
    assert grad.isfinite().all()


def test_frames_do_not_see_each_other() -> None:
    binder = _binder()
    tokens, indices = torch.randn(2, 3, 12, C), torch.arange(12).expand(2, 3, 12)
    whole = binder(tokens, indices)
    part = binder(tokens[:, 1:2], indices[:, 1:2])
    torch.testing.assert_close(whole.slots[:, 1:2], part.slots)


def test_tokens_may_come_in_any_order() -> None:
    binder = _binder()
    tokens, order = torch.randn(1, 1, 12, C), torch.randperm(12)
    plain = binder(tokens, torch.arange(12).expand(1, 1, 12))
    mixed = binder(tokens[:, :, order], order.expand(1, 1, 12))
    torch.testing.assert_close(mixed.slots, plain.slots, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed.logits, plain.logits[..., order], rtol=1e-4, atol=1e-5)


def test_logits_are_float32_under_autocast() -> None:
    binder = _binder()
    tokens, indices = torch.randn(1, 1, 12, C), torch.arange(12).expand(1, 1, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bound = binder(tokens, indices)
    assert bound.logits.dtype == bound.attention.dtype == torch.float32
    torch.testing.assert_close(bound.logits, binder(tokens, indices).logits, rtol=0.2, atol=0.1)


def test_every_parameter_is_trained() -> None:
    binder = _binder()
    bound = binder(torch.randn(2, 1, 6, C), torch.arange(6).expand(2, 1, 6))
    (bound.slots.square().sum() + bound.logits.square().sum()).backward()
    assert [name for name, p in binder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_sharper_slots_differ_from_the_start() -> None:
    tokens, indices = torch.randn(4, 1, 12, C), torch.arange(12).expand(4, 1, 12)
    spread = {}
    for sharpness in (None, 3.0):
        torch.manual_seed(0)
        binder = RelativeSlotAttention(GRID, 6, 32, C, iterations=1, sharpness=sharpness)
        spread[sharpness] = binder(tokens, indices).logits.std(2).mean().item()
    assert spread[3.0] > 3 * spread[None]
    with pytest.raises(ConfigError, match="`sharpness`"):
        RelativeSlotAttention(GRID, sharpness=0.0)


def test_an_untrained_binder_can_be_soft_k_means() -> None:
    torch.manual_seed(0)
    centres = 3 * torch.randn(3, 16)
    truth = torch.arange(3).repeat_interleave(16)
    tokens = (centres[truth] + 0.3 * torch.randn(48, 16)).view(1, 1, 48, 16)
    binder = RelativeSlotAttention((6, 8), 3, 32, 16, iterations=3, dropout=0.0, init="kmeans")
    with torch.no_grad():
        binder.from_position.weight.zero_()
        binder.slots.copy_(binder.embed(tokens[0, 0, [0, 16, 32]]) + 0.5 * torch.randn(3, 32))
        bound = binder(tokens, torch.arange(48).expand(1, 1, 48))
        assert torch.equal(bound.logits[0, 0].argmax(0), truth)
        # The MLP of pairs passes what it gets, but for the far negative tail.
        keys = binder.to_k(binder.embed(tokens[0, 0]))
        passed = binder.pair_out(binder.pair_in(keys).relu())
        assert (keys.std() - 1.5).abs() < 0.2
        torch.testing.assert_close(passed, keys.clamp(min=-3.0))
    with pytest.raises(ConfigError, match="`init`"):
        RelativeSlotAttention(GRID, init="other")  # type: ignore[arg-type]


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="`grid`"):
        RelativeSlotAttention((0, 3))
    with pytest.raises(ConfigError, match="`iterations`"):
        RelativeSlotAttention((2, 3), iterations=0)
    with pytest.raises(ShapeError, match=r"\(B, T, N', C\) and \(B, T, N'\)"):
        _binder()(torch.randn(1, 1, 6, C), torch.arange(5).expand(1, 1, 5))
