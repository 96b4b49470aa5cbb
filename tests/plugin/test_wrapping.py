import copy

import lightning.pytorch as L
import pytest
import tiny_hosts as tiny
import torch
from lightning.pytorch.plugins import MixedPrecision
from packaging.version import Version
from tiny_hosts import HandWritten, Recorder, TinyHost, assert_same_weights, fit, make_callback, make_host, make_loader

from ssync_pl import SSyncCallback, SSyncRegularizer
from ssync_pl.plugin.callback import callback_class


class OneArgument(TinyHost):
    def training_step(self, batch):
        return self.host_loss(batch)[0]


class FromIterator(TinyHost):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.host_loss(batch)[0]


class BuildsLate(TinyHost):
    def __init__(self):
        super().__init__()
        self.parts = (self.corrector, self.decoder)
        del self.corrector, self.decoder
        self.parts_built = False

    def configure_model(self):
        if not self.parts_built:
            self.corrector, self.decoder = self.parts
            self.parts_built = True


class Skipping(HandWritten):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 == 0 else super().training_step(batch, batch_idx)


LOSS = {"merge_threshold": 0.1, "n_bd": 2, "temperature": 0.7, "boundary_weight": 0.3, "interior_weight": 2.0}


def averaged(name, order, **settings):
    options = {"also": lambda: (getattr(L.callbacks, name)(**settings), order), "steps": -1, "max_epochs": 3}
    missing = pytest.mark.skipif(not hasattr(L.callbacks, name), reason="needs a newer Lightning")
    return pytest.param(HandWritten, {}, {}, options, marks=missing)


SCALER = torch.amp.GradScaler("cpu", init_scale=2.0**12)  # the loss has to be inside before it multiplies


@pytest.mark.parametrize(
    ("kind", "host", "callback", "options"),
    [
        (HandWritten, {}, {}, {}),
        (HandWritten, {"returns": "dict"}, {}, {}),
        (HandWritten, {"kind": OneArgument}, {}, {}),
        (HandWritten, {"kind": FromIterator}, {}, {}),
        (HandWritten, {"kind": BuildsLate}, {}, {}),
        (HandWritten, {}, {**LOSS, "loss": "ce"}, {}),
        (Skipping, {"returns": "none"}, {}, {}),
        (tiny.Late, {}, {"warmup_steps": 2}, {}),
        (HandWritten, {"grow": True}, {}, {"steps": 6}),
        (HandWritten, {"checkpointing": "non-reentrant"}, {}, {}),
        # What a reentrant checkpoint returns belongs to the graph; what it computes inside does not.
        (HandWritten, {"checkpointing": "reentrant"}, {}, {}),
        (HandWritten, {}, {}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        (HandWritten, {}, {}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
        (HandWritten, {}, {}, {"precision": "64-true"}),
        (HandWritten, {}, {}, {"precision": "bf16-true"}),
        (HandWritten, {}, {}, {"plugins": lambda: [MixedPrecision("16-mixed", "cpu", scaler=copy.deepcopy(SCALER))]}),
        averaged("StochasticWeightAveraging", 1, swa_lrs=1e-2, swa_epoch_start=1),
        averaged("WeightAveraging", 1),
        averaged("WeightAveraging", -1),
        averaged("EMAWeightAveraging", -1, decay=0.5),
    ],
)
def test_trains_as_a_host_that_calls_the_loss_itself(kind, host, callback, options):
    def run(module, *callbacks):
        made = {name: value() if callable(value) else value for name, value in options.items()}
        also, order = made.pop("also", (None, 1))
        fit(module, *[*callbacks, *([also] if also else [])][::order], **made)

    expected, found = make_host(kind, **({"grow": True} if "grow" in host else {})), make_host(**host)
    expected.options = callback if kind is HandWritten else {}
    plain, recorder, by_hand = make_host(), Recorder(), Recorder()
    run(expected, by_hand)
    run(found, make_callback(**callback), recorder)
    torch.testing.assert_close(recorder.gradients, by_hand.gradients)
    torch.testing.assert_close(recorder.losses, by_hand.losses)
    assert_same_weights(found, expected)
    tiny.assert_untouched(found)
    run(plain)
    assert not torch.allclose(plain.corrector.to_q.weight, found.corrector.to_q.weight)


def test_hosts_of_pytorch_lightning_with_the_callback_and_the_mixin():
    pl = pytest.importorskip("pytorch_lightning")

    class Other(tiny.TinyParts, pl.LightningModule):
        pass

    class OtherMixin(SSyncRegularizer, Other):
        training_step = tiny.MixinHost.training_step

    host, mixin, expected = make_host(Other), make_host(OtherMixin, ssync={"warmup_steps": 0}), make_host(HandWritten)
    takes_ours = Version(pl.__version__) >= Version("2.6")  # 2.5.1 still wants callbacks of its own package
    fit(host, make_callback(SSyncCallback if takes_ours else callback_class(pl)), trainer=pl.Trainer)
    fit(mixin, trainer=pl.Trainer)
    fit(expected)
    assert_same_weights(host, expected)
    assert_same_weights(mixin, expected)
    tiny.assert_untouched(host)


def test_the_dict_of_the_host_is_not_changed_and_its_other_entries_are_passed_on():
    seen = []
    look = tiny.in_hook("on_train_batch_end", lambda trainer, host, outputs, *args: seen.append((outputs, host.kept)))
    fit(make_host(returns="dict"), make_callback(), look, steps=1)
    outputs, kept = seen[0]
    assert sorted(kept) == ["aux", "loss"]
    assert torch.equal(kept["loss"], kept["aux"])
    assert torch.equal(outputs["aux"], kept["aux"])
    assert outputs["loss"] > kept["loss"]


def test_a_host_with_a_training_step_of_its_instance_gets_it_back():
    host = make_host()
    host.training_step = own = lambda batch, batch_idx: host.host_loss(batch)[0]
    assert "ssync/boundary_loss" in fit(host, make_callback(), steps=2).callback_metrics
    assert host.training_step is own


def compiled(host, way, backend):
    if way in ("corrector", "both"):
        host.corrector = torch.compile(host.corrector, backend=backend)
    if way == "both":
        host.decoder.compile(backend=backend)
    if way == "forward":
        host.forward = torch.compile(host.forward, backend=backend)
    return torch.compile(host, backend=backend) if way == "whole" else host


@pytest.mark.parametrize(
    ("way", "backend"),
    [
        ("whole", "eager"),
        ("corrector", "aot_eager"),
        ("both", "eager"),
        ("forward", "eager"),
        pytest.param("whole", "inductor", marks=pytest.mark.slow),
        pytest.param("both", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_hosts_have_the_same_gradients(way, backend):
    torch._dynamo.reset()
    expected, recorder, host = Recorder(), Recorder(), make_host()
    fit(make_host(tiny.Late), expected)
    trainer = tiny.make_trainer(make_callback(warmup_steps=2, guard_window=1), recorder)
    trainer.fit(compiled(host, way, backend), make_loader())
    named = [{k.replace("_orig_mod.", ""): v for k, v in step.items()} for step in recorder.gradients]
    torch.testing.assert_close(named, expected.gradients, rtol=1e-4, atol=1e-6)
    assert "ssync/boundary_loss" in trainer.callback_metrics
    assert not any(module._forward_hooks for module in host.modules())
