"""The direct path equals the plain one: labels, regions and counts to the bit, losses and gradients to rounding."""

import dataclasses

import numpy as np
import pytest
import torch
from ssync_cases import close_to_largest, logits_of_kind
from torch.autograd import forward_ad

from ssync_pl.errors import ConfigError, SSyncError
from ssync_pl.method import ssync_loss
from ssync_pl.method.direct import _differing
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.method.regions import count_differing_neighbours

FLOATS = ("loss", "boundary_loss", "interior_loss")
OPTIONS = [
    {},
    {"merge": False},
    {"merge_threshold": 0.2},
    {"n_bd": 3, "n_noise": 2, "n_nbd": 4},
    {"n_bd": 0, "n_noise": 0, "n_nbd": 11},
    {"n_bd": 8, "n_noise": 8},
    {"boundary_weight": 0.5, "interior_weight": 2.0},
    {"boundary_weight": 0.0},
]


def clip(b=2, t=3, s=5, grid=(6, 7), dtype=torch.float32, kind="copies", seed=0):
    rng = np.random.default_rng(seed)
    return [torch.tensor(logits_of_kind(rng, kind, b, t, s, grid), dtype=dtype) for _ in range(2)]


def blobs(b, t, s, side):
    """Large clips in an instant: bumps on a grid, and noise."""
    generator = torch.Generator().manual_seed(s)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    pair = []
    for _ in range(2):
        centre = torch.rand(b, 1, s, 1, 2, generator=generator) * side
        scores = 4 - (place - centre).abs().sum(-1) / 3
        pair.append(scores + torch.rand(b, t, s, side * side, generator=generator))
    return pair


def evaluate(d, a, grid, path, wants=(True, True), **options):
    leaves = [x.detach().requires_grad_(want) for x, want in zip((d, a), wants, strict=True)]
    out = ssync_loss(SSyncMaps(*leaves, grid=grid), path=path, **options)
    if any(wants):
        out.loss.backward()
    return out, [leaf.grad for leaf in leaves]


def equal(d, a, grid, path="direct", **options):
    expected, theirs = evaluate(d, a, grid, "plain", **options)
    got, ours = evaluate(d, a, grid, path, **options)
    eps = torch.finfo(d.dtype).eps
    for field in dataclasses.fields(expected):
        x, y = getattr(got, field.name), getattr(expected, field.name)
        if y is None:
            assert x is None
            continue
        assert x.dtype == y.dtype, field.name
        assert x.shape == y.shape, field.name
        if field.name in FLOATS:
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)
        else:
            assert torch.equal(x, y), field.name
    for x, y in zip(ours, theirs, strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            close_to_largest(x.double().numpy(), y.double().numpy(), 2e-6 + eps, floor=1e-9)
    return got


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["copies", "integers"])
def test_options(options, kind):
    equal(*clip(kind=kind), (6, 7), **options)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("t", [1, 2])
def test_small_grids(grid, t):
    equal(*clip(t=t, grid=grid, s=3), grid, n_bd=2, n_nbd=3)


@pytest.mark.parametrize(("b", "t", "s", "side"), [(1, 256, 8, 16), (1, 2, 32, 64), (2, 1, 1, 4), (1, 1, 300, 6)])
def test_sizes(b, t, s, side):
    out = equal(*blobs(b, t, s, side), (side, side))
    assert out.raw_encoder_labels.max() < s
    if s > 256:
        assert len(out.raw_encoder_labels.unique()) > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precisions(dtype):
    d, a = clip(dtype=dtype)
    out = equal(d, a, (6, 7))
    assert out.loss.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_one_side_in_half_precision():
    d, a = clip()
    got = equal(d.bfloat16(), a, (6, 7))
    assert got.loss.dtype == torch.float32


def test_sides_of_different_precision_are_served_by_the_plain_path_only():
    d, a = clip()
    maps = SSyncMaps(d.double(), a, grid=(6, 7))
    assert ssync_loss(maps).loss.isfinite()
    with pytest.raises(ConfigError, match="that the path 'direct' serves"):
        ssync_loss(maps, path="direct")


def test_strides():
    d, a = clip()
    strided = d.transpose(2, 3).contiguous().transpose(2, 3)
    wider = torch.zeros(2, 6, 5, 50)[:, ::2, :, 2:44]
    wider.copy_(a)
    assert not strided.is_contiguous()
    assert not wider.is_contiguous()
    equal(strided, wider, (6, 7))
    equal(d[:, :1].expand(2, 3, 5, 42), a[:1, :1].expand(2, 3, 5, 42), (6, 7))


@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)])
def test_gradient_of_one_side_or_none(wants):
    out = equal(*clip(), (6, 7), wants=wants)
    assert out.loss.requires_grad == any(wants)


def test_no_grad():
    d, a = (x.requires_grad_() for x in clip())
    with torch.no_grad():
        out = ssync_loss(SSyncMaps(d, a, grid=(6, 7)), path="direct")
    assert not out.loss.requires_grad
    assert torch.equal(out.loss, ssync_loss(SSyncMaps(d, a, grid=(6, 7)), path="direct").loss.detach())


def test_one_loss_at_a_time_and_a_weight():
    d, a = clip()
    for name, side in (("interior_loss", 0), ("boundary_loss", 1)):
        grads = []
        for path in ("plain", "direct"):
            leaves = [x.clone().requires_grad_() for x in (d, a)]
            getattr(ssync_loss(SSyncMaps(*leaves, grid=(6, 7)), path=path), name).mul(-3.0).backward()
            assert leaves[1 - side].grad is None or not leaves[1 - side].grad.any()
            grads.append(leaves[side].grad)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-8)


def test_a_retained_graph_gives_the_same_gradients_again():
    leaves = [x.requires_grad_() for x in clip()]
    loss = ssync_loss(SSyncMaps(*leaves, grid=(6, 7)), path="direct").loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    for g, k in zip(torch.autograd.grad(loss, leaves), kept, strict=True):
        assert torch.equal(g, k)


def test_inputs_may_be_changed_before_the_backward_pass():
    leaves = [x.requires_grad_() for x in clip()]
    inner = [x * 1.0 for x in leaves]
    expected = torch.autograd.grad(ssync_loss(SSyncMaps(*inner, grid=(6, 7)), path="direct").loss, leaves)
    inner = [x * 1.0 for x in leaves]
    loss = ssync_loss(SSyncMaps(*inner, grid=(6, 7)), path="direct").loss
    for x in inner:
        x.zero_()
    for g, k in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert torch.equal(g, k)


def test_a_second_derivative_is_refused_and_the_plain_path_has_it():
    def curvature(path):
        leaves = [x.requires_grad_() for x in clip(dtype=torch.float64)]
        out = ssync_loss(SSyncMaps(*leaves, grid=(6, 7)), path=path)
        grads = torch.autograd.grad(out.loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    assert all(g.any() for g in curvature("plain"))
    for path in ("direct", "auto"):
        with pytest.raises(SSyncError, match=r"a second one, through its gradients\. Pass `path='plain'`"):
            curvature(path)


def test_transforms_of_functions_take_the_plain_path():
    d, a = clip()

    def loss(x):
        return ssync_loss(SSyncMaps(x, a, grid=(6, 7))).loss

    _, (expected, _) = evaluate(d, a, (6, 7), "direct")
    torch.testing.assert_close(torch.func.grad(loss)(d), expected, rtol=1e-4, atol=1e-8)
    direction = torch.ones_like(d)
    direction[:, :, 0] = 2.0
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(loss(forward_ad.make_dual(d, direction))).tangent
    torch.testing.assert_close(slope, (expected * direction).sum(), rtol=1e-4, atol=1e-7)


def test_a_module_that_calls_it_compiles():
    class Host(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.5))

        def forward(self, d, a):
            return ssync_loss(SSyncMaps(d * self.scale, a * self.scale, grid=(6, 7))).loss

    torch._dynamo.reset()
    d, a = clip()
    host = Host()
    values = []
    for step in (host, torch.compile(host, backend="aot_eager", fullgraph=True, dynamic=False)):
        loss = step(d, a)
        (grad,) = torch.autograd.grad(loss, host.scale)
        values.append((loss.detach(), grad))
    torch.testing.assert_close(values[1], values[0])


def test_nan_is_refused_or_reaches_the_loss():
    d, a = clip()
    a[1, 2, 3, 4] = float("nan")
    maps = SSyncMaps(d, a, grid=(6, 7))
    with pytest.raises(ValueError, match="`mask_logits` to be finite"):
        ssync_loss(maps, path="direct")
    out = ssync_loss(maps, path="direct", check_finite=False)
    assert out.boundary_loss.isnan()
    assert out.interior_loss.isfinite()


def test_it_is_taken_by_itself_where_it_serves():
    d, a = (x.requires_grad_() for x in clip())
    maps = SSyncMaps(d, a, grid=(6, 7))
    assert "DirectBlock" in ssync_loss(maps).interior_loss.grad_fn.name()
    for other in ({"temperature": 0.5}, {"loss": "ce"}, {"path": "plain"}):
        assert "DirectBlock" not in ssync_loss(maps, **other).interior_loss.grad_fn.name()


@pytest.mark.parametrize("path", ["direct", "compiled", "fused"])
def test_what_a_path_cannot_serve_is_refused(path):
    d, a = clip()
    with pytest.raises(ConfigError, match=f"that the path '{path}' serves"):
        ssync_loss(SSyncMaps(d, a, grid=(6, 7)), loss="ce", path=path)
    with pytest.raises(ConfigError, match="that the path"):
        ssync_loss(SSyncMaps(d, a, grid=(6, 7), slot_valid=torch.ones(2, 5, dtype=torch.bool)), path=path)


def test_unknown_paths_are_refused():
    d, a = clip()
    with pytest.raises(ConfigError, match=r"`path` to be one of \('auto', .*'fused'\), but got 'fast'"):
        ssync_loss(SSyncMaps(d, a, grid=(6, 7)), path="fast")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 4), (2, 2, 5, 1), (3, 4, 6, 5)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_neighbours_as_one_view_equal_neighbours_one_by_one(shape, dtype):
    labels = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(_differing(labels).long(), count_differing_neighbours(labels))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled(dtype):
    for grid, s in (((6, 7), 5), ((3, 3), 1)):
        d, a = clip(grid=grid, s=s, dtype=dtype)
        for options in OPTIONS:
            equal(d, a, grid, "compiled", **options)
    d, a = clip(dtype=dtype, kind="integers")
    for wants in ((True, False), (False, True), (False, False)):
        equal(d, a, (6, 7), "compiled", wants=wants)


def test_compiled_stages_equal_the_eager_ones():
    # What the compiler is given, run as it stands: the compiled path itself is among the slow tests.
    from ssync_pl.method import compiled
    from ssync_pl.method.direct import EAGER

    d, a = clip(kind="integers", dtype=torch.float64)
    probs = torch.stack([a, d]).softmax(3)
    scratch = [torch.empty_like(probs) for _ in range(2)]
    labels = EAGER.labels(probs, scratch[0])
    assert torch.equal(compiled._first_of_largest(probs), labels)
    weight = (labels.flip(0) > 1).double()
    share = torch.tensor([0.5, 0.25], dtype=torch.float64)
    got = compiled._scores_and_gradients(probs, scratch[0], labels.flip(0), weight, share)
    expected = EAGER.losses(probs.clone(), scratch[1], labels.flip(0), weight.clone(), share, (True, True))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(scratch[0], scratch[1])
