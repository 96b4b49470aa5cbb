"""What holds around `ssync_loss` as an autograd function, and which backend runs."""

import pytest
import torch
from ssync_cases import run, tensors
from torch.autograd import forward_ad

from ssync_pl.errors import ConfigError
from ssync_pl.method import describe_backend, ssync_loss
from ssync_pl.method.maps import SSyncMaps


def maps_of(d, a, grid=(3, 4), **extra):
    return SSyncMaps(attention_logits=d, mask_logits=a, grid=grid, **extra)


@pytest.mark.parametrize(("shape", "grid"), [((1, 256, 8, 64), (8, 8)), ((1, 1, 300, 36), (6, 6))])
def test_long_clips_and_many_slots(shape, grid):
    d, a = tensors(0, shape)
    out = run(d, a, grid)
    out.loss.backward()
    assert out.loss.isfinite()
    assert torch.equal(out.raw_encoder_labels.flatten(2), d.detach().argmax(2))
    assert len(out.raw_encoder_labels.unique()) > 5


def test_sides_of_different_precision():
    d, a = tensors(0, grad=False)
    expected = run(d.double(), a.double())
    for other in (d.double(), d.bfloat16()):
        out = run(other, a)
        assert torch.equal(out.encoder_labels, expected.encoder_labels)
        torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)])
def test_gradient_of_one_side_or_none(wants):
    both = tensors()
    expected = torch.autograd.grad(run(*both).loss, both)
    leaves = [x.detach().requires_grad_(want) for x, want in zip(both, wants, strict=True)]
    loss = run(*leaves).loss
    assert loss.requires_grad == any(wants)
    if any(wants):
        loss.backward()
    for leaf, want, gradient in zip(leaves, wants, expected, strict=True):
        assert (leaf.grad is not None) == want
        assert not want or torch.equal(leaf.grad, gradient)


def test_a_retained_graph_gives_the_same_gradients_again():
    leaves = tensors()
    loss = run(*leaves).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(one, two)


def test_inputs_may_be_changed_before_the_backward_pass():
    leaves = tensors()
    expected = torch.autograd.grad(run(*leaves).loss, leaves)
    inner = [x * 1.0 for x in leaves]
    loss = run(*inner).loss
    for x in inner:
        x.zero_()
    for one, two in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert torch.equal(one, two)


def test_second_derivatives():
    leaves = tensors(dtype=torch.float64)
    grads = torch.autograd.grad(run(*leaves, n_nbd=9).loss, leaves, create_graph=True)
    assert all(g.any() for g in torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))


def test_transforms_of_functions():
    d, a = tensors()
    expected = torch.autograd.grad(run(d, a).loss, d)[0]
    d, a = d.detach(), a.detach()
    torch.testing.assert_close(torch.func.grad(lambda x: run(x, a).loss)(d), expected)
    direction = torch.ones_like(d)
    direction[:, :, 0] = 2.0
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(run(forward_ad.make_dual(d, direction), a).loss).tangent
    torch.testing.assert_close(slope, (expected * direction).sum(), rtol=1e-4, atol=1e-7)


def test_losses_may_be_added_to_in_place():
    d, a = tensors()
    expected = torch.autograd.grad(run(d, a).loss + d.square().mean(), (d, a))
    loss = run(d, a).loss
    loss += d.square().mean()
    for one, two in zip(torch.autograd.grad(loss, (d, a)), expected, strict=True):
        torch.testing.assert_close(one, two)


def test_nan_reaches_the_loss_where_it_is_not_looked_for():
    d, a = tensors(grad=False)
    a[1, 2, 3, 4] = float("nan")
    out = ssync_loss(maps_of(d, a), check_finite=False)
    assert out.boundary_loss.isnan()
    assert out.interior_loss.isfinite()


# --- which backend runs ---


def test_the_backend_and_the_reason_are_told(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    d, a = tensors(grad=False)
    logits = maps_of(d, a)
    padded = maps_of(d, a, slot_valid=torch.ones(2, 4, dtype=torch.bool))
    reasons = {
        "cpu": describe_backend(logits),
        "asked": describe_backend(logits, backend="torch"),
        "temperature": describe_backend(logits, temperature=0.5),
        "brier": describe_backend(logits, loss="ce"),
        "valid": describe_backend(padded),
    }
    for word, choice in reasons.items():
        assert choice.name == "torch"
        assert word in choice.reason


@pytest.mark.parametrize("options", [{}, {"loss": "ce"}, {"temperature": 2.0}])
def test_kernels_that_cannot_serve_are_refused(options, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="backend='auto'"):
        run(*tensors(), backend="triton", **options)


@pytest.mark.parametrize("backend", ["fused", "plain", None])
def test_unknown_backends_are_refused(backend):
    with pytest.raises(ConfigError, match="`backend`"):
        run(*tensors(), backend=backend)
