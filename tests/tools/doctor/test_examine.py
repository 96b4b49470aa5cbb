import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn

from ssync_pl import SSyncCallback, ssync_loss
from ssync_pl.adapters import PathAdapter
from ssync_pl.adapters.savi import SaviAdapter
from ssync_pl.compare.variants import key_values
from ssync_pl.errors import ConfigError, HostError
from ssync_pl.hosts import VideoSAUR
from ssync_pl.tools.doctor.examine import DoctorReport, examine, hints, lines, render_report
from ssync_pl.tools.doctor.steps import StepError, build_model, describe_batch, in_trainer, parse_batch, plain_step


@pytest.mark.parametrize(
    ("target", "settings", "found"),
    [
        ("user_code:Net", {"slots": 5}, "Net"),
        ("user_code:classifier", {}, "Sequential"),
        ("user_code:model", {}, "Net"),
        ("torch.nn:modules.Linear", {"in_features": 1, "out_features": 2}, "Linear"),
        ("user_code", {}, "'user_code' to be a model or to build one.*Write package.module:name"),
        ("./user_code.py:Net", {}, "Write package.module:name as `import` does"),
        ("nowhere:Net", {}, "No module named 'nowhere'.*in the folder of your code"),
        ("broken_code:Net", {}, "SystemExit: at import"),
        ("user_code:Net", {"slot": 3}, "with slot=3 .*TypeError: .*slot.*--init name=value"),
        ("builtins:dict", {}, "gives dict and no torch.nn.Module"),
    ],
)
def test_models(user_folder: Path, target: str, settings: dict[str, Any], found: str) -> None:
    try:
        told = type(build_model(target, settings)).__name__
    except ConfigError as error:
        told = str(error)
    assert re.search(found, told)
    assert told.startswith("Expected") == (found not in ("Net", "Sequential", "Linear"))


def test_values_of_init() -> None:
    values = {"(1, (2, 3), None)": (1, (2, 3), None), "1e-3": 0.001, "{a: [null, yes]}": {"a": [None, True]}}
    values |= {"[(1,), {'a': (2,)}]": [(1,), {"a": (2,)}], "'x'": "x", "(1, 2": "(1, 2", "": None}
    assert {text: key_values([f"name={text}"], "--init")["name"] for text in values} == values


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("2,4,3,8,8", "(2, 4, 3, 8, 8)"),
        ("2,3 4", "((2, 3), (4,))"),
        ("a.b=2,3 a.c=4 d=1", "{'a': {'b': (2, 3), 'c': (4,)}, 'd': (1,)}"),
        ("a=2,3 a.b=2", "one name per shape"),
        ("img=1,2,3,8,8 boxes=1,2,5,4", "{'img': (1, 2, 3, 8, 8), 'boxes': (1, 2, 5, 4)}"),
        *((word, "--batch as sizes") for word in ("a", "2,,3", "2,-1", "2,0", "=2,3", "2x3", "\u00b2,3")),
        ("img=2,3 4", "one name per shape or without names"),
        ("a=2,3 a=2", "one name per shape"),
        ("100000000,2,3,224,224,1000", "to fit into memory"),
        ("9" * 5000, "to fit into memory"),
    ],
)
def test_batches(words: str, found: str) -> None:
    if found[0] in "({":
        assert describe_batch(parse_batch(words.split())) == found
    else:
        with pytest.raises(ConfigError, match=found):
            parse_batch(words.split())


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda w, *pair: (w * pair[0] * pair[1]).sum(), 4.0),
        (lambda w, *x: {"loss": w.sum(), "aux_loss": w.sum()}, 2.0),
        (lambda w, *x: {"post_loss": w.sum(), "kld_loss": 2 * w.sum(), "other": w}, 6.0),
        (lambda w, *x: {"total_loss": w.sum(), "kld_loss": w.sum()}, 2.0),
        (lambda w, *x: 3 * w, 9.0),
        (lambda w, *x: {"masks": [w, 2 * w], "input": x}, 5.0),
    ],
)
@pytest.mark.filterwarnings("ignore:No loss came back")
def test_the_loss_of_a_plain_model(make: Any, loss: float) -> None:
    host = nn.Linear(2, 2)
    host.call = lambda *batch: make(torch.ones(2, requires_grad=True), *batch)
    assert float(plain_step(host, (torch.ones(2), 2 * torch.ones(2)), "call")().detach()) == loss


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def training_step(self, batch: Any) -> Tensor:
        return self.layer(batch["x"]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_step_in_a_trainer_changes_and_writes_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    host = Small()
    before = host.layer.weight.clone()
    seen = in_trainer(host, {"x": torch.ones(1, 2)}, lambda run, batch: (host.training, run().ndim))
    assert seen == (True, 0)
    assert torch.equal(host.layer.weight, before)
    assert not list(tmp_path.iterdir())


def test_hosts_of_the_other_namespace() -> None:
    pl = pytest.importorskip("pytorch_lightning")
    other = type("Other", (pl.LightningModule,), dict(vars(Small), __init__=pl.LightningModule.__init__))()
    other.layer = nn.Linear(2, 2)
    assert in_trainer(other, {"x": torch.ones(1, 2)}, lambda run, batch: run().ndim) == 0


def test_a_trainer_that_does_not_get_there_is_explained() -> None:
    host = Small()
    with pytest.raises(HostError, match="training data of Small to have a batch, but there was none"):
        in_trainer(host, L.LightningDataModule.from_datasets([]), lambda run, batch: None)
    host.configure_optimizers = lambda: 1 / 0
    with pytest.raises(StepError, match=r"Small to run a training step .*, but it raised ZeroDivisionError"):
        in_trainer(host, {"x": torch.ones(1, 2)}, lambda run, batch: None)


FEATURES = {"num_slots": 3, "slot_dim": 8, "backbone": None, "feature_dim": 5, "grid": (4, 4), "decoder_hidden": (8,)}


class Wide(nn.Module):
    """Two softmaxes over three slots and twelve patches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)
        self.first, self.second = nn.Softmax(2), nn.Softmax(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.a(x)) + 2 * self.second(self.b(x))


def look(host: Any, batch: Tensor, **settings: Any) -> DoctorReport:
    return examine(host, lambda: host(batch).square().mean(), batch, settings)


def test_a_host_inside_a_wrapper_and_what_its_adapter_says_of_it() -> None:
    inner, batch = VideoSAUR(**FEATURES, decoder="mlp", similarity_weight=0.0), torch.rand(2, 2, 16, 5)
    inner.loss_fns = nn.ModuleDict({"loss_grp2deccls": nn.Identity()})  # as SSync's own code has it
    host = nn.ModuleDict({"model": inner})
    report = examine(host, lambda: inner(batch).reconstruction.square().mean(), {"features": batch})
    assert (report.adapter, report.ready) == ("videosaur", True)
    assert report.places == ("model.processor.module.corrector", "model.decoder.module")
    assert any("count twice" in hint for hint in report.hints)
    assert (report.shape, report.kinds) == ((2, 2, 3, 16), ("logits", "logits"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())  # left as it was
    assert all(parameter.grad is None for parameter in host.parameters())


def test_the_numbers_are_those_of_the_loss() -> None:
    host, batch = Wide(), torch.rand(2, 16, 5)
    report, adapter = look(host, batch), PathAdapter("softmax:first", "softmax:second")
    (capture := adapter.attach(host)).open()
    values = {"loss": float(host(batch).square().mean().detach())}
    output = ssync_loss(adapter.collect(capture))
    values |= {name: float(getattr(output, name).detach().float().mean()) for name in NUMBERS if name != "loss"}
    assert report.numbers == values


def test_a_missing_grid_a_given_one_and_a_host_that_its_adapter_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.rand(2, 12, 5)
    assert "12 patches, which is no square. Pass grid=(H, W)" in look(Wide(), batch).problems[0]
    report = look(Wide(), batch, grid=(3, 4))
    assert (report.ready, report.grid) == (True, (3, 4))
    assert "grid=(3, 4)" in report.lines[1]

    monkeypatch.setattr(SaviAdapter, "match", lambda self, host: isinstance(host, Wide))
    monkeypatch.setattr(SaviAdapter, "attach", lambda self, host: (_ for _ in ()).throw(HostError("No masks.")))
    report = look(Wide(), torch.rand(2, 16, 5))
    assert (report.adapter, report.problems) == ("savi", ("No masks.",))


def test_the_lines_can_be_used() -> None:
    settings = {"attention": "softmax:a.b", "masks": "c:masks", "masks_kind": "logits", "grid": (8, 18)}
    python = lines("lightning", settings)
    callback = eval(python[1].split("callbacks=[")[1][:-2], {"SSyncCallback": SSyncCallback})
    assert (callback.adapter.attention, callback.adapter.masks_kind) == ("softmax:a.b", "logits")
    assert callback.adapter.grid == (8, 18)
    assert "--trainer.callbacks+=ssync_pl.SSyncCallback" in python[3]
    assert "'--trainer.callbacks.grid=[8, 18]'" in python[3]


NUMBERS = {"loss": 1.0, "boundary_loss": 0.1, "interior_loss": 0.2, "boundary_fraction": 0.3, "agreement": 0.8}
NUMBERS |= {"merged_slots": 0.5, "used_encoder_slots": 4.0, "used_decoder_slots": 5.0}
GOOD = DoctorReport("Net", "lightning", shape=(2, 4, 5, 144), grid=(8, 18), kinds=("logits",) * 2, numbers=NUMBERS)


@pytest.mark.parametrize(
    ("changes", "clips", "hint"),
    [
        ({}, {(2, 4), (4, 4)}, ""),
        ({"numbers": NUMBERS | {"loss": 0.003}}, {(2, 4)}, "relative_weight=0.1"),
        ({"numbers": NUMBERS | {"loss": 2000.0}}, set(), "relative_weight=0.1"),
        ({"numbers": NUMBERS | {"loss": math.nan}}, {(2, 4)}, "loss is nan"),
        ({"shape": (2, 4, 1, 144)}, {(2, 4)}, "There is one slot"),
        ({"shape": (2, 1, 5, 144)}, {(2, 4)}, "SSync sees 2 frames of a batch of 8"),
        ({"shape": (8, 1, 5, 144)}, {(2, 4)}, "8 clips of 1: right only where frames hand on no slots"),
        ({"kinds": ("probs", "logits")}, {(2, 4)}, "merged by logits only"),
    ],
)
def test_hints(changes: dict[str, Any], clips: set[tuple[int, int]], hint: str) -> None:
    report = replace(GOOD, **changes)
    found = hints(report, clips)
    assert len(found) == bool(hint)
    assert hint in "".join(found)
    assert render_report(replace(report, lines=("one line",))).endswith("ready. Add:\n  one line")
