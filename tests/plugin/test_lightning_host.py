"""A plain PyTorch model in a Trainer."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ssync_pl import LightningHost
from ssync_pl.errors import HostError

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def _loss(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    error = model(batch).square().mean()
    return {"loss": 2 * error, "error": error, "prediction": model(batch)}


def _data() -> DataLoader:
    return DataLoader(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), batch_size=2)


def test_trains_with_the_given_optimizer_and_schedule():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(False)
    before, bias = model.weight.detach().clone(), model.bias.detach().clone()
    seen = []

    def optimizer(parameters):
        seen.extend(parameters)
        return torch.optim.SGD(seen, lr=1.0)

    def scheduler(made):
        return torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.1 if step == 0 else 0.0)

    host = LightningHost(model, _loss, optimizer, scheduler, validation_loss=_loss)
    trainer = L.Trainer(max_epochs=1, **QUIET)
    trainer.fit(host, _data(), _data())
    assert [parameter is model.weight for parameter in seen] == [True]
    first = next(iter(_data()))
    expected = before - 0.1 * torch.autograd.functional.jacobian(
        lambda weight: 2 * (nn.functional.linear(first, weight, bias)).square().mean(), before
    )
    torch.testing.assert_close(model.weight.detach(), expected)
    assert set(trainer.callback_metrics) >= {"train/loss", "train/error", "val/loss", "val/error"}
    assert "train/prediction" not in trainer.callback_metrics
    assert list(host.state_dict()) == ["model.weight", "model.bias"]
    torch.testing.assert_close(host(first), model(first))


def test_adam_is_the_default():
    host = LightningHost(nn.Linear(3, 1), _loss)
    made = host.configure_optimizers()
    assert isinstance(made, torch.optim.Adam)
    assert made.param_groups[0]["lr"] == 2e-4
    assert host.validation_step(torch.zeros(1, 3), 0) is None


@pytest.mark.parametrize(
    ("output", "got"), [(3.0, "float"), (torch.zeros(2), r"shape \(2,\)"), ({"los": 1}, "NoneType")]
)
def test_other_losses_are_refused(output, got):
    host = LightningHost(nn.Linear(3, 1), lambda model, batch: output)
    with pytest.raises(HostError, match=f"0-dim tensor, or a dict with one under 'loss', but got .*{got}"):
        host.training_step(torch.zeros(1, 3), 0)
