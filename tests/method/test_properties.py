"""What must hold whatever the reference says: invariances, precision, padding, bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ssync_cases import Case, logits_of_kind, run, tensors

from ssync_pl.errors import SSyncError
from ssync_pl.method import ssync_loss
from ssync_pl.method.maps import SSyncMaps

QUIET = {"deadline": None, "derandomize": True}
REFUSED = (SSyncError, ValueError, TypeError)


# --- invariances ---


@settings(max_examples=25, **QUIET)
@given(seed=st.integers(0, 2**32 - 1), s=st.integers(2, 8), merge=st.booleans())
def test_permuting_slots_permutes_labels(seed, s, merge):
    rng = np.random.default_rng(seed)
    # Distinct logits and areas that differ: else the lowest index decides, which a permutation changes.
    d = logits_of_kind(rng, "copies", 2, 2, s, (4, 5)) + rng.random((2, 2, s, 20)) / 64
    a = logits_of_kind(rng, "blobs", 2, 2, s, (4, 5)) + rng.random((2, 2, s, 20)) / 64
    order = rng.permutation(s)
    options = {"merge": merge, "merge_threshold": 0.5123}
    first = ssync_loss(Case(d, a, (4, 5)).maps(), **options)
    second = ssync_loss(Case(d[:, :, order], a[:, :, order], (4, 5)).maps(), **options)
    back = torch.tensor(order)
    assert torch.equal(first.raw_encoder_labels, back[second.raw_encoder_labels])
    assert torch.equal(first.raw_decoder_labels, back[second.raw_decoder_labels])
    assert torch.equal(first.boundary, second.boundary)
    assert torch.equal(first.interior, second.interior)
    assert torch.equal(first.merged_slots, second.merged_slots)
    if merge:
        torch.testing.assert_close(first.slot_iou[:, order][:, :, order], second.slot_iou, atol=1e-6, rtol=0)
    areas = [[(first.raw_encoder_labels[b] == i).sum().item() for i in range(s)] for b in range(2)]
    tied = any(
        areas[b][i] == areas[b][j] and first.winners[b, i] == first.winners[b, j]
        for b in range(2)
        for i in range(s)
        for j in range(i)
    )
    if not tied:
        assert torch.equal(first.encoder_labels, back[second.encoder_labels])
        assert torch.equal(first.decoder_labels, back[second.decoder_labels])
        torch.testing.assert_close(first.loss, second.loss)


@settings(max_examples=25, **QUIET)
@given(seed=st.integers(0, 2**32 - 1), loss=st.sampled_from(["brier", "ce"]))
def test_a_constant_over_the_slots_of_a_patch_changes_nothing(seed, loss):
    d, a = tensors(seed, grad=False)
    shift = torch.randint(-64, 65, (2, 3, 1, 12), generator=torch.Generator().manual_seed(seed)) / 8
    # Merging compares one slot's logits across patches, so the encoder is shifted with merging off.
    first = run(d, a, merge=False, loss=loss)
    second = run(d + shift, a - shift, merge=False, loss=loss)
    assert torch.equal(first.encoder_labels, second.encoder_labels)
    assert torch.equal(first.boundary, second.boundary)
    torch.testing.assert_close(first.loss, second.loss, rtol=2e-6, atol=0)
    first, second = run(d, a, loss=loss), run(d, a + shift, loss=loss)
    assert torch.equal(first.winners, second.winners)
    torch.testing.assert_close(first.loss, second.loss, rtol=2e-6, atol=0)


def test_videos_do_not_touch_each_other():
    d, a = tensors(2)
    both = run(d, a)
    single = [run(d[b : b + 1], a[b : b + 1]) for b in range(2)]
    for name in ("encoder_labels", "decoder_labels", "boundary", "interior", "winners"):
        assert torch.equal(getattr(both, name), torch.cat([getattr(x, name) for x in single]))
    # One mean over the selected patches of the whole batch, not a mean over videos.
    expected = sum(x.boundary_loss * x.boundary_count for x in single) / both.boundary_count
    torch.testing.assert_close(both.boundary_loss, expected)


def test_mirrored_clip_gives_mirrored_regions():
    d, a = tensors(3, (1, 3, 4, 12), grad=False)
    options = {"n_bd": 4, "n_nbd": 6, "n_noise": 2, "merge_threshold": 0.3}
    first = run(d, a, **options)

    def mirror(x):
        return x.unflatten(-1, (3, 4)).flip(1, 3, 4).flatten(-2)

    second = run(mirror(d), mirror(a), **options)
    for name in ("encoder_labels", "decoder_labels", "boundary", "interior"):
        assert torch.equal(getattr(first, name).flip(1, 2, 3), getattr(second, name)), name


def test_weights_scale_the_two_terms():
    d, a = tensors(5)
    out = run(d, a, boundary_weight=0.25, interior_weight=3.0)
    plain = run(d, a)
    torch.testing.assert_close(out.boundary_loss, plain.boundary_loss)
    torch.testing.assert_close(out.loss, 0.25 * plain.boundary_loss + 3 * plain.interior_loss)


# --- gradients and precision ---


@pytest.mark.parametrize("loss", ["brier", "ce"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("probs", [False, True])
def test_gradcheck(loss, temperature, probs):
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn((1, 2, 3, 4), generator=generator, dtype=torch.float64) for _ in range(2)]
    if probs:
        pair = [x.softmax(2) for x in pair]
    pair = [x.requires_grad_() for x in pair]
    names = ("attention_probs", "mask_probs") if probs else ("attention_logits", "mask_logits")
    valid = torch.tensor([[True, False, True]])

    def losses(x, y):
        maps = SSyncMaps(**dict(zip(names, (x, y), strict=True)), grid=(2, 2), slot_valid=valid)
        out = ssync_loss(maps, n_nbd=5, loss=loss, temperature=temperature)
        return out.boundary_loss, out.interior_loss

    boundary, interior = losses(*pair)
    assert boundary.dtype == torch.float64
    assert boundary.item() > 0
    assert interior.item() > 0
    assert torch.autograd.gradcheck(losses, pair)


def test_bfloat16_input_is_computed_in_float32():
    d, a = tensors(6, dtype=torch.bfloat16)
    out = run(d, a)
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    wide = [x.detach().float().requires_grad_() for x in (d, a)]
    expected = run(*wide)
    expected.loss.backward()
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.encoder_labels, expected.encoder_labels)
    for x, y in zip((d, a), wide, strict=True):
        assert x.grad.dtype == torch.bfloat16
        assert torch.equal(x.grad, y.grad.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    d, a = tensors(8, dtype=dtype)
    out = run(d, a)
    grads = torch.autograd.grad(out.loss, (d, a))
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(d, a)
    assert inside.loss.dtype == torch.float32
    assert torch.equal(out.loss, inside.loss)
    assert torch.equal(out.slot_iou, inside.slot_iou)
    assert torch.equal(out.winners, inside.winners)
    for x, y in zip(grads, torch.autograd.grad(inside.loss, (d, a)), strict=True):
        assert torch.equal(x, y)


def test_integers_beyond_bfloat16_are_not_rounded_under_autocast():
    # 257 and 256 are one number in bfloat16: areas and overlaps counted there would tie.
    d = torch.zeros(1, 1, 2, 600)
    d[0, 0, 0, :299], d[0, 0, 1, 2:] = 2.0, 1.0
    with torch.autocast("cpu", torch.bfloat16):
        out = run(d, d.clone(), grid=(20, 30), merge_threshold=0.4)
    area = [(out.raw_encoder_labels == i).sum().item() for i in range(2)]
    assert area == [299, 301]
    assert out.slot_iou[0, 0, 1].item() == pytest.approx(297 / 600, abs=1e-6)
    assert out.winners.tolist() == [[1, 1]]


def test_large_logits_stay_finite():
    d, a = tensors(9, grad=False)
    for loss in ("brier", "ce"):
        d2, a2 = (d * 1e4).requires_grad_(), (a * 1e4).requires_grad_()
        out = run(d2, a2, loss=loss)
        out.loss.backward()
        assert torch.isfinite(out.loss)
        assert torch.isfinite(d2.grad).all()
        assert torch.isfinite(a2.grad).all()


def test_labels_carry_no_gradient_and_inputs_stay_as_they_are():
    d, a = tensors(10)
    before = [d.detach().clone(), a.detach().clone()]
    out = run(d, a)
    out.loss.backward()
    assert torch.equal(d, before[0])
    assert torch.equal(a, before[1])
    assert out.loss.requires_grad or out.loss.grad_fn is not None
    for name in ("encoder_labels", "boundary", "winners", "slot_iou", "agreement", "used_encoder_slots"):
        assert not getattr(out, name).requires_grad


# --- padding ---


@pytest.mark.parametrize("loss", ["brier", "ce"])
@pytest.mark.parametrize("filler", [-math.inf, 1e30, -1e30])
def test_the_content_of_invalid_slots_does_not_matter(loss, filler):
    valid = torch.tensor([[True, False, True, True], [True, True, True, False]])
    d, a = tensors(13, grad=False)
    expected_in = [x.clone().requires_grad_() for x in (d, a)]
    expected = run(*expected_in, slot_valid=valid, loss=loss)
    expected.loss.backward()
    hole = ~valid[:, None, :, None].expand_as(d)
    filled = [x.masked_fill(hole, filler).requires_grad_() for x in (d, a)]
    out = run(*filled, slot_valid=valid, loss=loss)
    out.loss.backward()
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.slot_iou, expected.slot_iou)
    for x, y in zip(filled, expected_in, strict=True):
        assert torch.equal(x.grad, y.grad)
        assert not x.grad[hole].any()


def test_invalid_slots_equal_a_smaller_model():
    d, a = tensors(14, (2, 3, 4, 12))
    whole = run(d, a, merge_threshold=0.4)
    wide = [torch.cat([x.detach(), torch.randn(2, 3, 2, 12) * 9], dim=2).requires_grad_() for x in (d, a)]
    valid = torch.tensor([True] * 4 + [False] * 2).expand(2, 6)
    padded = run(*wide, slot_valid=valid, merge_threshold=0.4)
    torch.testing.assert_close(padded.loss, whole.loss)
    assert torch.equal(padded.encoder_labels, whole.encoder_labels)
    assert torch.equal(padded.winners[:, :4], whole.winners)
    assert torch.equal(padded.merged_slots, whole.merged_slots)


@pytest.mark.parametrize("filler", [1e30, -1e30, 0.0])
def test_the_content_of_invalid_patches_does_not_matter(filler):
    d, a = tensors(15, grad=False)
    valid = torch.rand((2, 3, 12), generator=torch.Generator().manual_seed(15)) < 0.7
    expected_in = [x.clone().requires_grad_() for x in (d, a)]
    expected = run(*expected_in, patch_valid=valid)
    expected.loss.backward()
    hole = ~valid[:, :, None].expand_as(d)
    filled = [x.masked_fill(hole, filler).requires_grad_() for x in (d, a)]
    out = run(*filled, patch_valid=valid)
    out.loss.backward()
    assert torch.equal(out.boundary, expected.boundary)
    assert torch.equal(out.interior, expected.interior)
    assert torch.equal(out.slot_iou, expected.slot_iou)
    assert torch.equal(out.winners, expected.winners)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.agreement, expected.agreement)
    for x, y in zip(filled, expected_in, strict=True):
        assert torch.equal(x.grad, y.grad)


def test_no_valid_patch_at_all_is_zero():
    d, a = tensors(16)
    out = run(d, a, patch_valid=torch.zeros(2, 3, 12, dtype=torch.bool))
    out.loss.backward()
    assert out.loss.item() == 0
    assert not d.grad.any()
    assert not a.grad.any()
    for name in ("boundary_fraction", "interior_fraction", "overlap_fraction", "agreement"):
        assert math.isfinite(getattr(out, name).item()), name


def test_a_padded_video_adds_nothing_to_the_loss():
    d, a = tensors(17)
    valid = torch.ones(2, 3, 12, dtype=torch.bool)
    valid[1] = False
    torch.testing.assert_close(run(d, a, patch_valid=valid).loss, run(d[:1], a[:1]).loss)
    # Padding may also have no slots at all.
    slots = torch.ones(2, 4, dtype=torch.bool)
    slots[1] = False
    out = run(d, a, patch_valid=valid, slot_valid=slots)
    out.loss.backward()
    torch.testing.assert_close(out.loss, run(d[:1], a[:1]).loss)
    assert not d.grad[1].any()
    assert torch.isfinite(d.grad).all()


def test_empty_interior_is_zero_with_zero_gradient():
    # Every decoder patch differs from a neighbour, and one encoder label leaves no boundary: both selections are empty.
    board = torch.tensor([0, 1, 0, 1, 0, 1]).view(1, 1, 1, 6)
    a = torch.cat([1.0 - board, 1.0 * board], dim=2).requires_grad_()
    d = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1).expand(1, 1, 2, 6).clone().requires_grad_()
    for loss in ("brier", "ce"):
        out = run(d, a, (1, 6), merge=False, loss=loss)
        assert (out.boundary_count.item(), out.interior_count.item()) == (0, 0)
        grads = torch.autograd.grad(out.loss, (d, a))
        assert out.loss.item() == 0
        assert not any(g.any() for g in grads)


def test_frames_far_apart_are_images():
    d, a = tensors(19, grad=False)
    far = run(d, a, frame_index=torch.tensor([[0, 5, 10], [3, 9, 11]]), merge=False)
    images = [run(d[:, t : t + 1], a[:, t : t + 1], merge=False) for t in range(3)]
    assert torch.equal(far.boundary, torch.cat([x.boundary for x in images], dim=1))
    assert torch.equal(far.interior, torch.cat([x.interior for x in images], dim=1))
