"""Options, maps and values that do not fit, and what probabilities may stand in for."""

import math

import numpy as np
import pytest
import torch
from ssync_cases import run, softmax, tensors

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.method import ssync_loss
from ssync_pl.method.maps import SSyncMaps


@pytest.mark.parametrize(
    "options",
    [
        {"merge_threshold": -0.1},
        {"merge_threshold": 1.5},
        {"merge_threshold": math.nan},
        {"n_bd": -1},
        {"n_nbd": -1},
        {"n_noise": -1},
        {"n_bd": 12},
        {"n_nbd": 12},
        {"n_noise": 12},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"loss": "mse"},
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(options):
    d, a = tensors()
    with pytest.raises(ConfigError, match=next(iter(options))):
        run(d, a, **options)


@pytest.mark.parametrize("name", ["attention_logits", "mask_logits", "attention_probs", "mask_probs"])
def test_nan_is_refused_by_name(name):
    x, y = tensors(grad=False)
    maps = {"attention_logits": x, "mask_logits": y}
    if name.endswith("probs"):
        maps = {"attention_probs": x.softmax(2), "mask_probs": y.softmax(2)}
    maps[name] = maps[name].clone()
    maps[name][1, 2, 3, 4] = math.nan
    with pytest.raises(ShapeError, match=name):
        ssync_loss(SSyncMaps(**maps, grid=(3, 4)))


def test_nan_in_logits_beside_good_probabilities_is_refused():
    x, y = tensors(grad=False)
    bad = x.clone()
    bad[0, 0, 0, 0] = math.nan
    maps = SSyncMaps(attention_logits=bad, attention_probs=x.softmax(2), mask_logits=y, grid=(3, 4))
    with pytest.raises(ShapeError, match="attention_logits"):
        ssync_loss(maps)


def test_nan_where_nothing_is_valid_is_allowed():
    x, y = tensors(grad=False)
    valid = torch.ones(2, 3, 12, dtype=torch.bool)
    valid[0, 1, 5] = False
    slots = torch.tensor([[True, True, True, False]] * 2)
    bad = [t.clone().masked_fill(~slots[:, None, :, None], math.nan) for t in (x, y)]
    for t in bad:
        t[0, 1, :, 5] = math.nan
        t.requires_grad_()
    out = run(*bad, slot_valid=slots, patch_valid=valid)
    out.loss.backward()
    assert torch.equal(out.loss, run(x, y, slot_valid=slots, patch_valid=valid).loss)
    assert torch.equal(out.winners, run(x, y, slot_valid=slots, patch_valid=valid).winners)
    assert all(torch.isfinite(t.grad).all() for t in bad)


def test_probabilities_merge_only_when_asked_and_say_so():
    x, y = (t.softmax(2) for t in tensors(20, grad=False))
    maps = SSyncMaps(attention_probs=x, mask_probs=y, grid=(3, 4))
    with pytest.warns(UserWarning, match="coverage"):
        out = ssync_loss(maps, merge=True)
    assert out.slot_iou is not None


def test_probability_and_logit_input_agree():
    x, y = tensors(21, dtype=torch.float64, grad=False)
    logits = ssync_loss(SSyncMaps(attention_logits=x, mask_logits=y, grid=(3, 4)), merge=False, temperature=0.5)
    probs = SSyncMaps(attention_probs=x.softmax(2), mask_probs=y.softmax(2), grid=(3, 4))
    torch.testing.assert_close(ssync_loss(probs, temperature=0.5).loss, logits.loss)


def test_probabilities_at_temperature_one_are_used_as_they_are():
    # Half of the mass is missing: (1/4)^2 + (3/4)^2 over two slots, not (1/2)^2.
    d = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 1, 2, 2)
    maps = SSyncMaps(attention_logits=d, mask_probs=torch.full((1, 1, 2, 2), 0.25), grid=(1, 2))
    assert ssync_loss(maps, merge=False).boundary_loss.item() == pytest.approx((1 / 16 + 9 / 16) / 2)


def test_fractions_of_everything_are_one():
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(1, 1, 2, 49, dtype=dtype)
        for valid in (None, torch.ones(1, 1, 49, dtype=torch.bool)):
            out = run(x, x.clone(), (7, 7), patch_valid=valid)
            assert out.interior_fraction.item() == 1
            assert out.agreement.item() == 1


def test_zero_probabilities_keep_gradients_finite():
    p = torch.tensor(softmax(np.random.default_rng(0).normal(size=(1, 2, 3, 4))))
    p[:, :, 2] = 0
    p = p / p.sum(2, keepdim=True)
    for temperature in (1.0, 0.5, 2.0):
        x, y = p.clone().requires_grad_(), p.flip(-1).clone().requires_grad_()
        out = ssync_loss(SSyncMaps(attention_probs=x, mask_probs=y, grid=(2, 2)), n_nbd=9, temperature=temperature)
        out.loss.backward()
        assert torch.isfinite(out.loss)
        assert torch.isfinite(x.grad).all()
        assert torch.isfinite(y.grad).all()
