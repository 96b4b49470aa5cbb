"""Slot attention of all hosts, its start as soft k-means, and the transformer between frames."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.slot_attention import SlotAttention, SlotCorrector, init_soft_kmeans_
from ssync_pl.hosts.nn.slot_transformer import SlotTransformer, SlotTransformerBlock


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


@pytest.mark.parametrize("mlp_hidden", [None, 0, 7])
def test_two_iterations_equal_the_formula(mlp_hidden: int | None) -> None:
    torch.manual_seed(0)
    corrector = SlotCorrector(6, 4, iterations=2, mlp_hidden=mlp_hidden, eps=1e-3).double()
    first, features = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    normed = corrector.norm_features(features)
    keys, values = normed @ corrector.to_k.weight.T, normed @ corrector.to_v.weight.T
    slots = first
    for _ in range(2):
        slots = corrector.norm_slots(slots)
        logits = slots @ corrector.to_q.weight.T @ keys.mT / 2  # sqrt of 4 channels
        attention = logits.softmax(1)
        shares = (attention + 1e-3) / (attention + 1e-3).sum(-1, keepdim=True)
        # The recurrent state is the normalised slot.
        slots = corrector.gru((shares @ values).view(6, 4), slots.reshape(6, 4)).view(2, 3, 4)
        if corrector.mlp is not None:
            slots = slots + corrector.mlp.layers(slots)
    output = corrector(first, features)
    torch.testing.assert_close(output["slots"], slots)
    torch.testing.assert_close(output["dots"], logits)
    torch.testing.assert_close(output["masks"], attention)


def test_autocast_keeps_logits_in_float32() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = SlotCorrector(6, 4)(torch.randn(1, 3, 4), torch.randn(1, 5, 6))
    assert output["dots"].dtype == output["masks"].dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: SlotAttention(8)(torch.zeros(1, 3, 8), torch.zeros(1, 5, 8), 0), ConfigError, "iterations"),
        (lambda: SlotAttention(8)(torch.zeros(1, 3, 8), torch.zeros(1, 2, 5, 8)), ShapeError, "slots"),
        (lambda: SlotAttention(8, sharpness=0.0), ConfigError, "sharpness"),
        (lambda: SlotCorrector(8, 8, iterations=0), ConfigError, "iterations"),
        (lambda: SlotCorrector(8, 8, eps=0), ConfigError, "corrector_eps"),
        (lambda: init_soft_kmeans_(SlotCorrector(6, 4)), ConfigError, "encoder_hidden"),
        (lambda: init_soft_kmeans_(SlotCorrector(4, 4), float("nan")), ConfigError, "corrector_sharpness"),
        (lambda: SlotTransformer(8, blocks=1, heads=3), ConfigError, "heads"),
        (lambda: SlotTransformer(8, blocks=-1, heads=2), ConfigError, "blocks"),
    ],
)
def test_refusals(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()


def _normalised(values: torch.Tensor) -> torch.Tensor:
    return (values - values.mean(-1, keepdim=True)) / (values.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def _started(sharpness: float = 1.5, dim: int = 16, **options: int) -> SlotCorrector:
    torch.manual_seed(0)
    corrector = SlotCorrector(dim, dim, iterations=1, **options)
    init_soft_kmeans_(corrector, sharpness)
    return corrector


@pytest.mark.parametrize("sharpness", [1.5, 3.0])
def test_logits_are_similarities_and_values_the_features(sharpness: float) -> None:
    corrector = _started(sharpness)
    slots, features = torch.randn(2, 3, 16), torch.randn(2, 7, 16)
    wanted = sharpness**2 * _normalised(slots) @ _normalised(features).mT / 4
    torch.testing.assert_close(corrector(slots, features)["dots"], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(corrector.to_v.weight, torch.eye(16))
    # A rotation, not the identity: queries and keys are not tied to the axes.
    assert (corrector.to_q.weight.abs().amax(1) < 0.95 * sharpness).all()


def test_it_groups_alike_patches_before_any_training() -> None:
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(3, 16, generator=generator)
    labels = torch.arange(60) % 3
    features = (kinds[labels] + 0.2 * torch.randn(60, 16, generator=generator))[None]
    first = features[:, :3] + torch.randn(1, 3, 16, generator=generator)

    def purity(corrector: SlotCorrector) -> float:
        winners = corrector(first, features, 3)["masks"][0].argmax(0)
        return sum((labels[winners == slot].bincount(minlength=3).max()).item() for slot in range(3)) / 60

    torch.manual_seed(0)
    assert purity(SlotCorrector(16, 16, mlp_hidden=0)) < 0.9
    assert purity(_started(mlp_hidden=0)) == 1.0


@pytest.mark.parametrize("with_memory", [False, True])
def test_block_equals_its_formula(with_memory: bool) -> None:
    torch.manual_seed(0)
    block = SlotTransformerBlock(8, heads=2, mlp_hidden=12).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = torch.randn(2, 5, 8, dtype=torch.float64)
    memory = torch.randn(2, 3, 8, dtype=torch.float64) if with_memory else None
    normed = block.norm1(inputs)
    source = normed if memory is None else memory
    weight, bias = block.self_attn.qkv.weight, block.self_attn.qkv.bias
    query, key, value = (
        x @ weight[8 * i : 8 * i + 8].T + bias[8 * i : 8 * i + 8] for i, x in enumerate((normed, source, source))
    )
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        # The published scale: times sqrt(4), not divided by it.
        logits = query[..., part] @ key[..., part].mT * math.sqrt(4)
        heads.append(logits.softmax(-1) @ value[..., part])
    mixed = inputs + block.self_attn.out_proj(torch.cat(heads, -1))
    expected = mixed + block.linear2(block.linear1(block.norm2(mixed)).relu())
    torch.testing.assert_close(block(inputs, memory), expected)


def test_blocks_follow_each_other_and_each_sees_the_memory() -> None:
    transformer = SlotTransformer(8, blocks=2, heads=4)
    inputs, memory = torch.randn(1, 5, 8), torch.randn(1, 3, 8)
    expected = transformer.blocks[1](transformer.blocks[0](inputs, memory), memory)
    assert torch.equal(transformer(inputs, memory), expected)
    assert transformer.blocks[0].linear1.weight.shape == (32, 8)


def test_the_usual_scale_equals_torchs_encoder_layer_with_norm_first() -> None:
    torch.manual_seed(0)
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
