from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn

from ssync_pl.errors import HostError
from ssync_pl.tools.doctor.load import build_model, working_folder_first
from ssync_pl.tools.doctor.steps import describe_batch, in_trainer, namespace, plain_step


class Gives(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.make = make

    def forward(self, *batch: Tensor) -> Any:
        return self.make(self.weight, *batch)

    def own(self, batch: Tensor) -> Tensor:
        return self.weight.sum() + batch.sum()


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda w, x: w.sum(), 2.0),
        (lambda w, x: {"loss": w.sum(), "aux_loss": w.sum()}, 2.0),
        (lambda w, x: {"post_loss": w.sum(), "kld_loss": 2 * w.sum(), "other": w}, 6.0),
        (lambda w, x: 3 * w, 9.0),
        (lambda w, x: {"masks": [w, 2 * w], "input": x}, 5.0),
        (lambda w, x: None, None),
    ],
)
def test_the_loss_of_a_plain_model(make: Any, loss: float | None) -> None:
    found = plain_step(Gives(make), torch.zeros(2))()
    assert (found if found is None else float(found.detach())) == loss


def test_methods_and_several_arguments() -> None:
    assert float(plain_step(Gives(None), torch.ones(3), "own")().detach()) == 5.0
    assert (
        float(plain_step(Gives(lambda w, x, y: (w * x * y).sum()), (torch.ones(2), 2 * torch.ones(2)))().detach())
        == 4.0
    )
    with pytest.raises(HostError, match="Gives to have a method 'lose', but it has none"):
        plain_step(Gives(None), torch.ones(3), "lose")
    with pytest.raises(HostError, match="to give a loss, or tensors, but got str"):
        plain_step(Gives(lambda w, x: "text"), torch.ones(3))()


def test_a_model_that_fails_is_explained() -> None:
    run = plain_step(nn.Linear(3, 2), torch.ones(1, 4))
    with pytest.raises(
        HostError, match=r"Linear to run a training step on a tensor \(1, 4\), but it raised RuntimeError: mat1"
    ):
        run()
    with pytest.raises(HostError, match=r"KeyError: 'video' \(test_steps.py, line \d+\). Give a batch as"):
        plain_step(Gives(lambda w, x: x["video"]), {"img": torch.ones(1)})()


def test_a_step_in_a_trainer_sees_the_batch_as_a_training_does(user_folder: Path) -> None:
    with working_folder_first():
        host = build_model("user_code:Host")
    seen: list[Any] = []

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.rand(4, 2, 3, 4, 4), batch_size=2)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"video": batch * 2}

    def look(run: Any, batch: Any) -> None:
        seen.append((host.training, batch["video"].max() > 1, run().requires_grad, run().ndim))

    before = {name: value.clone() for name, value in host.state_dict().items()}
    in_trainer(host, Data(), look)
    assert seen == [(True, True, True, 0)]
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    assert not list(user_folder.glob("lightning_logs"))


def test_hosts_of_the_other_namespace() -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Other(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def training_step(self, batch: Tensor) -> Tensor:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    seen: list[float] = []
    assert namespace(Other()) == "pytorch_lightning"
    assert namespace(nn.Linear(1, 1)) is None
    in_trainer(Other(), torch.ones(1, 2), lambda run, batch: seen.append(float(run().detach())))
    assert len(seen) == 1


def test_a_trainer_that_does_not_get_there_is_explained(user_folder: Path) -> None:
    with working_folder_first():
        host = build_model("user_code:Host")
    host.configure_optimizers = lambda: 1 / 0
    with pytest.raises(HostError, match=r"Host to run a training step .*, but it raised ZeroDivisionError"):
        in_trainer(host, {"video": torch.rand(1, 1, 3, 4, 4)}, lambda run, batch: None)
    host = sys.modules["user_code"].Host()
    with pytest.raises(HostError, match="training data of Host to have a batch, but there was none"):
        in_trainer(host, L.LightningDataModule.from_datasets([]), lambda run, batch: None)


def test_batches_in_words() -> None:
    assert describe_batch((torch.zeros(2), [torch.zeros(3)])) == "a tensor (2,), a tensor (3,)"
    assert describe_batch({"key": ["a"]}) == "a dict of key"
    assert describe_batch(3) == "int"
