from __future__ import annotations

import pytest
import torch

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.corrector import SlotCorrector


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


def test_parameters_are_those_of_the_public_checkpoints_in_their_order() -> None:
    assert [(name, tuple(value.shape)) for name, value in SlotCorrector(6, 4).named_parameters()] == [
        ("to_k.weight", (4, 6)),
        ("to_v.weight", (4, 6)),
        ("to_q.weight", (4, 4)),
        ("gru.weight_ih", (12, 4)),
        ("gru.weight_hh", (12, 4)),
        ("gru.bias_ih", (12,)),
        ("gru.bias_hh", (12,)),
        ("mlp.layers.0.weight", (4,)),
        ("mlp.layers.0.bias", (4,)),
        ("mlp.layers.1.weight", (16, 4)),
        ("mlp.layers.1.bias", (16,)),
        ("mlp.layers.3.weight", (4, 16)),
        ("mlp.layers.3.bias", (4,)),
        ("norm_features.weight", (6,)),
        ("norm_features.bias", (6,)),
        ("norm_slots.weight", (4,)),
        ("norm_slots.bias", (4,)),
    ]
    assert SlotCorrector(6, 4, mlp_hidden=0).mlp is None


def test_a_call_may_set_the_iterations() -> None:
    corrector = SlotCorrector(6, 4, iterations=1)
    counts: list[int] = []
    corrector.to_q.register_forward_hook(lambda *_: counts.append(1))
    slots, features = torch.randn(1, 3, 4), torch.randn(1, 5, 6)
    corrector(slots, features, 3)
    assert len(counts) == 3
    corrector(slots, features)
    assert len(counts) == 4


def test_autocast_keeps_logits_in_float32() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = SlotCorrector(6, 4)(torch.randn(1, 3, 4), torch.randn(1, 5, 6))
    assert output["dots"].dtype == output["masks"].dtype == torch.float32


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="at least 1 iteration, but got 0"):
        SlotCorrector(6, 4, iterations=0)
    with pytest.raises(ConfigError, match="`corrector_eps` to be above 0"):
        SlotCorrector(6, 4, eps=0)
    with pytest.raises(ShapeError, match="call once a frame"):
        SlotCorrector(6, 4)(torch.zeros(1, 3, 4), torch.zeros(1, 2, 5, 6))
