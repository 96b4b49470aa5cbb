"""What the doctor finds in a host, what it advises, and how it says so."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssync_pl import SSyncCallback, ssync_loss
from ssync_pl.adapters import HostAdapter, PathAdapter
from ssync_pl.errors import HostError
from ssync_pl.hosts import SAVi, VideoSAUR
from ssync_pl.tools.doctor import DoctorReport, examine, render_report
from ssync_pl.tools.doctor.load import build_model, working_folder_first
from ssync_pl.tools.doctor.report import hints, lines

FEATURES = {"num_slots": 3, "slot_dim": 8, "backbone": None, "feature_dim": 5, "grid": (4, 4), "decoder_hidden": (8,)}


@pytest.fixture
def make(user_folder: Any) -> Any:
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


def test_a_host_of_ours() -> None:
    sizes = {"num_slots": 3, "slot_dim": 8, "encoder_channels": (8,), "encoder_strides": (2,), "feature_dim": 8}
    host = SAVi(**sizes, decoder_broadcast=(4, 4), decoder_channels=(8,), decoder_strides=(2,))
    batch = torch.rand(2, 2, 3, 16, 16)
    report = examine(host, lambda: host(batch).reconstruction.square().mean(), batch)
    assert (report.adapter, report.ready, report.shape, report.grid) == ("savi", True, (2, 2, 3, 64), (8, 8))
    assert report.places == ("encoder", "corrector", "decoder")
    assert report.kinds == ("logits", "logits")
    assert report.ssync_seconds > 0
    assert report.step_seconds > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())
    assert all(parameter.grad is None for parameter in host.parameters())
    assert json.loads(json.dumps(report.to_json()))["ready"] is True


def test_a_host_of_the_videosaur_family_inside_a_wrapper() -> None:
    inner, batch = VideoSAUR(**FEATURES, mixer_blocks=1), torch.rand(2, 2, 16, 5)
    host = torch.nn.ModuleDict({"model": inner})
    report = examine(host, lambda: inner.training_step({"features": batch}, 0), {"features": batch})
    assert (report.adapter, report.part, report.ready) == ("videosaur", "model", True)
    assert report.places == ("model.processor.module.corrector", "model.decoder.module")
    assert "at model" in render_report(report)


def test_what_an_adapter_says_of_a_host_is_a_hint() -> None:
    model = VideoSAUR(**FEATURES, decoder="mlp", similarity_weight=0.0)
    model.loss_fns = torch.nn.ModuleDict({"loss_grp2deccls": torch.nn.Identity()})  # as SSync's own code has it
    features = torch.rand(1, 2, 16, 5)
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
    for name in ("boundary_loss", "interior_loss", "boundary_fraction", "agreement"):
        assert getattr(report, name) == float(getattr(output, name))
    assert report.used_slots == (float(output.used_encoder_slots.mean()), float(output.used_decoder_slots.mean()))


def test_a_grid_that_is_missing_and_one_that_is_given() -> None:
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
            self.first, self.second = torch.nn.Softmax(2), torch.nn.Softmax(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(self.a(x)) + self.second(self.b(x))

    batch = torch.rand(2, 12, 5)
    assert "12 patches, which is no square. Pass grid=(H, W)" in look(Wide(), batch).problems[0]
    report = look(Wide(), batch, grid=(3, 4))
    assert (report.ready, report.grid) == (True, (3, 4))
    assert "grid=(3, 4)" in report.lines[1]


def test_a_host_that_its_adapter_refuses(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    from ssync_pl.adapters import base

    class Refuses(HostAdapter):
        name = "refuses"

        def match(self, host: Any) -> bool:
            return type(host).__name__ == "Net"

        def attach(self, host: Any) -> Any:
            raise HostError("Expected object masks, but this decoder predicts tokens.")

        def collect(self, capture: Any, batch: Any = None) -> Any:
            raise AssertionError

    monkeypatch.setitem(base._REGISTRY, "refuses", Refuses)
    report = look(make("Net"))
    assert report.adapter == "refuses"
    assert report.problems == ("Expected object masks, but this decoder predicts tokens.",)


WANTED = {"attention": "softmax:a.b", "masks": "c:masks", "masks_kind": "logits", "grid": (8, 18)}
GOOD = DoctorReport(
    host="Net",
    kind="lightning",
    adapter="paths",
    places=("a.b", "c"),
    shape=(2, 4, 5, 144),
    grid=(8, 18),
    kinds=("logits", "logits"),
    used_slots=(5.0, 5.0),
    loss=1.0,
    boundary_loss=0.1,
    interior_loss=0.2,
    boundary_fraction=0.3,
    agreement=0.8,
    merged_slots=0.5,
    ssync_seconds=0.01,
    step_seconds=2.0,
    device="cpu",
)


def test_the_lines_can_be_used() -> None:
    python = lines("lightning", WANTED)
    callback = eval(python[1].split("callbacks=[")[1][:-2], {"SSyncCallback": SSyncCallback})
    assert (callback.adapter.attention, callback.adapter.masks_kind) == ("softmax:a.b", "logits")
    assert callback.adapter.grid == (8, 18)
    assert "--trainer.callbacks+=ssync_pl.SSyncCallback" in python[3]
    assert "with attach(model, grid=(8, 18), total_steps=...) as ssync:" in lines("plain", {"grid": (8, 18)})


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({}, ""),
        ({"loss": 0.003}, "relative_weight=0.1"),
        ({"loss": 2000.0}, "relative_weight=0.1"),
        ({"loss": math.nan}, "loss is nan: nothing can be trained"),
        ({"shape": (2, 4, 1, 144)}, "There is one slot"),
        ({"agreement": 0.3}, "same slot in 30% of the patches only"),
        ({"used_slots": (5.0, 1.5)}, "In the masks, 1.5 of 5 slots win a patch"),
        ({"kinds": ("probs", "logits")}, "not merged"),
    ],
)
def test_hints(changes: dict[str, Any], hint: str) -> None:
    found = hints(replace(GOOD, **changes))
    assert len(found) == bool(hint)
    assert hint in "".join(found)


def test_the_text() -> None:
    text = render_report(replace(GOOD, lines=("one line",)))
    assert text.splitlines()[0] == "host          Net (LightningModule)"
    assert "maps          B=2 T=4 S=5 N=144, grid 8 x 18" in text
    assert "found at      a.b, c" in text
    assert "cost          0.01 s beside 2 s of the host's own step (0.5%), on cpu" in text
    assert "masks         logits, 5.0 slots in use" in text
    assert text.endswith("ready. Add:\n  one line")
    assert render_report(GOOD).endswith("ready: nothing to add.")
    refused = render_report(replace(GOOD, problems=("No.",), lines=("one line",)))
    assert "SSync cannot be used as it is:\n  - No." in refused
    assert "once that is settled:" in refused
