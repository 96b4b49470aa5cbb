from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn import SlotAttention


def _attention(**options: int) -> SlotAttention:
    torch.manual_seed(0)
    return SlotAttention(**({"slot_dim": 8, "feature_dim": 6, "mlp_hidden": 12} | options))


def _by_hand(module: SlotAttention, slots: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """One iteration, slot by slot and patch by patch, for one sample."""
    dim = slots.shape[1]
    normed = layer_norm(features, (features.shape[1],), module.norm_features.weight, module.norm_features.bias)
    queries = layer_norm(slots, (dim,), module.norm_slots.weight, module.norm_slots.bias) @ module.to_q.weight.T
    keys, values = normed @ module.to_k.weight.T, normed @ module.to_v.weight.T
    logits = torch.zeros(len(slots), len(features))
    for s in range(len(slots)):
        for n in range(len(features)):
            logits[s, n] = (queries[s] * keys[n]).sum() / math.sqrt(dim)
    weights = torch.zeros_like(logits)
    for n in range(len(features)):
        exponents = [math.exp(logits[s, n].item()) for s in range(len(slots))]
        for s in range(len(slots)):
            weights[s, n] = exponents[s] / sum(exponents) + module.eps
    new = torch.zeros_like(slots)
    for s in range(len(slots)):
        update = sum(weights[s, n] * values[n] for n in range(len(features))) / weights[s].sum()
        gate_in = module.gru.weight_ih @ update + module.gru.bias_ih
        gate_state = module.gru.weight_hh @ slots[s] + module.gru.bias_hh
        reset = torch.sigmoid(gate_in[:dim] + gate_state[:dim])
        keep = torch.sigmoid(gate_in[dim : 2 * dim] + gate_state[dim : 2 * dim])
        candidate = torch.tanh(gate_in[2 * dim :] + reset * gate_state[2 * dim :])
        state = (1 - keep) * candidate + keep * slots[s]
        norm, first, _, second = module.mlp  # type: ignore[misc]
        hidden = (first.weight @ layer_norm(state, (dim,), norm.weight, norm.bias) + first.bias).clamp(min=0)
        new[s] = state + second.weight @ hidden + second.bias
    return new, logits


def test_one_iteration_equals_the_formula_written_out() -> None:
    module = _attention()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        slots, features = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
        out = module(slots, features)
        for sample in range(2):
            expected_slots, expected_logits = _by_hand(module, slots[sample], features[sample])
            torch.testing.assert_close(out.slots[sample], expected_slots, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out.logits[sample], expected_logits, rtol=1e-4, atol=1e-5)


def test_more_iterations_are_repeated_calls_and_logits_are_the_last() -> None:
    module = _attention(iterations=3)
    slots, features = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    out, state = module(slots, features), slots
    for _ in range(3):
        step = module(state, features, 1)
        state = step.slots
    torch.testing.assert_close(out.slots, state)
    torch.testing.assert_close(out.logits, step.logits)


def test_slots_are_equivariant_and_patches_invariant_under_permutation() -> None:
    module = _attention(iterations=2)
    slots, features = torch.randn(2, 4, 8), torch.randn(2, 9, 6)
    out = module(slots, features)
    order, patches = torch.randperm(4), torch.randperm(9)
    permuted = module(slots[:, order], features[:, patches])
    torch.testing.assert_close(permuted.slots, out.slots[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(permuted.logits, out.logits[:, order][:, :, patches], rtol=1e-4, atol=1e-5)


def test_slots_compete_for_patches() -> None:
    """Equal slots share each patch, so they get the mean of the values; a mask over patches would not show this."""
    module = _attention()
    features = torch.randn(1, 5, 6)
    out = module(torch.ones(1, 3, 8), features)
    torch.testing.assert_close(out.logits.softmax(dim=1), torch.full((1, 3, 5), 1 / 3))
    state = module.gru(module.to_v(module.norm_features(features)).mean(dim=1), torch.ones(1, 8))
    torch.testing.assert_close(out.slots[:, 0], state + module.mlp(state), rtol=1e-4, atol=1e-5)  # type: ignore[misc]


def test_a_slot_that_wins_nothing_stays_finite() -> None:
    module = _attention()
    with torch.no_grad():
        module.to_q.weight.mul_(1e4)
    out = module(torch.randn(1, 4, 8, requires_grad=True), torch.randn(1, 5, 6))
    out.slots.sum().backward()
    assert torch.isfinite(out.slots).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_mlp_can_be_left_out() -> None:
    assert _attention(mlp_hidden=0).mlp is None


def test_errors() -> None:
    with pytest.raises(ConfigError, match="`iterations` to be at least 1"):
        _attention()(torch.randn(1, 3, 8), torch.randn(1, 5, 6), 0)
    with pytest.raises(ShapeError, match="Flatten the grid"):
        _attention()(torch.randn(1, 3, 8), torch.randn(1, 2, 5, 6))
    with pytest.raises(ConfigError, match="`eps`"):
        SlotAttention(8, eps=0.0)


def test_sharpness_scales_the_initial_logits():
    torch.manual_seed(0)
    slots, features = torch.randn(4, 3, 64), torch.randn(4, 50, 64)
    spread = {}
    for sharpness in (None, 1.0, 2.0):
        torch.manual_seed(1)
        attention = SlotAttention(64, 64, sharpness=sharpness)
        spread[sharpness] = attention(slots, features).logits.std().item()
    assert spread[2.0] == pytest.approx(4 * spread[1.0], rel=1e-4)
    assert spread[1.0] > 2 * spread[None]
    with pytest.raises(ConfigError, match="sharpness"):
        SlotAttention(8, sharpness=0.0)
