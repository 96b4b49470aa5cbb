import itertools
import math

import numpy as np
import pytest
import torch
from ssync_cases import run, softmax, tensors
from ssync_naive import _components

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.method import describe_backend, ssync_loss
from ssync_pl.method.maps import SSyncMaps

LOSSES = pytest.mark.parametrize("loss", ["brier", "ce"])


def gradients(*leaves, **options):
    return torch.autograd.grad(run(*leaves, **options).loss, leaves)


def assert_equal(ours, theirs, *names):
    for name in names:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_half_precision_is_computed_in_float32_and_sides_may_differ():
    d, a = tensors(6, dtype=torch.bfloat16)
    out = run(d, a)
    assert out.loss.dtype == torch.float32
    wide = [x.detach().float().requires_grad_() for x in (d, a)]
    expected = run(*wide)
    assert_equal(out, expected, "loss", "encoder_labels")
    narrow = tuple(g.bfloat16() for g in torch.autograd.grad(expected.loss, wide))
    torch.testing.assert_close(torch.autograd.grad(out.loss, (d, a)), narrow, rtol=0, atol=0)
    for other in (d.detach(), d.detach().double()):
        mixed = run(other, wide[1].detach())
        assert_equal(mixed, expected, "encoder_labels")
        torch.testing.assert_close(mixed.loss.float(), expected.loss.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    d, a = tensors(8, dtype=dtype)
    out, grads = run(d, a), gradients(d, a)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(d, a)
        # 257 and 256 are one number in bfloat16: areas and overlaps counted there would tie.
        many = torch.zeros(1, 1, 2, 600)
        many[0, 0, 0, :299], many[0, 0, 1, 2:] = 2.0, 1.0
        counted = run(many, many.clone(), grid=(20, 30), merge_threshold=0.4)
    assert inside.loss.dtype == torch.float32
    assert_equal(out, inside, "loss", "slot_iou", "winners")
    torch.testing.assert_close(torch.autograd.grad(inside.loss, (d, a)), grads, rtol=0, atol=0)
    assert counted.slot_iou[0, 0, 1].item() == pytest.approx(297 / 600, abs=1e-6)
    assert counted.winners.tolist() == [[1, 1]]


@LOSSES
def test_large_logits_and_zero_probabilities_stay_finite(loss):
    leaves = [(x * 1e4).requires_grad_() for x in tensors(9, grad=False)]
    assert all(torch.isfinite(g).all() for g in gradients(*leaves, loss=loss))
    p = torch.tensor(softmax(np.random.default_rng(0).normal(size=(1, 2, 3, 4))))
    p[:, :, 2] = 0
    p = p / p.sum(2, keepdim=True)
    for temperature in (1.0, 0.5, 2.0):
        x, y = p.clone().requires_grad_(), p.flip(-1).clone().requires_grad_()
        maps = SSyncMaps(attention_probs=x, mask_probs=y, grid=(2, 2))
        out = ssync_loss(maps, n_nbd=9, temperature=temperature)
        out.loss.backward()
        assert all(torch.isfinite(value).all() for value in (out.loss, x.grad, y.grad))


@pytest.mark.parametrize("what", ["slots", "patches"])
@pytest.mark.parametrize("filler", [-math.inf, 1e30, -1e30, math.nan])
@LOSSES
def test_the_content_of_what_is_invalid_does_not_matter(what, filler, loss):
    pair = tensors(13, grad=False)
    if what == "slots":
        valid = {"slot_valid": torch.tensor([[True, False, True, True], [True, True, True, False]])}
        hole = ~valid["slot_valid"][:, None, :, None].expand_as(pair[0])
    else:
        valid = {"patch_valid": torch.rand((2, 3, 12), generator=torch.Generator().manual_seed(15)) < 0.7}
        hole = ~valid["patch_valid"][:, :, None].expand_as(pair[0])
    filled = [x.masked_fill(hole, filler) for x in pair]
    outputs = [run(*(x.requires_grad_() for x in leaves), **valid, loss=loss) for leaves in (pair, filled)]
    assert_equal(*outputs, "loss", "slot_iou", "winners", "boundary", "interior", "agreement")
    expected, got = (torch.autograd.grad(o.loss, x) for o, x in zip(outputs, (pair, filled), strict=True))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not any(g[hole].any() for g in got)


def test_padded_videos_and_empty_selections_add_nothing():
    d, a = tensors(17)
    valid, slots = torch.ones(2, 3, 12, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    valid[1] = slots[1] = False
    for extra in ({}, {"slot_valid": slots}):  # padding may also have no slots at all
        out = run(d, a, patch_valid=valid, **extra)
        torch.testing.assert_close(out.loss, run(d[:1], a[:1]).loss)
        (grad,) = torch.autograd.grad(out.loss, d)
        assert not grad[1].any()
        assert torch.isfinite(grad).all()
    nothing = run(d, a, patch_valid=torch.zeros(2, 3, 12, dtype=torch.bool))
    assert all(getattr(nothing, f"{name}_fraction").isfinite() for name in ("boundary", "interior", "overlap"))
    assert not any(g.any() for g in torch.autograd.grad(nothing.loss, (d, a)))
    everything = run(torch.zeros(1, 1, 2, 49), torch.zeros(1, 1, 2, 49), (7, 7))
    assert everything.interior_fraction.item() == everything.agreement.item() == 1


def test_probabilities_at_temperature_1_are_used_as_they_are():
    # Half of the mass is missing: (1/4)^2 + (3/4)^2, not (1/2)^2.
    d = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 1, 2, 2)
    maps = SSyncMaps(attention_logits=d, mask_probs=torch.full((1, 1, 2, 2), 0.25), grid=(1, 2))
    assert ssync_loss(maps, merge=False).boundary_loss.item() == pytest.approx((1 / 16 + 9 / 16) / 2)


@pytest.mark.parametrize(
    "wrong",
    [*({"merge_threshold": x} for x in (-0.1, 1.5, math.nan)), *({"temperature": x} for x in (0.0, -1.0, math.inf)),
     *({name: x} for name in ("n_bd", "n_nbd", "n_noise") for x in (-1, 12)),
     {"loss": "mse"}, {"backend": "fused"}, {"backend": None}, {"boundary_weight": -1}, {"interior_weight": math.nan}],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        run(*tensors(), **wrong)


@pytest.mark.parametrize("name", ["attention_logits", "mask_logits", "attention_probs", "mask_probs"])
def test_nan_is_refused_by_name_or_reaches_the_loss_where_it_is_not_looked_for(name):
    kind = name.split("_")[1]
    maps = dict(zip((f"attention_{kind}", f"mask_{kind}"), tensors(grad=False), strict=True))
    maps = {key: value.softmax(2) if kind == "probs" else value for key, value in maps.items()}
    maps[name][1, 2, 3, 4] = math.nan
    with pytest.raises(ShapeError, match=name):
        ssync_loss(SSyncMaps(**maps, grid=(3, 4)))
    if kind == "logits":
        out = ssync_loss(SSyncMaps(**maps, grid=(3, 4)), check_finite=False)
        assert (out.boundary_loss.isnan(), out.interior_loss.isnan()) == (name == "mask_logits", name[0] == "a")
    if name == "attention_logits":  # beside good probabilities
        probs = {key.replace("logits", "probs"): torch.rand(2, 3, 4, 12).softmax(2) for key in maps}
        with pytest.raises(ShapeError, match=name):
            ssync_loss(SSyncMaps(**maps, **probs, grid=(3, 4)))


def test_the_backend_and_the_reason_are_told_and_kernels_that_cannot_serve_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    d, a = tensors(grad=False)
    logits = SSyncMaps(d, a, grid=(3, 4))
    padded = SSyncMaps(d, a, grid=(3, 4), slot_valid=torch.ones(2, 4, dtype=torch.bool))
    for word, maps, options in (
        ("cpu", logits, {}),
        ("asked", logits, {"backend": "torch"}),
        ("temperature", logits, {"temperature": 0.5}),
        ("brier", logits, {"loss": "ce"}),
        ("valid", padded, {}),
    ):
        choice = describe_backend(maps, **options)
        assert choice.name == "torch"
        assert word in choice.reason
    for options in ({}, {"loss": "ce"}, {"temperature": 2.0}):
        with pytest.raises(ConfigError, match="backend='auto'"):
            ssync_loss(logits, backend="triton", **options)


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_soft_iou_merges_what_its_threshold_parts_from_the_rest(slots):
    generator = torch.Generator().manual_seed(slots)
    logits = torch.randn(4, 2, slots, 9, generator=generator)
    logits[:, :, 1:3] = 3 * logits[:, :, 1:2]  # nearly alike
    logits[:, :, -1:] += 0.1
    maps = SSyncMaps(attention_probs=logits.softmax(2), mask_logits=logits, grid=(3, 3))
    out = ssync_loss(maps, merge_by="soft_iou")
    for winners, probs, labels in zip(out.winners.tolist(), logits.softmax(2), out.raw_encoder_labels, strict=True):
        pairs = torch.minimum(probs[:, :, None], probs[:, None]).sum((0, 3))
        overlaps = pairs / torch.maximum(probs[:, :, None], probs[:, None]).sum((0, 3))
        order = sorted((float(overlaps[pair]) for pair in itertools.combinations(range(slots), 2)), reverse=True)
        parts = [(order[:k], order[k:]) for k in range(1, len(order))]
        spread = [len(a) * len(b) * (sum(a) / len(a) - sum(b) / len(b)) ** 2 for a, b in parts]
        threshold = parts[spread.index(max(spread))][1][0] if parts else 1.0
        count = [int((labels == slot).sum()) for slot in range(slots)]
        for group in _components(overlaps.numpy(), threshold):
            assert {winners[slot] for slot in group} == {max(sorted(group), key=count.__getitem__)}
    assert int(out.merged_slots.sum()) > 0 or slots < 3
