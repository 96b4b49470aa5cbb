"""The wrapped training step: as a host that calls the loss itself, in every precision, compiled, averaged; unseen."""

import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from tiny_hosts import (
    HandWritten,
    Late,
    Recorder,
    TinyHost,
    TinyParts,
    assert_same_weights,
    assert_untouched,
    fit,
    in_hook,
    make_callback,
    make_host,
    make_loader,
    make_trainer,
)

import ssync_pl.plugin.engine
from ssync_pl.adapters import PathAdapter
from ssync_pl.adapters.paths import Pick
from ssync_pl.errors import HostError


class OneArgument(TinyHost):
    def training_step(self, batch):
        return self.host_loss(batch)[0]


class FromIterator(TinyHost):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.host_loss(batch)[0]


class BuildsLate(TinyHost):
    """Its modules exist only after `configure_model`, as Lightning recommends for sharded models."""

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
        (Late, {}, {"warmup_steps": 2}, {}),
        (HandWritten, {"grow": True}, {}, {"steps": 6}),
        (HandWritten, {"checkpointing": "non-reentrant"}, {}, {}),
        # What a reentrant checkpoint returns belongs to the graph; what it computes inside does not.
        (HandWritten, {"checkpointing": "reentrant"}, {}, {}),
        (HandWritten, {}, {}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        (HandWritten, {}, {}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
        (HandWritten, {}, {}, {"precision": "64-true"}),
        (HandWritten, {}, {}, {"precision": "bf16-true"}),
    ],
)
def test_trains_as_a_host_that_calls_the_loss_itself(kind, host, callback, options):
    expected, found = make_host(kind, **({"grow": True} if "grow" in host else {})), make_host(**host)
    expected.options = callback if kind is HandWritten else {}
    plain, recorder, by_hand = make_host(), Recorder(), Recorder()
    fit(expected, by_hand, **options)
    fit(found, make_callback(**callback), recorder, **options)
    torch.testing.assert_close(recorder.gradients, by_hand.gradients)
    torch.testing.assert_close(recorder.losses, by_hand.losses)
    assert_same_weights(found, expected)
    fit(plain, **options)
    assert not torch.allclose(plain.corrector.to_q.weight, found.corrector.to_q.weight)


AVERAGERS = [
    (name, options)
    for name, options in (
        ("StochasticWeightAveraging", {"swa_lrs": 1e-2, "swa_epoch_start": 1}),
        ("WeightAveraging", {}),
        ("EMAWeightAveraging", {"decay": 0.5}),
    )
    if hasattr(L.callbacks, name)  # the newer ones
]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("name", "options"), AVERAGERS)
def test_averaged_weights_are_those_of_a_host_that_calls_the_loss_itself(name, options, first):
    by_hand, host, callback = make_host(HandWritten), make_host(), make_callback()
    averagers = [getattr(L.callbacks, name)(**options) for _ in range(2)]
    fit(by_hand, averagers[0], steps=-1, max_epochs=3)
    fit(host, *([callback, averagers[1]] if first else [averagers[1], callback]), steps=-1, max_epochs=3)
    assert_same_weights(host, by_hand)
    assert_untouched(host)


def test_gradients_are_scaled_once_under_float16():
    """The loss has to be inside before the scaler multiplies: a huge scale would show in the gradients."""
    recorders = [Recorder(), Recorder(), Recorder()]
    for kind, recorder, half in zip((TinyHost, HandWritten, HandWritten), recorders, (True, True, False), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]} if half else {}
        fit(make_host(kind), *([make_callback()] if kind is TinyHost else []), recorder, **options)
    torch.testing.assert_close(recorders[0].gradients, recorders[1].gradients)
    torch.testing.assert_close(recorders[0].gradients[0], recorders[2].gradients[0], rtol=0.2, atol=2e-2)


def test_pytorch_lightning_hosts_and_trainers():
    pl = pytest.importorskip("pytorch_lightning")

    class OtherHost(TinyParts, pl.LightningModule):
        fails = False

        def training_step(self, batch, batch_idx):
            if self.fails:
                raise ValueError("on purpose")
            return super().training_step(batch, batch_idx)

    host, expected = make_host(OtherHost), make_host(HandWritten)
    fit(host, make_callback(), trainer=pl.Trainer)
    fit(expected)
    assert_same_weights(host, expected)
    assert_untouched(host)
    # Lightning itself refuses a host of the other namespace; the callback cannot mend that.
    with pytest.raises(TypeError, match=r"must be a `LightningModule`|You passed a"):
        fit(make_host(OtherHost), make_callback())
    host.fails = True
    with pytest.raises(ValueError, match="on purpose"):
        fit(host, make_callback(), trainer=pl.Trainer)
    assert_untouched(host)


def test_the_dict_of_the_host_is_not_changed_and_its_other_entries_are_passed_on():
    seen = []
    look = in_hook("on_train_batch_end", lambda trainer, host, outputs, *args: seen.append((outputs, host.kept)))
    fit(make_host(returns="dict"), make_callback(), look, steps=1)
    outputs, kept = seen[0]
    assert sorted(kept) == ["aux", "loss"]
    assert torch.equal(kept["loss"], kept["aux"])
    assert torch.equal(outputs["aux"], kept["aux"])
    assert outputs["loss"] > kept["loss"]


def test_a_host_with_a_training_step_of_its_instance_gets_it_back():
    host, calls = make_host(), []

    def own(batch, batch_idx):
        calls.append(batch_idx)
        return host.host_loss(batch)[0]

    host.training_step = own
    fit(host, make_callback(), steps=2)
    assert host.training_step is own
    assert calls == [0, 1]


def test_sanity_check_summary_and_validation_are_not_captured(monkeypatch):
    class Host(TinyHost):
        example_input_array = torch.rand(1, 2, 3, 3, 4)

    stages, take = [], Pick.__call__

    def spy(pick, module, args, output):
        stages.append((trainer.state.stage.value, pick.place.text))
        return take(pick, module, args, output)

    monkeypatch.setattr(Pick, "__call__", spy)
    checks = {"limit_val_batches": 1, "num_sanity_val_steps": 1, "val_check_interval": 2}
    trainer = make_trainer(make_callback(), L.callbacks.ModelSummary(), **checks)
    trainer.fit(make_host(Host), make_loader(), make_loader())
    # Four steps of two frames each, and the decoder once a step.
    assert stages == ([("train", "corrector:logits")] * 2 + [("train", "decoder:mask_logits")]) * 4


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
        ("whole", "aot_eager"),
        ("corrector", "eager"),
        ("both", "eager"),
        ("forward", "eager"),
        pytest.param("whole", "inductor", marks=pytest.mark.slow),
        pytest.param("both", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_hosts_have_the_same_gradients(way, backend):
    torch._dynamo.reset()
    expected, recorder, host = Recorder(), Recorder(), make_host()
    fit(make_host(Late), expected)
    trainer = make_trainer(make_callback(warmup_steps=2, guard_window=1), recorder)
    trainer.fit(compiled(host, way, backend), make_loader())
    named = [{k.replace("_orig_mod.", ""): v for k, v in step.items()} for step in recorder.gradients]
    torch.testing.assert_close(named, expected.gradients, rtol=1e-4, atol=1e-6)
    assert "ssync/boundary_loss" in trainer.callback_metrics
    assert not any(module._forward_hooks for module in host.modules())
    if way == "whole":  # a compiled host keeps its compiled step
        assert host.training_step is host.__dict__["training_step"]
        assert host.training_step.__wrapped__.__func__ is TinyHost.training_step


def test_a_host_that_ran_compiled_before_the_training():
    """Either the hooks are seen, or the message says what to do; and that helps."""
    torch._dynamo.reset()
    expected, host = make_host(Late), compiled(make_host(), "forward", "eager")
    fit(expected)
    host(next(iter(make_loader()))["video"])
    try:
        fit(host, make_callback(warmup_steps=2))
    except HostError as error:
        assert "torch._dynamo.reset()" in str(error)  # noqa: PT017
        torch._dynamo.reset()
        fit(host, make_callback(warmup_steps=2))
    assert_same_weights(host, expected)


def test_the_walk_of_a_batch_is_short(monkeypatch):
    """From the wrapped training step to the adapter and to the loss, a reader passes 8 functions in 6 files at most."""
    package, walk = str(Path(ssync_pl.__file__).parent), {}

    def look_at(owner, name):
        real = getattr(owner, name)

        def spy(*args, **kwargs):
            walk[real.__code__.co_filename, name] = None
            frame = sys._getframe(1)
            while frame is not None and frame.f_code.co_name != "_call_strategy_hook":
                if frame.f_code.co_filename.startswith(package):
                    walk[frame.f_code.co_filename, frame.f_code.co_name] = None
                frame = frame.f_back
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    look_at(PathAdapter, "collect")
    look_at(ssync_pl.plugin.engine, "ssync_loss")
    fit(make_host(), make_callback(), steps=1)
    assert {"__call__", "_step", "collect", "term", "ssync_loss"} == {function for _, function in walk}
    assert len(walk) <= 8
    assert len({file for file, _ in walk}) <= 6
