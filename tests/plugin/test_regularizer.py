"""The mixin: one call in the host's own training step."""

import lightning.pytorch as L
import pytest
import torch
from tiny_hosts import make_trainer
from torch.utils.data import DataLoader

from ssync_pl import SSyncConfig, SSyncMaps, SSyncRegularizer, ssync_loss
from ssync_pl.errors import ConfigError, HostError, SSyncError


class Plain(L.LightningModule):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.made = 0
        self.layer = torch.nn.Linear(5, 6)

    def parts(self, batch):
        out = self.layer(batch)
        # (B, 12, 6) to two maps (B, 1, 3, 12)
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


def batches():
    return DataLoader(torch.randn(8, 12, 5, generator=torch.Generator().manual_seed(1)), batch_size=2)


def train(kind, steps=6, **options):
    torch.manual_seed(0)
    host = kind(**options)
    trainer = run(host, steps)
    return host, trainer


def run(host, steps=6, **options):
    trainer = make_trainer(steps=steps, num_sanity_val_steps=1, limit_val_batches=1, **options)
    trainer.fit(host, batches(), batches() if hasattr(type(host), "ssync") else None)
    return trainer


@pytest.mark.parametrize("kind", [Mixed, Manual])
def test_same_as_by_hand_in_automatic_and_manual_optimization(kind):
    by_hand, _ = train(ByHand)
    host, trainer = train(kind, ssync={"warmup_steps": 2, "guard_window": 1})
    torch.testing.assert_close(host.layer.state_dict(), by_hand.layer.state_dict())
    names = {"ssync/boundary_loss", "ssync/interior_loss", "ssync/used_slots", "ssync/agreement"}
    assert names <= set(trainer.callback_metrics)
    # Step 0 is off and only checked; step 1 is watched; the rest is on; validation asks for nothing.
    assert host.made == 6


def test_maps_without_gradient_are_refused_in_the_first_step():
    class Detached(Mixed):
        def ssync(self, loss, maps):
            return super().ssync(loss, maps().detach())

    with pytest.raises(HostError, match="Detached to carry gradient"):
        train(Detached, ssync={"warmup_steps": 100})


def test_state_dict_gains_no_keys():
    assert set(Mixed().state_dict()) == {"layer.weight", "layer.bias"}


def test_settings_are_saved_and_loaded(tmp_path):
    host = Mixed(ssync=SSyncConfig(merge_threshold=0.6))
    run(host, steps=1, default_root_dir=tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    again = Mixed.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.ssync_config == host.ssync_config
    assert again.ssync_config.merge_threshold == 0.6


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="`merge_threshold`"):
        Mixed(ssync={"merge_threshold": 7})
    with pytest.raises(ConfigError, match="but got nothing"):
        Mixed(ssync={"nothing": 7})


def test_needs_a_trainer():
    with pytest.raises(SSyncError, match="Expected Mixed to run in a Trainer"):
        Mixed().ssync(torch.tensor(1.0), None)


def test_a_second_training_equals_one_of_a_fresh_host():
    torch.manual_seed(0)
    host = Mixed(ssync={"warmup_steps": 2, "guard_window": 2, "relative_weight": 0.2})
    run(host)
    fresh = Mixed(ssync=host.ssync_config)
    fresh.load_state_dict(host.state_dict())
    run(host)
    run(fresh)
    assert torch.equal(host.layer.weight, fresh.layer.weight)
    assert host._ssync_engine.state_dict() == fresh._ssync_engine.state_dict()


def test_hooks_of_the_host_are_still_called():
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

    host = Hooked(ssync={"warmup_steps": 0})
    trainer = run(host, steps=1)
    trainer.save_checkpoint("a.ckpt")
    assert called == [("setup", "fit"), "on_fit_start", ["ssync_regularizer"]]


def test_pytorch_lightning_host():
    pl = pytest.importorskip("pytorch_lightning")

    class Other(SSyncRegularizer, pl.LightningModule):
        configure_optimizers = Plain.configure_optimizers

        def __init__(self):
            super().__init__(ssync={"warmup_steps": 0})
            self.layer = torch.nn.Linear(5, 6)

        def training_step(self, batch, batch_idx):
            loss, d, a = Plain.parts(self, batch)
            return self.ssync(loss, SSyncMaps(attention_logits=d, mask_logits=a, grid=(3, 4)))

    trainer = make_trainer(steps=2, trainer=pl.Trainer)
    trainer.fit(Other(), batches())
    assert "ssync/boundary_loss" in trainer.callback_metrics
