"""Decoders and pixel networks against their definitions, and the lean order of computation against the plain one."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, remove_weight_norm, weight_norm

from ssync_pl.hosts.nn import decoders
from ssync_pl.hosts.nn.decoders import MLPDecoder, RelativeMixtureDecoder


def test_slots_that_do_not_exist_get_no_gradient() -> None:
    slots, valid = torch.randn(2, 1, 3, 6, requires_grad=True), torch.tensor([[[True] * 3], [[True, False, True]]])
    out = RelativeMixtureDecoder(4, 6, 3, hidden=(8, 7))(slots, torch.randn(2, 1, 3, 4, 2), valid)
    assert torch.equal(torch.autograd.grad(out.reconstruction.sum(), slots)[0].any(-1), valid)


@pytest.mark.parametrize("chunk_bytes", [1, 2_000, 1 << 30])
@pytest.mark.parametrize("hidden", [(9,), (9, 8), (9, 8, 8, 10)])
@pytest.mark.parametrize("kind", ["mlp", "relative"])
def test_results_and_gradients_are_those_of_the_plain_order(
    kind: str, hidden: tuple[int, ...], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_CHUNK_BYTES", {"cpu": chunk_bytes})
    decoder: Any = MLPDecoder(6, 5, hidden, 7) if kind == "mlp" else RelativeMixtureDecoder(7, 6, 5, hidden)
    decoder = decoder.double()
    given, positions = torch.randn(3, 4, 6).double(), torch.randn(3, 1, 4, 7, 2).double()
    valid = torch.tensor([[True] * 4, [True, False, True, False], [False, True, True, True]])

    def run(memory_efficient: bool) -> list[Tensor]:
        decoder.memory_efficient = memory_efficient
        decoder.zero_grad()
        slots = given.clone().requires_grad_()
        if kind == "mlp":
            features, logits = (decoder(slots)[key] for key in ("reconstruction", "dots"))
        else:
            features, logits = decoder(slots.unsqueeze(1), positions, valid.unsqueeze(1))
        (features.square().sum() + (logits.sin() * logits).sum()).backward()
        return [features.detach(), logits.detach(), slots.grad, *(p.grad.clone() for p in decoder.parameters())]

    for lean, plain in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(lean, plain)


def test_lean_decoding_has_second_derivatives_and_compiles_to_one_graph() -> None:
    decoder, slots = MLPDecoder(6, 5, (9, 8), 7).double(), torch.randn(2, 3, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: decoder(s)["reconstruction"], slots)
    expected = decoder(slots)["reconstruction"]
    (first,) = torch.autograd.grad(expected.square().sum(), slots, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), slots)[0].any()
    decoder.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(decoder(slots)["reconstruction"], expected)


def test_half_precision_keeps_logits_in_float32() -> None:
    decoder, slots = MLPDecoder(32, 24, [128] * 3, 50), torch.randn(2, 6, 32)
    exact = decoder(slots)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = decoder(slots)
    for found in (automatic, copy.deepcopy(decoder).bfloat16()(slots.bfloat16())):
        assert found["dots"].dtype == torch.float32
        gap = (found["reconstruction"].float() - exact["reconstruction"]).norm() / exact["reconstruction"].norm()
        assert gap < 0.03


HOOKS = [
    (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), lambda layer: prune.remove(layer, "weight")),
    (weight_norm, remove_weight_norm),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("put", "remove"), HOOKS)
@pytest.mark.parametrize("kind", ["mlp", "relative"])
def test_weights_made_by_hooks_are_trained_and_used(kind: str, put: Any, remove: Any) -> None:
    decoder: Any = MLPDecoder(6, 5, [8, 8], 7) if kind == "mlp" else RelativeMixtureDecoder(7, 6, 5, [8, 8])
    given = [torch.randn(2, 3, 6)]
    if kind == "relative":
        given = [given[0].unsqueeze(1), torch.randn(2, 1, 3, 7, 2), torch.ones(2, 1, 3, dtype=torch.bool)]

    def decode() -> Tensor:
        output = decoder(*given)
        return output["reconstruction"] if kind == "mlp" else output.reconstruction

    layers = [part for part in decoder.modules() if isinstance(part, nn.Linear)]
    for layer in layers:
        put(layer)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    for _ in range(2):  # a weight that is left from an earlier step belongs to a graph that is gone
        optimizer.zero_grad()
        decode().square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    decoder.eval()
    trained = decode()
    for layer in layers:  # the same weights without hooks, along the lean path
        remove(layer)
    torch.testing.assert_close(decode(), trained, rtol=1e-4, atol=1e-5)
