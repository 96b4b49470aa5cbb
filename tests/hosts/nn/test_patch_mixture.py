from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssync_pl.errors import HostError
from ssync_pl.hosts.nn import patch_mixture
from ssync_pl.hosts.nn.mixture_decoder import RelativeMixtureDecoder
from ssync_pl.hosts.nn.patch_decoders import MLPDecoder
from ssync_pl.hosts.nn.patch_mixture import linear_layers

FRAMES, SLOTS, PATCHES, DIM, CHANNELS = 3, 4, 7, 6, 5
HIDDEN = {1: (9,), 2: (9, 8), 3: (9, 8, 10), 4: (9, 8, 8, 10), 5: (9, 8, 8, 9, 10)}


class _Case:
    """A decoder and its inputs, with gradients of a loss on both of its outputs."""

    def __init__(self, kind: str, layers: int = 3, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(layers)
        self.slots = torch.randn(FRAMES, SLOTS, DIM, dtype=dtype)
        self.inputs = [self.slots]
        self.decoder: nn.Module
        if kind == "mlp":
            self.decoder = MLPDecoder(DIM, CHANNELS, HIDDEN[layers], PATCHES).to(dtype)
        else:
            self.decoder = RelativeMixtureDecoder(PATCHES, DIM, CHANNELS, HIDDEN[layers]).to(dtype)
            self.inputs.append(torch.randn(FRAMES, SLOTS, PATCHES, 2, dtype=dtype))
        self.valid = torch.tensor([[True] * SLOTS, [True, False, True, False], [False, True, True, True]])
        for name, parameter in self.decoder.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        self.weights = torch.randn(FRAMES, PATCHES, CHANNELS, dtype=dtype)
        self.logit_weights = torch.randn(FRAMES, SLOTS, PATCHES, dtype=dtype)

    def outputs(self, memory_efficient: bool, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        self.decoder.memory_efficient = memory_efficient
        if isinstance(self.decoder, MLPDecoder):
            out = self.decoder(inputs[0])
            torch.testing.assert_close(out["masks"], out["dots"].softmax(1))
            return out["reconstruction"], out["dots"]
        slots, positions = (value.unsqueeze(0) for value in inputs)
        mixed = self.decoder(slots, positions, self.valid.unsqueeze(0))
        return mixed.reconstruction[0], mixed.mask_logits[0]

    def run(self, memory_efficient: bool) -> dict[str, Tensor]:
        self.decoder.zero_grad()
        inputs = [value.clone().requires_grad_() for value in self.inputs]
        features, logits = self.outputs(memory_efficient, inputs)
        self.loss(features, logits).backward()
        found = {"features": features.detach(), "logits": logits.detach()}
        found |= {f"input {number}": value.grad for number, value in enumerate(inputs) if value.grad is not None}
        return found | {name: p.grad.clone() for name, p in self.decoder.named_parameters() if p.grad is not None}

    def loss(self, features: Tensor, logits: Tensor) -> Tensor:
        return (features * self.weights).sum() + (logits * self.logit_weights).sum()


@pytest.fixture(params=[2_000, 10_000, 1 << 30], ids=["patches", "frames", "whole"])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(patch_mixture._CHUNK_BYTES, "cpu", request.param)
    return request.param


@pytest.mark.parametrize("layers", HIDDEN)
@pytest.mark.parametrize("kind", ["mlp", "relative"])
def test_results_and_gradients_are_those_of_the_plain_layout(kind: str, layers: int, chunk_bytes: int) -> None:
    case = _Case(kind, layers)
    plain, efficient = case.run(False), case.run(True)
    assert list(plain) == list(efficient)
    for name, value in plain.items():
        # Mask logits of the second kind are float32 whatever comes in.
        close = {"rtol": 1e-5, "atol": 1e-6} if kind == "relative" else {"rtol": 1e-11, "atol": 1e-12}
        torch.testing.assert_close(efficient[name], value, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["mlp", "relative"])
def test_single_precision(kind: str, chunk_bytes: int) -> None:
    case = _Case(kind, dtype=torch.float32)
    plain, efficient = case.run(False), case.run(True)
    for name, value in plain.items():
        tolerance = 1e-5 if name in ("features", "logits") else 1e-4
        torch.testing.assert_close(efficient[name], value, rtol=tolerance, atol=tolerance)


def test_chunks_cover_everything_once(chunk_bytes: int) -> None:
    slots, places = torch.zeros(5, SLOTS, 3), torch.zeros(23, 3)
    for layers in range(1, 7):
        chunks = list(patch_mixture._chunks(slots, places, widest=20, layers=layers, itemsize=4))
        seen = torch.zeros(5, 23)
        for chunk in chunks:
            seen[chunk.frames, chunk.patches] += 1
        assert (seen == 1).all()
        share = sum(not chunk.keeps_last for chunk in chunks) / len(chunks)
        assert share == pytest.approx(patch_mixture._recomputed_share(layers), abs=1 / len(chunks))
    rows = [SLOTS * len(seen[chunk.frames]) * len(seen[0, chunk.patches]) for chunk in chunks]
    assert max(rows) * 20 * 4 <= max(chunk_bytes, 2 * SLOTS * 20 * 4)


def test_gradients_by_finite_differences() -> None:
    case = _Case("mlp", 2)
    assert torch.autograd.gradcheck(lambda slots: case.outputs(True, [slots]), case.slots.requires_grad_())


def test_only_wanted_gradients_and_either_output_alone() -> None:
    case = _Case("mlp")
    frozen = [p for name, p in case.decoder.named_parameters() if "layers.2" in name or name == "pos_emb"]
    for parameter in frozen:
        parameter.requires_grad_(False)
    plain, efficient = case.run(False), case.run(True)
    assert len(efficient) == 2 + 1 + 9 - 3
    for name, value in plain.items():
        torch.testing.assert_close(efficient[name], value)
    for loss in (lambda f, m: f.square().sum(), lambda f, m: m.square().sum()):
        case.loss = loss  # type: ignore[method-assign]
        plain, efficient = case.run(False), case.run(True)
        for name, value in plain.items():
            torch.testing.assert_close(efficient[name], value)


def test_backward_twice_and_second_derivatives() -> None:
    case = _Case("mlp")
    slots = case.slots.requires_grad_()
    loss = case.loss(*case.outputs(True, [slots]))
    first, again = (torch.autograd.grad(loss, slots, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(HostError, match="memory_efficient=False"):
        torch.autograd.grad(loss, slots, create_graph=True)


def test_under_activation_checkpointing() -> None:
    case = _Case("mlp")
    expected = case.run(True)["input 0"]
    slots = case.slots.requires_grad_()
    out = checkpoint(case.decoder, slots, use_reentrant=False)
    case.loss(out["reconstruction"], out["dots"]).backward()
    torch.testing.assert_close(slots.grad, expected)


@pytest.mark.parametrize("kind", ["autocast", "weights"])
def test_half_precision_is_as_good_as_in_the_plain_layout(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(patch_mixture._CHUNK_BYTES, "cpu", 30_000)
    torch.manual_seed(0)
    decoder = MLPDecoder(32, 24, [128] * 3, 50)
    given, weights = torch.randn(2, 6, 32), torch.randn(2, 50, 24)

    def run(memory_efficient: bool, half: bool) -> dict[str, Tensor]:
        decoder.memory_efficient = memory_efficient
        used = copy.deepcopy(decoder).to(torch.bfloat16 if half and kind == "weights" else torch.float32)
        slots = given.to(used.pos_emb.dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half and kind == "autocast"):
            out = used(slots)
        assert out["dots"].dtype == torch.float32
        assert out["reconstruction"].dtype == (torch.bfloat16 if half else torch.float32)
        ((out["reconstruction"] * weights).sum() + out["dots"].square().sum()).backward()
        found = {"features": out["reconstruction"], "logits": out["dots"], "slots": slots.grad}
        found |= {name: parameter.grad for name, parameter in used.named_parameters()}
        return {name: torch.as_tensor(value).detach().float() for name, value in found.items()}

    exact, plain, efficient = run(False, False), run(False, True), run(True, True)
    for name, value in exact.items():
        gap, plain_gap = ((found[name] - value).norm() / value.norm() for found in (efficient, plain))
        assert gap < max(0.01, 1.5 * plain_gap) < 0.3, name


def test_without_onednn(chunk_bytes: int) -> None:
    case = _Case("mlp", dtype=torch.float32)
    fast = case.run(True)
    with torch.backends.mkldnn.flags(enabled=False):
        slow = case.run(True)
    for name, value in slow.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(patch_mixture._CHUNK_BYTES, "cpu", 16_384)
    decoder = MLPDecoder(8, 4, [64] * 4, 128)
    slots = torch.randn(4, 8, 8)
    layer = 4 * 4 * 8 * 128 * 64

    def evaluate() -> None:
        with torch.no_grad():
            decoder(slots)

    assert peak_bytes(evaluate) < 0.4 * layer


def peak_bytes(call: Callable[[], Any]) -> int:
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    used = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        most = max(most, used)
    return most


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_a_step_peaks_at_four_tenths_of_the_plain_layout(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(patch_mixture._CHUNK_BYTES, "cpu", 32_768)
    decoder = MLPDecoder(8, 48, [128] * layers, 144)
    slots = torch.randn(4, 11, 8, requires_grad=True)

    def step(memory_efficient: bool) -> None:
        decoder.memory_efficient = memory_efficient
        decoder.zero_grad()
        out = decoder(slots)
        (out["reconstruction"].square().mean() + out["masks"].square().mean()).backward()

    assert peak_bytes(lambda: step(True)) <= 0.4 * peak_bytes(lambda: step(False))


@pytest.mark.parametrize("kind", ["mlp", "relative"])
def test_modules_that_are_listened_to_run(kind: str) -> None:
    case = _Case(kind)
    expected = case.run(True)
    heard: list[tuple[int, ...]] = []
    layer = case.decoder.mlp.layers[2] if kind == "mlp" else case.decoder.mlp[1]
    handle = layer.register_forward_hook(lambda module, args, output: heard.append(tuple(output.shape)))
    found = case.run(True)
    handle.remove()
    assert len(heard) == 1
    assert heard[0][-3:] == (SLOTS, PATCHES, 8)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    case.run(True)
    assert len(heard) == 1


def test_which_layers_may_be_taken_apart() -> None:
    layers = [nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)]
    assert linear_layers(layers) == layers[::2]
    assert linear_layers(layers[:2]) == layers[:1]
    assert linear_layers([nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2)]) is None
    assert linear_layers([nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))]) is None
    around = nn.Sequential(*layers)
    around.register_forward_pre_hook(lambda module, args: None)
    assert linear_layers(layers, within=[around]) is None


def test_compiled_decoders_are_one_graph() -> None:
    case = _Case("mlp")
    expected = case.run(True)
    case.decoder.compile(backend="aot_eager", fullgraph=True)
    found = case.run(True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_state_dicts_do_not_depend_on_the_layout() -> None:
    for build in (lambda m: MLPDecoder(8, 3, [4], 6, m), lambda m: RelativeMixtureDecoder(6, 8, 3, [4], "default", m)):
        assert list(build(True).state_dict()) == list(build(False).state_dict())
