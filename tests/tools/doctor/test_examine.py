from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ssync_pl import ssync_loss
from ssync_pl.adapters import HostAdapter, PathAdapter
from ssync_pl.errors import HostError
from ssync_pl.hosts import SAVi, VideoSAUR
from ssync_pl.tools.doctor import examine, render_report
from ssync_pl.tools.doctor.load import build_model, working_folder_first
from ssync_pl.tools.doctor.report import DoctorReport


@pytest.fixture
def make(user_folder: Path) -> Any:
    def build(name: str, **settings: Any) -> Any:
        torch.manual_seed(0)
        with working_folder_first():
            return build_model(f"user_code:{name}", settings)

    return build


def video(frames: int = 2) -> torch.Tensor:
    return torch.rand((2, frames, 3, 4, 4), generator=torch.Generator().manual_seed(0))


def look(host: Any, batch: Any = None, **wanted: Any) -> DoctorReport:
    batch = video() if batch is None else batch
    host.train()
    return examine(host, lambda: host(batch).square().mean(), batch, settings=wanted)


def tiny_savi() -> SAVi:
    return SAVi(
        num_slots=3, slot_dim=8, encoder_channels=(8,), encoder_strides=(2,), feature_dim=8,
        decoder_broadcast=(4, 4), decoder_channels=(8,), decoder_strides=(2,),
    )  # fmt: skip


def test_a_host_of_ours() -> None:
    host, batch = tiny_savi(), torch.rand(2, 2, 3, 16, 16)
    report = examine(host, lambda: host(batch).reconstruction.square().mean(), batch)
    assert (report.adapter, report.ready, report.shape, report.grid) == ("savi", True, (2, 2, 3, 64), (8, 8))
    attention, masks = report.maps
    assert attention.places == ("encoder", "corrector")
    assert masks.places == ("decoder",)
    assert "decoder" in masks.reaches
    assert "decoder" not in attention.reaches
    assert attention.sums == pytest.approx((1, 1))
    assert report.cost.bytes == 28 * 2 * 2 * 3 * 64
    assert report.cost.ssync_seconds > 0
    assert report.cost.share == report.cost.ssync_seconds / report.cost.step_seconds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())
    assert all(parameter.grad is None for parameter in host.parameters())


def test_a_host_of_the_videosaur_family_inside_a_wrapper() -> None:
    inner = VideoSAUR(
        num_slots=3, slot_dim=8, backbone=None, feature_dim=5, grid=(4, 4), decoder_hidden=(8,), mixer_blocks=1
    )
    host, batch = torch.nn.ModuleDict({"model": inner}), torch.rand(2, 2, 16, 5)
    report = examine(host, lambda: inner.training_step({"features": batch}, 0), {"features": batch})
    assert (report.adapter, report.part, report.ready) == ("videosaur", "model", True)
    assert report.maps[0].places == ("model.processor.module.corrector",)
    assert report.maps[1].places == ("model.decoder.module",)


def test_what_an_adapter_says_of_a_host_is_a_hint() -> None:
    sizes = {"num_slots": 2, "slot_dim": 8, "backbone": None, "feature_dim": 4, "grid": (2, 2), "decoder_hidden": (8,)}
    model = VideoSAUR(**sizes, decoder="mlp", similarity_weight=0.0)
    model.loss_fns = torch.nn.ModuleDict({"loss_grp2deccls": torch.nn.Identity()})  # as SSync's own code has it
    features = torch.rand(1, 2, 4, 4)
    report = examine(model, lambda: model(features).reconstruction.square().mean())
    assert report.ready
    assert any("count twice" in hint for hint in report.hints)


def test_the_numbers_are_those_of_the_loss(make: Any) -> None:
    host = make("Net")
    report = look(host)
    adapter = PathAdapter("softmax:binder", "softmax:painter")
    capture = adapter.attach(host)
    capture.open()
    host(video())
    capture.close()
    output = ssync_loss(adapter.collect(capture))
    assert report.boundary_loss == float(output.boundary_loss)
    assert report.interior_loss == float(output.interior_loss)
    assert report.agreement == float(output.agreement)
    assert [one.used_slots for one in report.maps] == [
        float(output.used_encoder_slots.mean()),
        float(output.used_decoder_slots.mean()),
    ]


def test_a_map_that_trains_nothing_is_a_problem(make: Any) -> None:
    host = make("Net")
    host.painter.place.requires_grad_(False)
    for parameter in (*host.binder.parameters(), *host.eyes.parameters(), host.seeds, host.place):
        parameter.requires_grad_(False)
    batch = video().requires_grad_()
    report = look(host, batch)
    places = "attention='softmax:binder' with masks='softmax:painter'"
    assert report.problems == (
        f"{places}: No gradient reaches a parameter through the attention.",
        f"{places}: No gradient reaches a parameter through the masks.",
    )
    named = look(host, batch, attention="softmax:binder", masks="softmax:painter")
    assert "NO gradient" in render_report(named)


def test_models_without_slots(make: Any) -> None:
    report = look(make("tokens"))
    assert not report.ready
    assert report.candidates == ("softmax of 16 on axis 2 of (4, 16, 16) in '.', 1 call(s), without gradient",)
    assert "SSync cannot be used as it is" in render_report(report)


def test_a_grid_that_is_missing_and_one_that_is_given(make: Any) -> None:
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
            self.first, self.second = torch.nn.Softmax(2), torch.nn.Softmax(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(self.a(x)) + self.second(self.b(x))

    batch = torch.rand(2, 12, 5)
    report = look(Wide(), batch)
    assert "12 patches, which is no square. Pass grid=(H, W)" in report.problems[0]
    report = look(Wide(), batch, grid=(3, 4))
    assert report.ready
    assert report.grid == (3, 4)
    assert "grid=(3, 4)" in report.lines[1]


def test_named_modules(make: Any) -> None:
    report = look(make("Net"), attention="softmax:binder", masks="softmax:painter:1")
    assert report.ready
    assert report.maps[1].places == ("softmax:painter:1",)
    report = look(make("Net"), attention="softmax:binder", masks="painter")
    assert "Expected both maps to have the same slots" in report.problems[0]
    report = look(make("Net"), attention="nowhere", masks="painter")
    assert "no child 'nowhere'. Its children: eyes, binder, painter" in report.problems[0]
    report = look(make("Net"), adapter="savi")
    assert "host that the adapter 'savi' knows" in report.problems[0]


def test_a_host_that_its_adapter_refuses(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    from ssync_pl.adapters import base

    class Refuses(HostAdapter):
        name = "refuses"

        def match(self, host: Any) -> bool:
            return type(host).__name__ == "Net"

        def attach(self, host: Any) -> Any:
            raise HostError("Expected object masks, but this decoder predicts tokens.")

        def collect(self, capture: Any, batch: Any = None) -> Any:
            raise HostError("unreachable")

    monkeypatch.setitem(base._REGISTRY, "refuses", Refuses)
    report = look(make("Net"))
    assert report.adapter == "refuses"
    assert report.problems == ("Expected object masks, but this decoder predicts tokens.",)


def test_other_candidates_are_told(make: Any) -> None:
    host = make("Net")
    plain = host.forward

    def forward(batch: torch.Tensor) -> torch.Tensor:
        return plain(batch) + host.painter.place.new_zeros(2, 3, 25).requires_grad_().softmax(1).mean()

    host.forward = forward
    report = look(host)
    assert [one.places for one in report.maps] == [("softmax:binder",), ("softmax:painter",)]
    assert report.ready
