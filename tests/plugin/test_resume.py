import copy
import pickle
import random

import lightning.pytorch as L
import numpy as np
import pytest
import tiny_hosts as tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_hosts import EXACT, assert_untouched, either, fit, in_hook, make_callback, make_host, make_loader
from torch.utils.data import DataLoader

from ssync_pl import StepSeed
from ssync_pl.errors import ConfigError


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["on_fit_start", "on_train_start", "host_loss", "on_after_backward", "on_train_end"])
def test_an_error_anywhere_and_another_training_after_it(where, error):
    def fail(*args):
        raise error("on purpose")

    for order in (1, -1):
        host, callbacks = make_host(), [make_callback(), in_hook(where, fail)]
        if where == "host_loss":
            host.host_loss = fail
        with pytest.raises((error, SystemExit)):
            fit(host, *callbacks[::order], steps=1)
        assert_untouched(host)
    host.__dict__.pop("host_loss", None)
    assert "ssync/boundary_loss" in fit(host, callbacks[0], steps=2).callback_metrics
    assert_untouched(host)


@pytest.mark.parametrize("mixin", [False, True])
def test_a_second_training_equals_one_of_a_fresh_callback_or_host(mixin):
    settings = {"warmup_steps": 2, "guard_window": 2, "relative_weight": 0.2}
    (one, callbacks), (two, fresh) = either(mixin, **settings), either(mixin, **settings)
    fit(one, *callbacks)
    two.load_state_dict(one.state_dict())
    fit(one, *callbacks)
    fit(two, *fresh)
    tiny.assert_same_weights(one, two, **EXACT)


def test_validation_and_a_search_for_a_learning_rate_are_not_touched():
    host, callback, seen = make_host(), make_callback(), []

    def look(trainer, module, *args):
        seen.append(callback._session)
        assert_untouched(module)

    trainer = tiny.make_trainer(callback, in_hook("on_validation_batch_end", look), limit_val_batches=1)
    trainer.validate(host, make_loader(), verbose=False)
    assert seen == [None]
    tiny.assert_same_weights(host, make_host(), **EXACT)
    options = {"num_training_steps": 5, "early_stop_threshold": None, "update_attr": False}
    fit(host, callback, L.callbacks.LearningRateFinder(**options))
    assert callback.engine.guard.state_dict()["count"] == 4
    assert_untouched(host)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_batch_start", "on_after_backward", "on_train_end"])
def test_copies_taken_during_a_training_run_the_plain_step_and_train_on(way, hook):
    host, plain, copies = make_host(), make_host(), []
    callback = make_callback(relative_weight=0.1, guard_window=2)
    look = in_hook(hook, lambda trainer, module, *args: copies.append((way(module), way(callback))))
    fit(host, callback, look, steps=2)
    twin, other = copies[-1]
    plain.load_state_dict(twin.state_dict())
    batch = next(iter(make_loader()))
    assert torch.equal(twin.training_step(batch, 0), plain.training_step(batch, 0))
    fit(twin, other, steps=3)
    fit(plain, make_callback(relative_weight=0.1, guard_window=2), steps=3)
    tiny.assert_same_weights(twin, plain, **EXACT)


GUARDED = {"on_collapse": "backoff", "collapse_threshold": 0.99, "relative_weight": 0.3}


@pytest.mark.filterwarnings("ignore:Slots fall out of use")
@pytest.mark.parametrize("options", [GUARDED, {"ramp_steps": 9, "warmup_steps": 3}, {"mode": "auto"}])
@pytest.mark.parametrize("stop", [2, 7])
@pytest.mark.parametrize("mixin", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, options, stop, mixin):
    options, path, ends = {"warmup_steps": 2, "guard_window": 3, **options}, tmp_path / f"step={stop}.ckpt", []
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    # Lightning starts the epoch's data over when it resumes inside an epoch, so all batches are alike.
    data = DataLoader(tiny.make_clips(2) * 4, batch_size=2)
    for extra, more in ([saver], {"enable_checkpointing": True}), ([], {"ckpt_path": str(path)}):
        host, callbacks = either(mixin, **options)
        host.collapse_at = 4
        fit(host, *callbacks, *extra, steps=10, loader=data, **more)
        ends.append((tiny.weights(host), (host._ssync_engine if mixin else callbacks[0].engine).state_dict()))
    torch.testing.assert_close(ends[0][0], ends[1][0], **EXACT)
    assert str(ends[0][1]) == str(ends[1][1])  # in which NaN equals NaN
    assert set(torch.load(path, weights_only=True)["state_dict"]) == set(tiny.weights(make_host()))


STEPS, EPOCHS = {"every_n_train_steps": 1}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}


@pytest.mark.parametrize(
    ("mixin", "pace", "save", "steps"),
    [
        *((True, {0: 1}, STEPS, -1), (False, {0: 1, 1: 2}, STEPS, -1), (False, {0: 3, 1: 1}, STEPS, 7)),
        *((False, {0: 2, 1: 1}, EPOCHS, -1), (False, {0: 2}, EPOCHS, 99), (True, {1: 3}, EPOCHS, 99)),
    ],
)
def test_a_run_resumed_after_each_step_or_each_epoch_equals_the_uninterrupted_one(tmp_path, mixin, pace, save, steps):
    data = DataLoader(tiny.make_clips(2) * 4, batch_size=2)

    def run(folder, ckpt_path=None):
        host, callbacks = either(mixin, warmup_ratio=0.3, warmup_steps=None, relative_weight=0.3)
        saver = ModelCheckpoint(folder, "{step:02d}", save_top_k=-1, **save)
        callbacks += [saver, StepSeed(0), L.callbacks.GradientAccumulationScheduler(dict(pace))]
        options = {"steps": steps, "max_epochs": 3, "loader": data, "enable_checkpointing": True}
        trainer = fit(host, *callbacks, ckpt_path=ckpt_path, **options)
        return (trainer.global_step, tiny.weights(host)), sorted(folder.glob("*.ckpt"))

    whole, saved = run(tmp_path)
    while saved:  # each goes on from the first checkpoint of the one before
        end, saved = run(tmp_path / saved[0].stem, saved[0])
        torch.testing.assert_close(end, whole, **EXACT)


@pytest.mark.parametrize("settings", [{"warmup_steps": None, "warmup_ratio": 0.5}, {"warmup_steps": 2}])
@pytest.mark.parametrize("mixin", [False, True])
def test_a_training_that_is_made_longer_leaves_ssync_on(tmp_path, settings, mixin):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    host, callbacks = either(mixin, **settings)
    fit(host, *callbacks, saver, steps=4, enable_checkpointing=True)
    host, callbacks = either(mixin, **settings)
    fit(host, *callbacks, steps=20, ckpt_path=saver.best_model_path)
    engine = host._ssync_engine if mixin else callbacks[0].engine
    assert (engine.first_step, engine.schedule.start) == (2, 2)


def test_a_checkpoint_of_the_plain_host_is_resumed(tmp_path):
    saver, host, callback = ModelCheckpoint(tmp_path), make_host(), make_callback(warmup_steps=3)
    fit(host, saver, steps=2, enable_checkpointing=True)
    assert fit(host, callback, steps=4, ckpt_path=saver.best_model_path).global_step == 4
    assert callback.engine.first_step == 3


class Draws(tiny.TinyHost):
    def note(self, batch, batch_idx):
        draw = float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002
        self.draws.setdefault(self.trainer.training, []).append(draw)

    def training_step(self, batch, batch_idx):
        self.note(batch, batch_idx)
        return super().training_step(batch, batch_idx)

    validation_step = note


def test_random_numbers_of_a_seeded_step_depend_on_its_place_alone(monkeypatch):
    def draws(seed, state, validate):
        host = make_host(Draws)
        host.draws = {}
        torch.manual_seed(state)
        options = {"max_epochs": 2, "limit_val_batches": validate, "num_sanity_val_steps": 0}
        tiny.make_trainer(StepSeed(seed), steps=-1, **options).fit(host, make_loader(6), make_loader(6))
        return host.draws.get(True), host.draws.get(False)

    (one, validation), (same, _), (other, _) = draws(0, 0, 2), draws(0, 1, 0), draws(1, 0, 0)
    assert one == same
    assert len(set(one)) == 6
    assert not set(one) & set(other)
    assert validation[:2] == validation[2:]
    assert len(set(validation)) == 2
    assert StepSeed(0).number("fit", 0, 0, 0) != StepSeed(0).number("fit", 1, 0, 0)  # ranks draw differently
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert StepSeed().number("fit", 0, 0, 0) == StepSeed(5).number("fit", 0, 0, 0)
    with pytest.raises(ConfigError, match="`seed` to be 0 or more"):
        StepSeed(-1)


def test_accumulated_batches_are_not_lost_by_a_resume(tmp_path):
    """A checkpoint in the middle of an optimizer step is not written by a resume, and not taken."""
    middle, saved = tmp_path / "middle.ckpt", []

    def save(trainer, module, outputs, batch, index):
        if index == 0:
            trainer.save_checkpoint(middle)

    def run(*callbacks, epochs=2, ckpt_path=None):
        settings = {"steps": -1, "enable_checkpointing": True, "accumulate_grad_batches": 2, "max_epochs": epochs}
        fit(make_host(), StepSeed(0), *callbacks, ckpt_path=ckpt_path, **settings)

    first = ModelCheckpoint(tmp_path / "a", every_n_train_steps=2, save_last=True)
    run(first, in_hook("on_train_batch_end", save), epochs=1)
    again = ModelCheckpoint(tmp_path / "b", every_n_train_steps=2)
    again._save_checkpoint = lambda trainer, path: saved.append(trainer.global_step)
    run(again, ckpt_path=first.last_model_path)
    assert saved == [4]
    with pytest.raises(ConfigError, match="1 of 2 accumulated batches"):
        run(ckpt_path=middle)
