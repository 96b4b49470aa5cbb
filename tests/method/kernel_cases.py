"""Cases of the kernels; `test_kernels.py` runs them through Triton's interpreter, `-m gpu` on a device."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from ssync_cases import logits_of_kind

from ssync_pl.errors import ConfigError
from ssync_pl.method import describe_backend, loss, ssync_loss
from ssync_pl.method.maps import SSyncMaps

LABELS = ("encoder_labels", "decoder_labels", "raw_encoder_labels", "raw_decoder_labels", "winners", "merged_slots")
REGIONS = ("boundary", "interior", "boundary_count", "interior_count", "boundary_fraction", "interior_fraction")
EXACT = (*LABELS, *REGIONS, "overlap_fraction", "agreement", "used_encoder_slots", "used_decoder_slots")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def clip(shape, dtype=torch.float32, seed=0, kind="copies"):
    """Two maps, whose entries are multiples of 1/64, so that means are exact."""
    rng, (b, t, s, *grid) = np.random.default_rng(seed), shape
    return [torch.tensor(logits_of_kind(rng, kind, b, t, s, grid)).to(DEVICE, dtype) for _ in range(2)]


def maps_of(d, a, grid):
    leaves = [x.detach().requires_grad_() for x in (d, a)]
    return leaves, SSyncMaps(*leaves, grid=grid)


def check(d, a, grid, **options):
    results = []
    for backend in ("torch", "triton"):
        leaves, maps = maps_of(d, a, grid)
        output = ssync_loss(maps, backend=backend, **options)
        results.append((output, torch.autograd.grad(output.loss, leaves)))
    (plain, expected), (fused, got) = results
    close = {"loss": (2e-6, 1e-8), "boundary_loss": (2e-6, 1e-8), "interior_loss": (2e-6, 1e-8), "slot_iou": (0, 2e-6)}
    for name, (rtol, atol) in {**dict.fromkeys(EXACT, (0, 0)), **close}.items():
        torch.testing.assert_close([getattr(fused, name)], [getattr(plain, name)], rtol=rtol, atol=atol, msg=name)
    eps = torch.finfo(d.dtype).eps
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        largest = theirs.abs().max().float()
        assert (ours.float() - theirs.float()).abs().max() <= max(4e-6, 2 * eps) * largest + 8 * eps * 1e-6
    return plain


OPTIONS = [
    {"merge": False},
    {"merge_threshold": 0.0},
    {"merge_threshold": 0.4},
    {"n_bd": 3, "n_noise": 2, "n_nbd": 4},
    {"n_bd": 0, "n_noise": 0, "n_nbd": 11},
    {"boundary_weight": 0.0, "interior_weight": 2.0},
]


@pytest.mark.parametrize(
    ("shape", "kind", "options"),
    [
        *((shape, "integers", {}) for shape in ((1, 1, 1, 1, 1), (1, 2, 2, 2, 3), (2, 3, 5, 6, 7), (1, 2, 11, 12, 12))),
        *((shape, "copies", {}) for shape in ((2, 1, 16, 5, 5), (1, 1, 17, 9, 9), (1, 1, 64, 9, 9))),
        *(((1, 3, 6, 7, 5), "copies", options) for options in OPTIONS),
    ],
)
def case_shapes_ties_and_options(shape, kind, options):
    check(*clip(shape, seed=3, kind=kind), shape[3:], **options)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def case_half_precision_of_one_side_or_both(dtypes):
    check(*(x.to(dtype) for x, dtype in zip(clip((1, 2, 6, 5, 5), torch.bfloat16), dtypes, strict=True)), (5, 5))


def case_strides():
    d, a = clip((2, 2, 5, 6, 6))
    strided = d.transpose(2, 3).contiguous().transpose(2, 3)
    wider = torch.zeros(2, 4, 5, 40, device=d.device)[:, ::2, :, 2:38]
    wider.copy_(a)
    assert not strided.is_contiguous()
    assert not wider.is_contiguous()
    check(strided, wider, (6, 6))
    check(d[:, :1].expand(2, 3, 5, 36), a[:1, :1].expand(2, 3, 5, 36), (6, 6))


def case_more_slots_than_the_kernels_hold():
    _, maps = maps_of(*clip((1, 1, 65, 4, 4)), (4, 4))
    assert describe_backend(maps).name == "torch"
    with pytest.raises(ConfigError, match="64 slots"):
        ssync_loss(maps, backend="triton")
    assert ssync_loss(maps).winners.shape == (1, 65)


def one_loss(name):
    def differentiate(leaves, output):
        grads = torch.autograd.grad(getattr(output, name).mul(3.0), leaves, allow_unused=True)
        return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]

    return differentiate


def second_derivatives(leaves, output):
    total = output.loss
    total += leaves[0].square().mean()  # losses may be added to in place
    first = torch.autograd.grad(total, leaves, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
    assert all(value.any() for value in second)
    return (*first, *second)


@pytest.mark.parametrize("differentiate", [one_loss("boundary_loss"), one_loss("interior_loss"), second_derivatives])
def case_ways_to_differentiate(differentiate):
    results = []
    for backend in ("torch", "triton"):
        leaves, maps = maps_of(*clip((1, 2, 4, 6, 6)), (6, 6))
        results.append([*differentiate(leaves, ssync_loss(maps, backend=backend, n_nbd=5))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("place", [(0, 0, 1, 5), (0, 0, 0, 0)])
def case_a_nan_reaches_the_loss_or_is_refused(place):
    d, a = clip((1, 1, 3, 4, 4))
    d[place] = float("nan")
    maps = SSyncMaps(d, a, grid=(4, 4))
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="`attention_logits` to be finite, but got NaN"):
            ssync_loss(maps, backend="triton")
    output = ssync_loss(maps, backend="triton", check_finite=False)
    assert output.interior_loss.isnan()
    assert output.boundary_loss.isfinite()


@pytest.mark.parametrize(("slots", "dtypes"), [(1, (torch.float32,) * 2), (20, (torch.bfloat16, torch.float32))])
def case_kernels_that_agree_are_taken(slots, dtypes):
    d, a = (torch.zeros(1, 1, slots, 4, device=DEVICE, dtype=dtype) for dtype in dtypes)
    _, maps = maps_of(d, a, (2, 2))
    assert describe_backend(maps) == ("triton", "the kernels agree with torch")
    assert "FusedBlock" in ssync_loss(maps).interior_loss.grad_fn.name()


real = loss.fused_block


def _wrong(*args, **kwargs):
    fields = list(real(*args, **kwargs))
    fields[7] = ~fields[7]
    return tuple(fields)


BROKEN = Mock(side_effect=RuntimeError("Failed to find C compiler"))


@pytest.mark.parametrize(("kernels", "reason"), [(_wrong, "differ from torch"), (BROKEN, "Failed to find C compiler")])
def case_kernels_that_fail_their_trial_are_not_taken(monkeypatch, kernels, reason):
    monkeypatch.setattr(loss, "fused_block", kernels)
    monkeypatch.setattr(loss, "_TRIALS", {})
    _, maps = maps_of(*clip((1, 1, 3, 4, 4)), (4, 4))
    with pytest.warns(UserWarning, match=reason):
        choice = describe_backend(maps)
    assert choice.name == "torch"
    assert reason in choice.reason
    assert torch.equal(ssync_loss(maps).loss, ssync_loss(maps, backend="torch").loss)
