from __future__ import annotations

import pytest
import torch

from ssync_pl.adapters.heads import joint_heads, separate_heads
from ssync_pl.method.merging import slot_coverage

B, S, HEADS, N = 2, 4, 3, 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("heads_dim", [2, -2])
def test_joint_softmax_summed_over_heads_is_the_softmax_of_the_merged_logits(heads_dim: int) -> None:
    logits = 4 * torch.randn(B, S, HEADS, N, dtype=torch.float64)
    together = logits.flatten(1, 2).softmax(1).unflatten(1, (S, HEADS)).sum(2)
    torch.testing.assert_close(joint_heads(logits, heads_dim).softmax(1), together)


def test_joint_gradient_is_that_of_the_hosts_own_attention() -> None:
    logits = torch.randn(B, S, HEADS, N, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(B, S, N, dtype=torch.float64)
    together = logits.flatten(1, 2).softmax(1).unflatten(1, (S, HEADS)).sum(2)
    attention = (together, joint_heads(logits, 2).softmax(1))
    grads = [torch.autograd.grad((value * weights).sum(), logits)[0] for value in attention]
    torch.testing.assert_close(*grads)


def test_the_softmax_of_the_merged_logits_is_not_the_mean_of_separate_softmaxes() -> None:
    logits = 2 * torch.randn(B, HEADS, S, N)
    maps = separate_heads(logits, 1, 2)
    assert maps.probs is not None
    torch.testing.assert_close(maps.probs, sum(logits[:, h].softmax(1) for h in range(HEADS)) / HEADS)
    torch.testing.assert_close(maps.logits, sum(logits[:, h] for h in range(HEADS)) / HEADS)
    assert (joint_heads(logits, 1).softmax(1) - maps.probs).abs().max() > 0.1


def test_a_constant_in_one_head_changes_nothing_where_each_head_has_its_softmax() -> None:
    logits = torch.randn(B, HEADS, S, N)
    shifted = logits + torch.tensor([0.0, 8.0, -3.0])[:, None, None]
    before, after = separate_heads(logits, 1, 2), separate_heads(shifted, 1, 2)
    torch.testing.assert_close(after.probs, before.probs)
    assert torch.equal(slot_coverage(after.logits[:, None]), slot_coverage(before.logits[:, None]))
    # The logsumexp would hand both maps to the head with the constant.
    assert not torch.equal(slot_coverage(joint_heads(shifted, 1)[:, None]), slot_coverage(before.logits[:, None]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_head_is_the_host_to_the_bit(dtype: torch.dtype) -> None:
    logits = torch.randn(B, S, 1, N, dtype=dtype)
    assert torch.equal(joint_heads(logits, 2), logits[:, :, 0])
    maps = separate_heads(logits, 2, 1)
    assert maps.probs is None
    assert torch.equal(maps.logits, logits[:, :, 0])


def test_halves_are_merged_in_float32() -> None:
    logits = torch.randn(B, S, HEADS, N, dtype=torch.bfloat16)
    torch.testing.assert_close(joint_heads(logits, 2), logits.float().logsumexp(2))
    maps = separate_heads(logits, 2, 1)
    assert maps.logits.dtype == torch.float32
    assert maps.probs is not None
    assert maps.probs.dtype == torch.float32


@pytest.mark.parametrize("added", [False, True])
def test_absent_slots_stay_absent_without_a_nan(added: bool) -> None:
    logits = torch.randn(B, S, HEADS, N, requires_grad=True)
    absent = torch.tensor([[False, True, False, True], [False, False, False, True]])
    absent_everywhere = absent[:, :, None, None].expand_as(logits)
    if added:
        # Unlike a fill, an addition hands a NaN in the gradient on.
        masked = logits + torch.zeros(logits.shape).masked_fill(absent_everywhere, float("-inf"))
    else:
        masked = logits.masked_fill(absent_everywhere, float("-inf"))
    merged = joint_heads(masked, 2)
    assert torch.equal(merged.isneginf(), absent[:, :, None].expand(B, S, N))
    present = logits.logsumexp(2)
    torch.testing.assert_close(merged[~absent], present[~absent])
    for probs in (merged.softmax(1), separate_heads(masked, 2, 1).probs):
        assert probs is not None
        torch.testing.assert_close(probs.sum(1), torch.ones(B, N))
        grad = torch.autograd.grad(probs.square().sum(), logits, retain_graph=True)[0]
        assert grad.isfinite().all()
        assert (grad[absent] == 0).all()
        assert (grad[~absent] != 0).any()
