"""The mixin: one call in the host's own training step; and a plain PyTorch model in a Trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
from tiny_hosts import make_trainer
from torch import nn
from torch.utils.data import DataLoader

from ssync_pl import LightningHost, SSyncConfig, SSyncMaps, SSyncRegularizer, ssync_loss
from ssync_pl.errors import ConfigError, HostError, SSyncError


class Plain(L.LightningModule):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.made = 0
        self.layer = nn.Linear(5, 6)

    def parts(self, batch):
        # (B, 12, 6) to two maps (B, 1, 3, 12)
        out = self.layer(batch)
        d, a = out.transpose(1, 2).unsqueeze(1).split(3, dim=2)
        return out.square().mean(), 3 * d, 3 * a

    def maps(self, d, a):
        self.made += 1
        return SSyncMaps(attention_logits=d, mask_logits=a, grid=(3, 4))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByHand(Plain):
    def training_step(self, batch, batch_idx):
        loss, d, a = self.parts(batch)
        return loss + ssync_loss(self.maps(d, a)).loss if self.global_step >= 2 else loss


class Mixed(SSyncRegularizer, Plain):
    called: Any = None

    def training_step(self, batch, batch_idx):
        loss, d, a = self.parts(batch)
        return self.ssync(loss, lambda: self.maps(d, a))

    def validation_step(self, batch, batch_idx):
        loss, d, a = self.parts(batch)
        assert self.ssync(loss, lambda: self.maps(d, a)) is loss


class Manual(Mixed):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Detached(Mixed):
    def ssync(self, loss, maps):
        return super().ssync(loss, maps().detach())


def batches():
    return DataLoader(torch.randn(8, 12, 5, generator=torch.Generator().manual_seed(1)), batch_size=2)


def run(host, steps=6, **options):
    trainer = make_trainer(steps=steps, num_sanity_val_steps=1, limit_val_batches=1, **options)
    trainer.fit(host, batches(), batches() if hasattr(type(host), "ssync") else None)
    return trainer


def made(kind, **options):
    torch.manual_seed(0)
    return kind(**options)


@pytest.mark.parametrize("kind", [Mixed, Manual])
def test_same_as_by_hand_in_automatic_and_manual_optimization(kind):
    by_hand, host = made(ByHand), made(kind, ssync={"warmup_steps": 2, "guard_window": 1})
    assert set(host.state_dict()) == {"layer.weight", "layer.bias"}
    run(by_hand)
    trainer = run(host)
    torch.testing.assert_close(host.layer.state_dict(), by_hand.layer.state_dict())
    names = {"ssync/boundary_loss", "ssync/interior_loss", "ssync/used_slots", "ssync/agreement"}
    assert names <= set(trainer.callback_metrics)
    # Step 0 is off and only checked; step 1 is watched; the rest is on; validation asks for nothing.
    assert host.made == 6


def test_settings_are_saved_and_loaded_and_hooks_of_the_host_called(tmp_path):
    called = []

    class Hooked(Mixed):
        def setup(self, stage):
            super().setup(stage)
            called.append(("setup", stage))

        def on_fit_start(self):
            super().on_fit_start()
            called.append("on_fit_start")

        def on_save_checkpoint(self, checkpoint):
            super().on_save_checkpoint(checkpoint)
            called.append(sorted(k for k in checkpoint if k.startswith("ssync")))

    host = made(Hooked, ssync=SSyncConfig(merge_threshold=0.6, warmup_steps=0))
    run(host, steps=1).save_checkpoint(tmp_path / "a.ckpt")
    assert called == [("setup", "fit"), "on_fit_start", ["ssync_regularizer"]]
    again = Mixed.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.ssync_config == host.ssync_config
    assert again.ssync_config.merge_threshold == 0.6


def test_refusals():
    with pytest.raises(HostError, match="Detached to carry gradient"):
        run(made(Detached, ssync={"warmup_steps": 100}))
    with pytest.raises(ConfigError, match="`merge_threshold`"):
        Mixed(ssync={"merge_threshold": 7})
    with pytest.raises(ConfigError, match="but got nothing"):
        Mixed(ssync={"nothing": 7})
    with pytest.raises(SSyncError, match="Expected Mixed to run in a Trainer"):
        Mixed().ssync(torch.tensor(1.0), None)


def test_a_second_training_equals_one_of_a_fresh_host():
    host = made(Mixed, ssync={"warmup_steps": 2, "guard_window": 2, "relative_weight": 0.2})
    run(host)
    fresh = Mixed(ssync=host.ssync_config)
    fresh.load_state_dict(host.state_dict())
    run(host)
    run(fresh)
    assert torch.equal(host.layer.weight, fresh.layer.weight)
    assert host._ssync_engine.state_dict() == fresh._ssync_engine.state_dict()


def test_a_host_of_pytorch_lightning():
    pl = pytest.importorskip("pytorch_lightning")

    class Other(SSyncRegularizer, pl.LightningModule):
        configure_optimizers = Plain.configure_optimizers

        def __init__(self):
            super().__init__(ssync={"warmup_steps": 0})
            self.layer = nn.Linear(5, 6)

        def training_step(self, batch, batch_idx):
            loss, d, a = Plain.parts(self, batch)
            return self.ssync(loss, SSyncMaps(attention_logits=d, mask_logits=a, grid=(3, 4)))

    trainer = make_trainer(steps=2, trainer=pl.Trainer)
    trainer.fit(Other(), batches())
    assert "ssync/boundary_loss" in trainer.callback_metrics


def _loss(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    error = model(batch).square().mean()
    return {"loss": 2 * error, "error": error, "prediction": model(batch)}


def test_a_plain_model_trains_with_the_given_optimizer_and_schedule():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(False)
    before, seen = model.weight.detach().clone(), []
    data = DataLoader(torch.randn(4, 3), batch_size=2)

    def optimizer(parameters):
        seen.extend(parameters)
        return torch.optim.SGD(seen, lr=1.0)

    def scheduler(made):
        return torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.1 if step == 0 else 0.0)

    host = LightningHost(model, _loss, optimizer, scheduler, validation_loss=_loss)
    trainer = make_trainer(steps=-1, max_epochs=1, limit_val_batches=1)
    trainer.fit(host, data, data)
    assert [parameter is model.weight for parameter in seen] == [True]
    first = next(iter(data))
    weight = before.clone().requires_grad_()
    (2 * nn.functional.linear(first, weight, model.bias).square().mean()).backward()
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * weight.grad)
    assert set(trainer.callback_metrics) >= {"train/loss", "train/error", "val/loss", "val/error"}
    assert "train/prediction" not in trainer.callback_metrics
    assert list(host.state_dict()) == ["model.weight", "model.bias"]
    torch.testing.assert_close(host(first), model(first))
    default = LightningHost(model, _loss).configure_optimizers()
    assert isinstance(default, torch.optim.Adam)
    assert default.param_groups[0]["lr"] == 2e-4


@pytest.mark.parametrize(
    ("output", "got"), [(3.0, "float"), (torch.zeros(2), r"shape \(2,\)"), ({"los": 1}, "NoneType")]
)
def test_other_losses_of_a_plain_model_are_refused(output, got):
    host = LightningHost(nn.Linear(3, 1), lambda model, batch: output)
    with pytest.raises(HostError, match=f"0-dim tensor, or a dict with one under 'loss', but got .*{got}"):
        host.training_step(torch.zeros(1, 3), 0)
