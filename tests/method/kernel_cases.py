"""Cases of the kernels; `test_kernels.py` runs them through Triton's interpreter, `-m gpu` on a device."""

from __future__ import annotations

import pytest
import torch

from ssync_pl.errors import ConfigError
from ssync_pl.method import describe_backend, loss, ssync_loss
from ssync_pl.method.maps import SSyncMaps

INTEGERS = (
    "encoder_labels",
    "decoder_labels",
    "raw_encoder_labels",
    "raw_decoder_labels",
    "boundary",
    "interior",
    "winners",
    "merged_slots",
    "boundary_count",
    "interior_count",
    "boundary_fraction",
    "interior_fraction",
    "overlap_fraction",
    "agreement",
    "used_encoder_slots",
    "used_decoder_slots",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def clip(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0, kind: str = "blobs"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two maps of blobs that overlap, or of integers full of ties; multiples of 1/64, so that means are exact."""
    generator = torch.Generator().manual_seed(seed)
    b, t, s, h, w = shape
    pair = []
    for _ in range(2):
        if kind == "integers":
            value = torch.randint(-2, 3, (b, t, s, h * w), generator=generator).float()
        else:
            centre = torch.rand(b, 1, s, 1, 2, generator=generator) * torch.tensor([h, w])
            place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).float()
            value = 3 - (place - centre).abs().sum(-1) / 2 + 0.2 * torch.randn(b, t, s, h * w, generator=generator)
            if s > 2:
                value[:, :, 1] = value[:, :, 0] + 0.05
        pair.append((value * 64).round().div(64).to(DEVICE, dtype))
    return pair[0], pair[1]


def both(d, a, grid, weights=(1.0, 1.0), **options):
    """Outputs and gradients of the plain and the fused path."""
    results = []
    for backend in ("torch", "triton"):
        leaves = [x.detach().requires_grad_() for x in (d, a)]
        output = ssync_loss(
            SSyncMaps(attention_logits=leaves[0], mask_logits=leaves[1], grid=grid),
            boundary_weight=weights[0],
            interior_weight=weights[1],
            backend=backend,
            **options,
        )
        output.loss.backward()
        results.append((output, [leaf.grad for leaf in leaves]))
    return results


def check(d, a, grid, **options):
    (plain, expected), (fused, got) = both(d, a, grid, **options)
    for name in INTEGERS:
        ours, theirs = getattr(fused, name), getattr(plain, name)
        assert ours.shape == theirs.shape, name
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    for name in ("loss", "boundary_loss", "interior_loss"):
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=2e-6, atol=1e-8)
    if plain.slot_iou is None:
        assert fused.slot_iou is None
    else:
        torch.testing.assert_close(fused.slot_iou, plain.slot_iou, rtol=0, atol=2e-6)
    eps = torch.finfo(d.dtype).eps
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        largest = theirs.abs().max().float()
        assert (ours.float() - theirs.float()).abs().max() <= max(4e-6, 2 * eps) * largest + 8 * eps * 1e-6
    return plain


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1), (2, 3, 5, 6, 7), (1, 2, 11, 12, 12), (2, 1, 16, 5, 5), (1, 1, 17, 9, 9)],
)
def case_shapes(shape):
    check(*clip(shape, kind="integers" if shape[2] % 2 else "blobs"), shape[3:])


def case_ties():
    check(*clip((1, 2, 2, 2, 3), kind="integers"), (2, 3))


def case_many_slots():
    d, a = clip((1, 1, 64, 9, 9))
    check(d, a, (9, 9))
    d, a = clip((1, 1, 65, 4, 4))
    maps = SSyncMaps(attention_logits=d, mask_logits=a, grid=(4, 4))
    assert describe_backend(maps).name == "torch"
    with pytest.raises(ConfigError, match="64 slots"):
        ssync_loss(maps, backend="triton")
    assert ssync_loss(maps).winners.shape == (1, 65)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def case_half_precision(dtype):
    d, a = clip((1, 2, 6, 5, 5), dtype)
    # One side may be in half precision only, as under autocast.
    check(d, a if dtype == torch.float16 else a.float(), (5, 5))


def case_strides():
    d, a = clip((2, 2, 5, 6, 6))
    strided = d.transpose(2, 3).contiguous().transpose(2, 3)
    wider = torch.zeros(2, 4, 5, 40, device=d.device)[:, ::2, :, 2:38]
    wider.copy_(a)
    assert not strided.is_contiguous()
    assert not wider.is_contiguous()
    check(strided, wider, (6, 6))
    check(d[:, :1].expand(2, 3, 5, 36), a[:1, :1].expand(2, 3, 5, 36), (6, 6))


@pytest.mark.parametrize(
    "options",
    [
        {"merge": False},
        {"merge_threshold": 0.0},
        {"n_bd": 3, "n_noise": 2, "n_nbd": 4},
        {"n_bd": 0, "n_noise": 0, "n_nbd": 11},
        {"weights": (0.0, 2.0)},
    ],
)
def case_options(options):
    d, a = clip((1, 3, 6, 7, 5), seed=3)
    check(d, a, (7, 5), **options)


def case_chains_merge_transitively():
    d, a = clip((1, 2, 5, 8, 8), seed=1)
    for slot in range(1, 5):
        d[:, :, slot] = torch.roll(d[:, :, slot - 1], 1, dims=-1)
    plain = check(d, a, (8, 8), merge_threshold=0.6)
    assert int(plain.merged_slots) >= 3
    assert int((plain.slot_iou[0] < 0.6).sum()) > 0


def case_nothing_selected():
    d = torch.zeros(1, 2, 3, 16, device=DEVICE)
    d[:, :, 0] = 1.0
    (_, _), (fused, gradients) = both(d, d, (4, 4))
    assert fused.boundary_loss.item() == 0.0
    assert float(fused.boundary_count) == 0.0
    assert not gradients[1].any()


def leaves_of(d, a):
    leaves = [x.detach().requires_grad_() for x in (d, a)]
    return leaves, SSyncMaps(attention_logits=leaves[0], mask_logits=leaves[1], grid=(6, 6))


def both_gradients(differentiate):
    """What ``differentiate(leaves, maps, backend)`` gives with either backend has to agree."""
    d, a = clip((1, 2, 4, 6, 6))
    plain, fused = (differentiate(*leaves_of(d, a), backend) for backend in ("torch", "triton"))
    for ours, theirs in zip(fused, plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)
    return plain


@pytest.mark.parametrize("name", ["boundary_loss", "interior_loss"])
def case_one_loss_at_a_time(name):
    def differentiate(leaves, maps, backend):
        loss = getattr(ssync_loss(maps, backend=backend), name).mul(3.0)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]

    both_gradients(differentiate)


def case_second_derivatives():
    def differentiate(leaves, maps, backend):
        first = torch.autograd.grad(ssync_loss(maps, backend=backend, n_nbd=5).loss, leaves, create_graph=True)
        return (*first, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves))

    assert all(value.any() for value in both_gradients(differentiate))


def case_losses_may_be_added_to_in_place():
    def differentiate(leaves, maps, backend):
        total = ssync_loss(maps, backend=backend).loss
        total += leaves[0].square().mean()
        return torch.autograd.grad(total, leaves)

    both_gradients(differentiate)


@pytest.mark.parametrize("place", [(0, 0, 1, 5), (0, 0, 0, 0)])
def case_a_nan_reaches_the_loss_or_is_refused(place):
    d, a = clip((1, 1, 3, 4, 4))
    d[place] = float("nan")
    maps = SSyncMaps(attention_logits=d, mask_logits=a, grid=(4, 4))
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="`attention_logits` to be finite, but got NaN"):
            ssync_loss(maps, backend="triton")
    output = ssync_loss(maps, backend="triton", check_finite=False)
    assert output.interior_loss.isnan()
    assert output.boundary_loss.isfinite()


@pytest.mark.parametrize(("slots", "dtypes"), [(1, (torch.float32,) * 2), (20, (torch.bfloat16, torch.float32))])
def case_kernels_that_agree_are_taken(slots, dtypes):
    d, a = (torch.zeros(1, 1, slots, 4, device=DEVICE, dtype=dtype) for dtype in dtypes)
    choice = describe_backend(SSyncMaps(attention_logits=d, mask_logits=a, grid=(2, 2)))
    assert choice == ("triton", "the kernels agree with torch")


def _wrong(*args, **kwargs):
    fields = list(real(*args, **kwargs))
    fields[7] = ~fields[7]
    return tuple(fields)


def _broken(*args, **kwargs):
    raise RuntimeError("Failed to find C compiler")


real = loss.fused_block


@pytest.mark.parametrize(("kernels", "reason"), [(_wrong, "differ from torch"), (_broken, "Failed to find C compiler")])
def case_kernels_that_fail_their_trial_are_not_taken(monkeypatch, kernels, reason):
    monkeypatch.setattr(loss, "fused_block", kernels)
    monkeypatch.setattr(loss, "_TRIALS", {})
    d, a = clip((1, 1, 3, 4, 4))
    maps = SSyncMaps(attention_logits=d.requires_grad_(), mask_logits=a, grid=(4, 4))
    with pytest.warns(UserWarning, match=reason):
        choice = describe_backend(maps)
    assert choice.name == "torch"
    assert reason in choice.reason
    assert torch.equal(ssync_loss(maps).loss, ssync_loss(maps, backend="torch").loss)


def case_auto_takes_the_kernels():
    d, a = clip((1, 1, 3, 4, 4))
    output = ssync_loss(SSyncMaps(attention_logits=d.requires_grad_(), mask_logits=a, grid=(4, 4)))
    assert "FusedBlock" in output.interior_loss.grad_fn.name()
