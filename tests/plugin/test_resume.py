"""The host is put back however a training ends; copies, pickles and checkpoints train on as if nothing had happened."""

import copy
import pickle
import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from tiny_hosts import (
    MixinHost,
    TinyHost,
    assert_same_weights,
    assert_untouched,
    fit,
    in_hook,
    make_callback,
    make_clips,
    make_host,
    make_loader,
    make_trainer,
    weights,
)
from torch.utils.data import DataLoader

from ssync_pl import StepSeed
from ssync_pl.errors import ConfigError

WAYS = pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])


@pytest.mark.parametrize("error", [ValueError("on purpose"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_an_error_in_the_training_step_and_another_training_after_it(error):
    def fail(batch):
        if host.global_step == 2:
            raise error
        return TinyHost.host_loss(host, batch)

    host, callback = make_host(), make_callback()
    host.host_loss = fail
    with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
        fit(host, callback)
    assert_untouched(host)
    trainer = fit(host, callback, steps=2)
    assert "ssync/boundary_loss" in trainer.callback_metrics
    assert_untouched(host)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_after_backward", "on_train_end"])
@pytest.mark.parametrize("order", [0, 1])
def test_an_error_in_another_callback(hook, order):
    def fail(*args):
        raise ValueError(f"in {hook}")

    host, callbacks = make_host(), [make_callback(), in_hook(hook, fail)]
    with pytest.raises(ValueError, match=f"in {hook}"):
        fit(host, *(callbacks if order else callbacks[::-1]), steps=1)
    assert_untouched(host)


def test_two_trainings_with_one_callback_or_trainer_equal_two_with_fresh_ones():
    one, two, callback = make_host(), make_host(), make_callback(relative_weight=0.5, guard_window=2)
    for _ in range(2):
        fit(one, callback)
        fit(two, make_callback(relative_weight=0.5, guard_window=2))
    assert_same_weights(one, two, exact=True)
    assert_untouched(one)
    trainer = make_trainer(callback := make_callback(), steps=2)
    trainer.fit(one, make_loader())
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(one, make_loader())
    assert callback.engine.guard.state_dict()["count"] == 2


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_are_not_touched(stage):
    host, callback, seen = make_host(), make_callback(), []

    def look(trainer, module, *args):
        seen.append(callback._session)
        assert_untouched(module)

    hook = in_hook(f"on_{stage.replace('validate', 'validation')}_batch_end", look)
    trainer = make_trainer(callback, hook, limit_val_batches=1, limit_test_batches=1, limit_predict_batches=1)
    getattr(trainer, stage)(host, make_loader(), **({"verbose": False} if stage != "predict" else {}))
    assert seen == [None]
    assert_same_weights(host, make_host(), exact=True)


def test_a_search_for_a_learning_rate_runs_the_plain_step():
    options = {"early_stop_threshold": None, "update_attr": False}
    found = []
    for callbacks in ([make_callback()], []):
        host = make_host()
        host.lr = 1e-3
        trainer = make_trainer(*callbacks)
        found.append(Tuner(trainer).lr_find(host, make_loader(), num_training=5, **options).results)
        assert_untouched(host)
        if callbacks:
            trainer.fit(host, make_loader())
            assert callbacks[0].engine.guard.state_dict()["count"] == 4
    assert found[0] == found[1]
    callback = make_callback()
    fit(host, callback, L.callbacks.LearningRateFinder(num_training_steps=5, **options))
    assert callback.engine.guard.state_dict()["count"] == 4
    assert_untouched(host)


@WAYS
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_batch_start", "on_after_backward", "on_train_end"])
def test_copies_taken_during_a_training_run_the_plain_step_and_train_on(way, hook):
    host, copies = make_host(), []
    callback = make_callback(relative_weight=0.1, guard_window=2)
    look = in_hook(hook, lambda trainer, module, *args: copies.append((way(module), way(callback))))
    fit(host, callback, look, steps=2)
    twin, other = copies[-1]
    assert other._session is None
    plain, batch = make_host(), next(iter(make_loader()))
    plain.load_state_dict(twin.state_dict())
    assert torch.equal(twin.training_step(batch, 0), plain.training_step(batch, 0))
    fit(twin, other, steps=3)
    fit(plain, make_callback(relative_weight=0.1, guard_window=2), steps=3)
    assert_same_weights(twin, plain, exact=True)


OPTIONS = {
    "relative": {"relative_weight": 0.3},
    "guarded": {"on_collapse": "backoff", "collapse_threshold": 0.99, "relative_weight": 0.3},
    "ramp": {"ramp_steps": 9, "warmup_steps": 3},
}


@pytest.mark.filterwarnings("ignore:Slots fall out of use")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("stop", [2, 7])
@pytest.mark.parametrize("mixin", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, options, stop, mixin):
    options = {"warmup_steps": 2, "guard_window": 3, **options}
    # Lightning starts the epoch's data over when it resumes inside an epoch, so all batches are alike.
    data, runs = DataLoader(make_clips(2) * 4, batch_size=2), []
    for resumed in (False, True):
        host = make_host(MixinHost, ssync=options) if mixin else make_host()
        callbacks = [] if mixin else [make_callback(**options)]
        host.collapse_at = 4
        if resumed:
            path = tmp_path / f"step={stop}.ckpt"
            assert set(torch.load(path, weights_only=True)["state_dict"]) == set(weights(make_host()))
            fit(host, *callbacks, steps=10, loader=data, ckpt_path=str(path))
        else:
            saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
            fit(host, *callbacks, saver, steps=10, loader=data, enable_checkpointing=True)
        runs.append((host, host._ssync_engine if mixin else callbacks[0].engine))
    assert_same_weights(runs[0][0], runs[1][0], exact=True)
    assert runs[0][1].state_dict() == runs[1][1].state_dict()


def test_checkpoints_are_interchangeable_with_those_of_the_plain_host(tmp_path):
    host, plain, saver = make_host(), make_host(), ModelCheckpoint(tmp_path / "with")
    fit(host, make_callback(), saver, enable_checkpointing=True)
    plain.load_state_dict(torch.load(saver.best_model_path, weights_only=True)["state_dict"])
    assert_same_weights(plain, host, exact=True)
    saver, start, callback = ModelCheckpoint(tmp_path / "without"), make_host(), make_callback(warmup_steps=3)
    fit(start, saver, steps=2, enable_checkpointing=True)
    assert fit(start, callback, steps=4, ckpt_path=saver.best_model_path).global_step == 4
    assert callback.engine.guard.state_dict()["on"]


class Draws(TinyHost):
    """Notes what each generator gives in each batch."""

    def __init__(self):
        super().__init__()
        self.train_draws, self.val_draws = [], []

    @staticmethod
    def draw():
        return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002

    def training_step(self, batch, batch_idx):
        self.train_draws.append(self.draw())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.val_draws.append(self.draw())


def test_random_numbers_of_a_seeded_step_depend_on_its_place_alone(monkeypatch):
    runs = []
    for seed, disturb in ((0, False), (0, True), (1, False)):
        host = make_host(Draws)
        trainer = make_trainer(StepSeed(seed), steps=-1, max_epochs=2, limit_val_batches=0 if disturb else 2,
                               num_sanity_val_steps=0)  # fmt: skip
        torch.manual_seed(int(disturb))
        trainer.fit(host, make_loader(6), make_loader(6))
        runs.append(host)
    assert runs[0].train_draws == runs[1].train_draws
    assert len(set(runs[0].train_draws)) == 6
    assert not set(runs[0].train_draws) & set(runs[2].train_draws)
    assert runs[0].val_draws[:2] == runs[0].val_draws[2:]
    assert len(set(runs[0].val_draws)) == 2
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
