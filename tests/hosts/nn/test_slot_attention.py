"""Slot attention of all hosts, its start as soft k-means, and the transformer between frames."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ssync_pl.hosts.nn.slot_attention import SlotAttention, SlotCorrector, init_soft_kmeans_
from ssync_pl.hosts.nn.slot_transformer import SlotTransformer, SlotTransformerBlock


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("iterations", [1, 3])
def test_slot_attention_equals_its_formula(iterations: int) -> None:
    module = SlotAttention(8, 6, mlp_hidden=12, iterations=iterations).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    first, features = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    normed, slots = module.norm_features(features), first
    keys, values = normed @ module.to_k.weight.T, normed @ module.to_v.weight.T
    for _ in range(iterations):
        logits = module.norm_slots(slots) @ module.to_q.weight.T @ keys.mT / math.sqrt(8)
        weights = logits.softmax(1) + module.eps
        update = (weights / weights.sum(2, keepdim=True)) @ values
        slots = module.gru(update.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        slots = slots + module.mlp(slots)
    out = module(first, features)
    torch.testing.assert_close(out.slots, slots)
    torch.testing.assert_close(out.logits, logits)


def test_maps_stay_in_float32_finite_and_as_sharp_as_asked() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = SlotCorrector(6, 4)(torch.randn(2, 3, 4), torch.randn(2, 5, 6))
    assert output["dots"].dtype == output["masks"].dtype == torch.float32
    module, spread = SlotAttention(8, 6), {}
    with torch.no_grad():
        module.to_q.weight.mul_(1e4)  # some slots win nothing
    out = module(torch.randn(1, 4, 8, requires_grad=True), torch.randn(1, 5, 6))
    out.slots.sum().backward()
    assert torch.isfinite(out.slots).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
    slots, features = torch.randn(4, 3, 64), torch.randn(4, 50, 64)
    for sharpness in (None, 1.0, 2.0):
        torch.manual_seed(1)
        spread[sharpness] = SlotAttention(64, 64, sharpness=sharpness)(slots, features).logits.std().item()
    assert spread[2.0] == pytest.approx(4 * spread[1.0], rel=1e-4)
    assert spread[1.0] > 2 * spread[None]


@pytest.mark.parametrize("sharpness", [1.5, 3.0])
def test_soft_kmeans_compares_slots_and_features(sharpness: float) -> None:
    corrector = SlotCorrector(16, 16, iterations=1)
    init_soft_kmeans_(corrector, sharpness)
    slots, features = torch.randn(2, 3, 16), torch.randn(2, 7, 16)
    normed = [(x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
              for x in (slots, features)]  # fmt: skip
    wanted = sharpness**2 * normed[0] @ normed[1].mT / 4
    torch.testing.assert_close(corrector(slots, features)["dots"], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(corrector.to_v.weight, torch.eye(16))
    # A rotation, not the identity: queries and keys are not tied to the axes.
    assert (corrector.to_q.weight.abs().amax(1) < 0.95 * sharpness).all()


def test_the_usual_scale_equals_torchs_encoder_layer_with_norm_first() -> None:
    block = SlotTransformerBlock(8, heads=2, mlp_hidden=16, published=False)
    reference = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    reference.self_attn.in_proj_weight.data = block.self_attn.qkv.weight.data
    reference.self_attn.in_proj_bias.data = block.self_attn.qkv.bias.data
    reference.self_attn.out_proj.load_state_dict(block.self_attn.out_proj.state_dict())
    for name in ("norm1", "norm2", "linear1", "linear2"):
        getattr(reference, name).load_state_dict(getattr(block, name).state_dict())
    slots = torch.randn(2, 5, 8)
    torch.testing.assert_close(block(slots), reference(slots), rtol=1e-4, atol=1e-5)
    assert torch.equal(SlotTransformer(8, blocks=0, heads=2)(slots), slots)
