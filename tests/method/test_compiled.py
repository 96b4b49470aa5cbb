import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from operations import Operations
from ssync_pl.method import ssync_loss
from ssync_pl.method.maps import SSyncMaps

OUTPUTS = ("loss", "boundary_loss", "interior_loss", "encoder_labels", "decoder_labels", "boundary", "interior")
OUTPUTS += ("winners", "merged_slots", "slot_iou", "agreement", "used_encoder_slots", "overlap_fraction")
PADDED = pytest.mark.parametrize("padded", [False, True])


def inputs(padded=False, b=2, t=3, s=4, grid=(3, 4), probs=False):
    n = grid[0] * grid[1]
    d, a = (torch.randn(b, t, s, n).mul(2).requires_grad_() for _ in range(2))
    given = {"attention_logits": d, "mask_logits": a, "grid": grid}
    if padded:
        slot_valid, patch_valid = torch.ones(b, s, dtype=torch.bool), torch.ones(b, t, n, dtype=torch.bool)
        slot_valid[:, -1] = patch_valid[:, :, 0] = False
        given |= {"slot_valid": slot_valid, "patch_valid": patch_valid}
        given["frame_index"] = torch.arange(t).mul(2).expand(b, t)
    if probs:
        given |= {"attention_probs": d.softmax(2), "mask_probs": a.softmax(2)}
    return given


def step(given, **options):
    out = ssync_loss(SSyncMaps(**given), **options)
    return tuple(getattr(out, name) for name in OUTPUTS)


def gradients(outputs, given):
    return torch.autograd.grad(outputs[0], (given["attention_logits"], given["mask_logits"]), retain_graph=True)


CASES = [("eager", {}, {}), ("eager", {"probs": True}, {"loss": "ce", "temperature": 0.5})]
CASES += [("aot_eager", {"padded": True}, {})]


@pytest.mark.parametrize(("backend", "kind", "options"), CASES)
def test_compiled_in_one_graph_equals_eager(backend, kind, options):
    torch._dynamo.reset()
    given = inputs(**kind)
    got = torch.compile(step, fullgraph=True, backend=backend, dynamic=False)(given, **options)
    expected = step(given, **options)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    one, other = (gradients(outputs, given) for outputs in (expected, got))
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"loss": "ce", "n_bd": 3, "temperature": 0.5}, {"merge": False}], ids=str)
@PADDED
def test_no_shape_and_no_branch_depends_on_data(options, padded):
    # Fake tensors hold no values: anything that reads one, or selects by a mask, raises here.
    with FakeTensorMode():
        given = inputs(padded)
        out = step(given, **options)
        assert out[0].shape == ()
        assert out[OUTPUTS.index("encoder_labels")].shape == (2, 3, 3, 4)
        assert out[OUTPUTS.index("winners")].shape == (2, 4)
        assert all(g.shape == (2, 3, 4, 12) for g in gradients(out, given))


def ops(padded=False, **sizes):
    given = inputs(padded, **sizes)
    with Operations() as counter:
        step(given)[0].backward()
    return counter.counts.total()


@PADDED
def test_the_number_of_operators_does_not_grow(padded):
    base = ops(padded)
    assert base < 450
    for sizes in ({"b": 1}, {"b": 7}, {"t": 2}, {"t": 9}, {"grid": (6, 5)}, {"b": 5, "t": 6, "grid": (2, 9)}):
        assert ops(padded, **sizes) == base, sizes
    # Only the closure of the graph may grow with the slots, by a few operators each time they double.
    counts = {s: ops(padded, s=s) for s in (4, 8, 16, 32)}
    for s in (4, 8, 16):
        assert abs(counts[2 * s] - counts[s]) <= 8, counts
