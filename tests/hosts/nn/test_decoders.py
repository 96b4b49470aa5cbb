"""Decoders and pixel networks against their definitions, and the lean order of computation against the plain one."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, remove_weight_norm, weight_norm

from ssync_pl.hosts.nn import decoders
from ssync_pl.hosts.nn.decoders import MLPDecoder, RelativeMixtureDecoder
from ssync_pl.hosts.nn.layers import coordinate_grid, init_fan_in_
from ssync_pl.hosts.nn.pixels import ConvEncoder, SpatialBroadcastDecoder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_the_mixture_is_that_of_each_patch_by_hand(memory_efficient: bool) -> None:
    decoder = RelativeMixtureDecoder(4, 6, 3, hidden=(8, 7), memory_efficient=memory_efficient)
    slots, positions = torch.randn(2, 1, 3, 6, requires_grad=True), torch.randn(2, 1, 3, 4, 2)
    valid = torch.tensor([[[True, True, True]], [[True, False, True]]])
    out = decoder(slots, positions, valid)
    for video in range(2):
        for patch in range(4):
            given = slots[video, 0] + decoder.place[patch] + decoder.from_position(positions[video, 0, :, patch])
            hidden = decoder.mlp(decoder.first(given))
            alpha, features = decoder.to_alpha(hidden)[:, 0], decoder.to_features(hidden)
            torch.testing.assert_close(out.mask_logits[video, 0, :, patch], alpha)
            kept = valid[video, 0]
            torch.testing.assert_close(out.reconstruction[video, 0, patch], alpha[kept].softmax(0) @ features[kept])
    (grad,) = torch.autograd.grad(out.reconstruction.sum(), slots)
    assert torch.equal(grad.any(-1), valid)  # slots that do not exist get no gradient


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


def test_pixels_keep_their_places() -> None:
    grid = coordinate_grid(3, 5)  # row, then column, with complements
    assert grid[1, 4].tolist() == [0.5, 1.0, 0.5, 0.0]
    assert grid[2, 0].tolist() == [1.0, 0.0, 0.0, 1.0]
    encoder, frames = ConvEncoder([4], [2], feature_dim=5, position_scale=0.0), torch.zeros(1, 3, 8, 12)
    base = encoder(frames).features
    frames[..., 4, 10] = 1.0
    changed = (encoder(frames).features - base).abs().sum(dim=-1)[0].reshape(4, 6) > 1e-7
    # A 5 x 5 kernel of stride 2 centred on even pixels: pixel (4, 10) is seen by rows 1 to 3 and columns 4 to 5.
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1:4, 4:6] = True
    assert torch.equal(changed, expected)


def test_the_broadcast_decoder_mixes_pictures_by_masks() -> None:
    decoder, slots = SpatialBroadcastDecoder(6, [5], [2], (3, 4)), torch.randn(2, 3, 4, 6)
    out = decoder(slots)
    assert decoder.size == (6, 8)
    single = [decoder(slots[:, :, s : s + 1]) for s in range(4)]
    logits = torch.cat([one.mask_logits for one in single], dim=2)
    torch.testing.assert_close(out.mask_logits, logits)
    pictures = torch.stack([one.reconstruction for one in single], dim=2)
    torch.testing.assert_close(out.reconstruction, (pictures * logits.softmax(dim=2).unsqueeze(3)).sum(dim=2))


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


def test_fan_in_scales_each_layer() -> None:
    stack = nn.Sequential(nn.Conv2d(3, 200, 5), nn.ReLU(), nn.ConvTranspose2d(200, 50, 5, 2), nn.Conv2d(50, 400, 1))
    init_fan_in_(stack)
    spreads = [math.sqrt(2 / 75), math.sqrt(2 / (200 * 25 / 4)), math.sqrt(1 / 50)]
    assert [stack[i].weight.std().item() for i in (0, 2, 3)] == pytest.approx(spreads, rel=0.03)
    assert all((layer.bias == 0).all() for layer in stack if hasattr(layer, "bias"))
