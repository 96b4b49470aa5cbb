import copy
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import encoder_of
from torch import Tensor, nn
from torch.nn.utils import prune, remove_weight_norm, weight_norm

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn import decoders
from ssync_pl.hosts.nn.decoders import MLPDecoder, RelativeMixtureDecoder
from ssync_pl.hosts.nn.initializers import first_frame_hints, group_patches
from ssync_pl.hosts.nn.layers import fourier_code, random_windows
from ssync_pl.hosts.nn.slot_attention import SlotAttention, SlotCorrector


def test_cached_channels_are_split_and_projected_or_not() -> None:
    encoder, raw = encoder_of(feature_dim=5, similarity_dim=3), torch.randn(2, 24, 8)
    output = encoder(raw)
    assert torch.equal(output["backbone_features"], raw[..., :5])
    assert torch.equal(output["similarity_features"], raw[..., 5:])
    torch.testing.assert_close(output["features"], encoder.output_transform(raw[..., :5]))
    assert encoder.output_transform.layers[1].weight.shape == (10, 5)
    encoder, raw = encoder_of(feature_dim=5, hidden=0), raw[..., :5]
    assert torch.equal(encoder(raw)["features"], raw)
    assert torch.equal(encoder(raw)["similarity_features"], raw)
    assert encoder.output_dim == 5
    assert list(encoder.parameters()) == []


def test_hints_are_the_objects_of_the_first_frame_in_order_then_filled() -> None:
    masks = torch.zeros(2, 2, 4, 8, 10, dtype=torch.bool)
    masks[0, 0, 1, 2:4, 5:10] = masks[0, 0, 3, 0, 0] = masks[0, 1, 2] = masks[1, 0, 2, 7, 3] = True
    masks[:, :, 0] = ~masks[:, :, 1:].any(dim=2)
    boxes = first_frame_hints(masks, num_slots=4)
    torch.testing.assert_close(boxes[0, 0], torch.tensor([2 / 8, 5 / 10, 4 / 8, 1.0]))
    # Channel 2 shows up in the second frame only, so channel 3 moves up.
    torch.testing.assert_close(boxes[0, 1], torch.tensor([0, 0, 1 / 8, 1 / 10]))
    torch.testing.assert_close(boxes[1, 0], torch.tensor([7 / 8, 3 / 10, 1.0, 4 / 10]))
    assert (boxes[0, 2:] == -1).all()
    assert (boxes[1, 1:] == -1).all()
    centres = first_frame_hints(masks, num_slots=2, kind="centres")
    torch.testing.assert_close(centres[0], torch.tensor([[3 / 8, 7.5 / 10], [0.5 / 8, 0.5 / 10]]))
    assert torch.equal(first_frame_hints(masks, num_slots=1), boxes[:, :1])  # objects beyond the slots are dropped
    assert first_frame_hints(masks, 4, has_background=False)[0, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_patches_are_grouped_as_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 20, 5, generator=generator)
    features[2] = 1.0  # one group holds all
    weights = group_patches(features, 4, rounds=2)
    for frame, rows in zip(features[:2].double(), weights[:2], strict=True):
        centres = [frame[(frame - frame.mean(0)).norm(dim=1).argmax()]]
        while len(centres) < 4:
            centres.append(frame[torch.cdist(frame, torch.stack(centres)).amin(1).argmax()])
        for _ in range(3):
            labels = torch.cdist(frame, torch.stack(list(centres))).argmin(1)
            centres = [frame[labels == group].mean(0) for group in range(4)]
        assert torch.equal(rows > 0, labels == torch.arange(4).unsqueeze(1))
    torch.testing.assert_close(weights[:2].sum(-1), torch.ones(2, 4))
    assert weights[2].sum(-1).tolist() == pytest.approx([1, 0, 0, 0])
    assert torch.equal(weights, group_patches(features, 4, rounds=2))
    with pytest.raises(ShapeError, match="at least 21 patches"):
        group_patches(features, 21)


def test_windows_are_cut_alike_in_all_frames_and_channels_and_half_are_mirrored() -> None:
    ramp = torch.arange(15.0).view(1, 1, 15, 1).expand(64, 2, 15, 2) * torch.tensor([1.0, 10.0])
    whole = random_windows(ramp, (3, 5), 1.0)[:, 0, :, 0].view(-1, 3, 5)
    mirrored = whole[:, 0, 0] == 4
    assert 16 < mirrored.sum() < 48
    torch.testing.assert_close(
        torch.where(mirrored[:, None, None], whole.flip(2), whole), ramp[:, 0, :, 0].view(-1, 3, 5)
    )
    seen = random_windows(ramp, (3, 5), 0.5)
    assert torch.equal(seen[:, 0], seen[:, 1])
    torch.testing.assert_close(seen[..., 1], 10 * seen[..., 0])
    steps = (seen[:, 0, 1, 0] - seen[:, 0, 0, 0]).abs()
    assert 0.3 < steps.min() < 0.65 < 0.85 < steps.max() <= 1.0


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_mean_of_a_fourier_code_tells_the_shape_of_the_patches(decay) -> None:
    code, (y, x) = fourier_code((12, 20), 6, decay), torch.meshgrid(torch.arange(12), torch.arange(20), indexing="ij")
    assert code.square().mean().item() == pytest.approx(1.0, abs=0.1)
    shape = ((y > 6) & (x < 15)) | ((x - 4).abs() < 3)
    density = (code / code.square().mean(0) @ code[shape.flatten()].mean(0)).view(12, 20)
    assert ((density > density[shape].mean() / 2) == shape).float().mean() > 0.9


def test_layers_of_a_transformer_are_split_and_frames_normalised_again() -> None:
    pytest.importorskip("timm")
    encoder = encoder_of(backbone="test_vit", layer="vit_block1", similarity_layer="vit_block_keys2")
    frames = torch.rand(2, 3, 64, 96)
    output, both = encoder(frames), encoder.backbone(frames).features
    assert encoder.feature_dim == encoder.similarity_dim == both.shape[-1] // 2
    assert torch.equal(output["backbone_features"], both[..., : encoder.feature_dim])
    assert torch.equal(output["similarity_features"], both[..., encoder.feature_dim :])
    assert not output["backbone_features"].requires_grad
    wanted = encoder(encoder.backbone.renormalize(frames, (0.0,) * 3, (1.0,) * 3))["backbone_features"]
    encoder.frame_mean, encoder.frame_std = (0.0,) * 3, (1.0,) * 3
    torch.testing.assert_close(encoder(frames)["backbone_features"], wanted)
    layers = {"layer": "vit_block1", "similarity_layer": "vit_block_keys2"}
    public = encoder_of(backbone="test_vit", **layers, renormalize=False)
    public.take_normalization(SimpleNamespace(mean=(0.0,) * 3, std=(1.0,) * 3))
    assert torch.equal(public(frames)["backbone_features"], output["backbone_features"])


def test_refusals() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ShapeError, match=r"64 x 64 pixels give 4 x 4. Set `grid` of the model to \[4, 4\]"):
        encoder_of(backbone="test_vit", layer="vit_block1")(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ConfigError, match="`layer` to be named"):
        encoder_of(backbone="test_vit", similarity_layer="vit_block_keys2")
    with pytest.raises(ConfigError, match="only without a backbone"):
        encoder_of(backbone="test_vit", feature_dim=5)


def test_maps_stay_in_float32_and_finite() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = SlotCorrector(6, 4)(torch.randn(2, 3, 4), torch.randn(2, 5, 6))
    assert output["dots"].dtype == output["masks"].dtype == torch.float32
    module = SlotAttention(8, 6)
    with torch.no_grad():
        module.to_q.weight.mul_(1e4)  # some slots win nothing
    out = module(torch.randn(1, 4, 8, requires_grad=True), torch.randn(1, 5, 6))
    out.slots.sum().backward()
    assert torch.isfinite(out.slots).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_slots_that_do_not_exist_get_no_gradient() -> None:
    slots, valid = torch.randn(2, 1, 3, 6, requires_grad=True), torch.tensor([[[True] * 3], [[True, False, True]]])
    out = RelativeMixtureDecoder(4, 6, 3, hidden=(8, 7))(slots, torch.randn(2, 1, 3, 4, 2), valid)
    assert torch.equal(torch.autograd.grad(out.reconstruction.sum(), slots)[0].any(-1), valid)


@pytest.mark.parametrize("chunk_bytes", [1, 2_000, 1 << 30])
@pytest.mark.parametrize("hidden", [(9,), (9, 8), (9, 8, 8, 10)])
@pytest.mark.parametrize("kind", ["mlp", "relative"])
def test_results_and_gradients_are_those_of_the_plain_order(kind, hidden, chunk_bytes, monkeypatch):
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


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("put", [weight_norm, functools.partial(prune.l1_unstructured, name="weight", amount=0.3)])
@pytest.mark.parametrize("kind", ["mlp", "relative"])
def test_weights_made_by_hooks_are_trained_and_used(kind: str, put: Any) -> None:
    decoder: Any = MLPDecoder(6, 5, [8, 8], 7) if kind == "mlp" else RelativeMixtureDecoder(7, 6, 5, [8, 8])
    given = [torch.randn(2, 1, 3, 6), torch.randn(2, 1, 3, 7, 2), torch.ones(2, 1, 3).bool()]

    def decode() -> Tensor:
        return decoder(given[0][:, 0])["reconstruction"] if kind == "mlp" else decoder(*given).reconstruction

    layers = [part for part in decoder.modules() if isinstance(part, nn.Linear)]
    for layer in layers:
        put(layer)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    for _ in range(2):  # a weight that is left from an earlier step belongs to a graph that is gone
        optimizer.zero_grad()
        decode().square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    trained = decode()
    for layer in layers:  # the same weights without hooks, along the lean path
        prune.remove(layer, "weight") if prune.is_pruned(layer) else remove_weight_norm(layer)
    torch.testing.assert_close(decode(), trained, rtol=1e-4, atol=1e-5)
