"""Models and batches as the user names them, and one training step of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, HostError
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
        ("user_code:model", {"slots": 3}, "TypeError"),
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


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("2,4,3,8,8", "(2, 4, 3, 8, 8)"),
        ("2,3 4", "((2, 3), (4,))"),
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
