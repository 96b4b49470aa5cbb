"""During the warm-up nothing happens; after it, everything."""

import lightning.pytorch as L
import pytest
import torch
from tiny_hosts import (
    HandWritten,
    Recorder,
    TinyHost,
    assert_same_weights,
    fit,
    make_callback,
    make_clips,
    make_host,
    make_loader,
    maps_of,
)
from torch.utils.data import DataLoader, IterableDataset

import ssync_pl.plugin.engine
from ssync_pl import SSyncRegularizer
from ssync_pl.adapters import Capture
from ssync_pl.errors import ConfigError


class Stochastic(TinyHost):
    """Draws random numbers in its step, so that a shifted generator shows."""

    def training_step(self, batch, batch_idx):
        return self.host_loss(batch)[0] * (1 + torch.rand(()))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(make_clips(8))


@pytest.fixture
def calls(monkeypatch):
    """At which optimizer steps something is captured, and losses or slots are computed."""
    seen = {"capture": [], "loss": [], "slots": [], "step": 0}

    def spy(owner, name, kind):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            seen[kind].append(seen["step"])
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    spy(Capture, "open", "capture")
    spy(ssync_pl.plugin.engine, "ssync_loss", "loss")
    spy(ssync_pl.plugin.engine, "used_slots", "slots")

    class Step(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen["step"] = trainer.global_step

    return seen, Step()


def test_nothing_is_computed_before_the_watch_window(calls):
    seen, step = calls
    fit(make_host(), make_callback(warmup_steps=6, guard_window=2), step, steps=8)
    assert seen["capture"] == [0, 4, 5, 6, 7]
    assert seen["slots"] == [4, 5]
    assert seen["loss"] == [6, 7]


def test_a_warm_up_without_end_equals_a_training_without_the_callback():
    plain, host = make_host(Stochastic), make_host(Stochastic)
    one, two = Recorder(), Recorder()
    torch.manual_seed(3)
    fit(plain, one)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    fit(host, make_callback(warmup_steps=10**6), two)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_weights(host, plain, exact=True)
    torch.testing.assert_close(two.losses, one.losses, rtol=0, atol=0)


def test_random_numbers_are_not_touched_while_it_is_on():
    states = []
    for callbacks in ([], [make_callback()]):
        host = make_host(Stochastic)
        torch.manual_seed(3)
        fit(host, *callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_watching_does_not_change_the_training():
    plain, host = make_host(), make_host()
    fit(plain)
    fit(host, make_callback(warmup_steps=100, guard_window=100))
    assert_same_weights(host, plain, exact=True)


def test_the_switch_is_where_the_warm_up_ends():
    class Late(HandWritten):
        def training_step(self, batch, batch_idx):
            return self.host_loss(batch)[0] if self.global_step < 2 else super().training_step(batch, batch_idx)

    by_hand, host = make_host(Late), make_host()
    fit(by_hand)
    fit(host, make_callback(warmup_steps=2))
    assert_same_weights(host, by_hand)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_length_follows_from_epochs(accumulate):
    callback = make_callback(warmup_steps=None, warmup_ratio=0.3)
    fit(make_host(), callback, steps=-1, max_epochs=5, accumulate_grad_batches=accumulate)
    # 4 batches an epoch: 20 or 10 optimizer steps.
    assert callback.engine.schedule.start == 6 // accumulate


def test_length_follows_from_the_number_of_steps():
    callback = make_callback(warmup_steps=None, warmup_ratio=0.5)
    fit(make_host(), callback, steps=3)
    assert callback.engine.schedule.start == 2


@pytest.mark.parametrize(("options", "loader"), [({"max_epochs": -1, "max_time": {"minutes": 1}}, None), ({}, Stream)])
def test_unknown_length_is_refused_with_a_hint(options, loader):
    host = make_host()
    data = make_loader() if loader is None else DataLoader(loader(), batch_size=2)
    with pytest.raises(ConfigError, match="warmup_steps"):
        fit(host, make_callback(warmup_steps=None), loader=data, **{"max_epochs": 2, **options}, steps=-1)
    assert "training_step" not in host.__dict__


def test_unknown_length_is_fine_with_warmup_steps():
    data = DataLoader(Stream(), batch_size=2)
    trainer = fit(make_host(), make_callback(warmup_steps=1), loader=data, steps=-1, max_epochs=1)
    assert trainer.global_step == 4
    assert "ssync/weight" in trainer.callback_metrics


def test_ramp_in_training():
    recorder = Recorder()
    fit(make_host(), make_callback(warmup_steps=1, ramp_steps=4), recorder, steps=6)
    assert [round(logs.get("ssync/weight", 0.0), 6) for logs in recorder.logs] == [0, 0.25, 0.5, 0.75, 1, 1]


def train(mixin, callbacks=(), **options):
    """Trains with the callback or the mixin; returns the trainer, and the engine in it."""
    if mixin:
        torch.manual_seed(0)
        host = MixinHost(ssync=options)
        return fit(host, *callbacks, **SETTINGS), host._ssync_engine
    callback = make_callback(**{"warmup_steps": None, **options})
    return fit(make_host(), callback, *callbacks, **SETTINGS), callback.engine


SETTINGS = {"steps": -1, "max_epochs": 5}


class MixinHost(SSyncRegularizer, TinyHost):
    def training_step(self, batch, batch_idx):
        loss, logits, masks = self.host_loss(batch)
        return self.ssync(loss, maps_of(logits, masks))


class StopAfter(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


@pytest.mark.parametrize("mixin", [False, True])
def test_the_end_says_when_it_ran(mixin, caplog, recwarn):
    with caplog.at_level("INFO", logger="lightning.pytorch.ssync_pl"):
        train(mixin, warmup_ratio=0.3)
    told = [record.getMessage() for record in caplog.records if record.name == "lightning.pytorch.ssync_pl"]
    assert len(told) == 2
    assert all(word in told[0] for word in ("step 6", "backend 'torch'", "cpu"))
    assert told[1] == "SSync ran from optimizer step 6 to the end at step 20."
    assert not [w for w in recwarn if "SSync" in str(w.message)]


@pytest.mark.parametrize("mixin", [False, True])
def test_a_training_that_ends_before_its_warm_up_says_so(mixin):
    with pytest.warns(UserWarning, match="SSync never ran.*6 optimizer steps.*ended at step 4") as caught:
        train(mixin, callbacks=[StopAfter()], warmup_ratio=0.3)
    assert len([w for w in caught if "never ran" in str(w.message)]) == 1


@pytest.mark.parametrize("mixin", [False, True])
def test_the_warm_up_is_a_share_of_the_steps_that_are_taken(mixin):
    # 4 steps in the first epoch, then one in each: 8, and not the 20 of the first epoch's pace.
    trainer, engine = train(
        mixin, callbacks=[L.callbacks.GradientAccumulationScheduler({0: 1, 1: 4})], warmup_ratio=0.5
    )
    assert (engine.first_step, trainer.global_step) == (4, 8)


@pytest.mark.parametrize("mixin", [False, True])
def test_the_length_is_asked_for_again_when_it_changes(mixin):
    class Shorter(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.fit_loop.max_epochs = 3

    assert train(mixin, callbacks=[Shorter()], warmup_ratio=0.5)[1].first_step == 6
