import pytest
import torch
from tiny_hosts import Late, MixinHost, TinyHost, fit, make_callback, make_host, make_loader, make_trainer, maps_of
from torch import nn
from torch.utils.data import DataLoader

from ssync_pl import LightningHost, SSyncConfig, SSyncRegularizer
from ssync_pl.errors import ConfigError, HostError, SSyncError


class Lazy(SSyncRegularizer, TinyHost):
    made = 0

    def training_step(self, batch, batch_idx):
        loss, logits, masks = self.host_loss(batch)

        def make():
            self.made += 1
            return maps_of(logits, masks)

        added = self.ssync(loss, make)
        assert added is loss or self.trainer.training
        return added

    validation_step = training_step


class Manual(Lazy):
    automatic = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Detached(MixinHost):
    def ssync(self, loss, maps):
        return super().ssync(loss, maps.detach())


@pytest.mark.parametrize("kind", [Lazy, Manual, TinyHost])
def test_same_as_by_hand_beside_validation_in_automatic_and_manual_optimization(kind):
    settings = {"warmup_steps": 2, "guard_window": 1}
    by_hand, host = make_host(Late), make_host(kind, **({} if kind is TinyHost else {"ssync": settings}))
    fit(by_hand, steps=6)
    callbacks = [make_callback(**settings)] if kind is TinyHost else []
    trainer = make_trainer(*callbacks, steps=6, num_sanity_val_steps=1, limit_val_batches=1, val_check_interval=2)
    trainer.fit(host, make_loader(), make_loader())
    torch.testing.assert_close(host.state_dict(), by_hand.state_dict())
    assert {"ssync/boundary_loss", "ssync/used_slots", "ssync/agreement"} <= set(trainer.callback_metrics)
    # Step 0 is off and only checked; step 1 is watched; the rest is on; validation asks for nothing.
    assert kind is TinyHost or host.made == 6


def test_settings_are_saved_and_loaded(tmp_path):
    host = make_host(Lazy, ssync=SSyncConfig(merge_threshold=0.6, warmup_steps=0))
    fit(host, steps=1).save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)  # it needs no pickle
    again = Lazy.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.ssync_config == host.ssync_config == SSyncConfig(merge_threshold=0.6, warmup_steps=0)


def test_refusals():
    with pytest.raises(HostError, match="Detached to carry gradient"):
        fit(make_host(Detached, ssync={"warmup_steps": 100}))
    with pytest.raises(ConfigError, match="`merge_threshold`"):
        MixinHost(ssync={"merge_threshold": 7})
    with pytest.raises(ConfigError, match="but got nothing"):
        MixinHost(ssync={"nothing": 7})
    with pytest.raises(ConfigError, match="`ssync` to be an SSyncConfig or a dict"):
        MixinHost(ssync=[1])
    with pytest.raises(SSyncError, match="Expected MixinHost to run in a Trainer"):
        MixinHost().ssync(torch.tensor(1.0), None)
    with pytest.warns(UserWarning, match="SSync never ran.*call self.ssync"):
        fit(make_host(type("Forgetful", (SSyncRegularizer, TinyHost), {})), steps=1)


def _loss(model, batch):
    error = model(batch).square().mean()
    return {"loss": 2 * error, "error": error, "prediction": model(batch)}


def test_a_plain_model_trains_with_the_given_optimizer_and_schedule():
    torch.manual_seed(0)
    model, seen, data = nn.Linear(3, 1), [], DataLoader(torch.randn(4, 3), batch_size=2)
    model.bias.requires_grad_(False)
    weight = model.weight.detach().clone().requires_grad_()

    def optimizer(parameters):
        seen.extend(parameters)
        return torch.optim.SGD(seen, lr=1.0)

    def scheduler(made):
        return torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.1 if step == 0 else 0.0)

    host = LightningHost(model, _loss, optimizer, scheduler, validation_loss=_loss)
    trainer = make_trainer(steps=-1, max_epochs=1, limit_val_batches=1)
    trainer.fit(host, data, data)
    assert [parameter is model.weight for parameter in seen] == [True]
    (2 * nn.functional.linear(next(iter(data)), weight, model.bias).square().mean()).backward()
    torch.testing.assert_close(model.weight.detach(), weight.detach() - 0.1 * weight.grad)
    logged = {name for name in trainer.callback_metrics if not name.endswith(("_step", "_epoch"))}
    assert logged == {"train/loss", "train/error", "val/loss", "val/error"}
    assert list(host.state_dict()) == ["model.weight", "model.bias"]
    default = LightningHost(model, _loss).configure_optimizers()
    assert (type(default), default.param_groups[0]["lr"]) == (torch.optim.Adam, 2e-4)


@pytest.mark.parametrize(("output", "got"), [(3.0, "float"), (torch.zeros(2), "shape"), ({"los": 1}, "NoneType")])
def test_other_losses_of_a_plain_model_are_refused(output, got):
    host = LightningHost(nn.Linear(3, 1), lambda model, batch: output)
    with pytest.raises(HostError, match=f"0-dim tensor, or a dict with one under 'loss', but got .*{got}"):
        host.training_step(torch.zeros(1, 3), 0)
