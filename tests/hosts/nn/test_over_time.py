from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from ssync_pl.hosts.nn.corrector import SlotCorrector
from ssync_pl.hosts.nn.over_time import MapOverTime, ScanOverTime, SlotProcessor


class _Adds(nn.Module):
    """A corrector that adds the frame's first feature, and counts its iterations."""

    def __init__(self) -> None:
        super().__init__()
        self.iterations: list[int | None] = []

    def forward(self, slots: Tensor, features: Tensor, iterations: int | None = None) -> dict[str, Tensor]:
        self.iterations.append(iterations)
        return {"slots": slots + features[:, :1], "dots": slots}


class _Doubles(nn.Module):
    def forward(self, slots: Tensor) -> Tensor:
        return 2 * slots


def test_map_sees_all_frames_at_once() -> None:
    calls: list[torch.Size] = []
    module = nn.Linear(3, 2)
    module.register_forward_hook(lambda _m, args, _o: calls.append(args[0].shape))
    inputs = torch.randn(2, 4, 5, 3)
    output = MapOverTime(module)(inputs)
    assert isinstance(output, Tensor)
    assert calls == [(8, 5, 3)]
    torch.testing.assert_close(output[1, 2], module(inputs[1, 2]))


def test_map_unfolds_each_entry_of_a_dict() -> None:
    class Both(nn.Module):
        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {"same": inputs, "sum": inputs.sum(-1)}

    output = MapOverTime(Both())(torch.ones(2, 3, 4, 5))
    assert isinstance(output, dict)
    assert output["same"].shape == (2, 3, 4, 5)
    assert output["sum"].shape == (2, 3, 4)


def test_scan_predicts_between_frames_only() -> None:
    corrector = _Adds()
    scan = ScanOverTime(SlotProcessor(corrector, _Doubles(), iterations_first=3))
    features = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
    output = scan(torch.zeros(1, 2, 1), features)
    # 0 + 1; 2 * 1 + 10; 2 * 12 + 100
    assert output["slots"][0, :, 0, 0].tolist() == [1.0, 12.0, 124.0]
    assert output["dots"][0, :, 0, 0].tolist() == [0.0, 2.0, 24.0]
    assert corrector.iterations == [3, None, None]


def test_without_predictor_slots_are_carried_over() -> None:
    output = ScanOverTime(SlotProcessor(_Adds()))(torch.zeros(1, 2, 1), torch.ones(1, 3, 4, 1))
    assert output["slots"][0, :, 0, 0].tolist() == [1.0, 2.0, 3.0]


def test_a_compiled_scan_is_the_same_and_hears_hooks_that_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    torch.manual_seed(0)
    plain = ScanOverTime(SlotProcessor(SlotCorrector(5, 8, iterations=1, mlp_hidden=0), nn.Linear(8, 8)))
    compiled = ScanOverTime(copy.deepcopy(plain.module), compiled=True)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    slots, features = torch.randn(2, 3, 8), torch.randn(2, 4, 6, 5)
    heard: list[Tensor] = []
    for count in (0, 4):
        expected, found = plain(slots, features), compiled(slots, features)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)
        assert len(heard) == count
        compiled.module.corrector.to_q.register_forward_hook(lambda module, args, output: heard.append(output))
    gradients = []
    for scan in (plain, compiled):
        scan(slots, features)["dots"].square().sum().backward()
        gradients.append([parameter.grad for parameter in scan.parameters()])
    torch.testing.assert_close(*gradients)
    torch.compiler.reset()
