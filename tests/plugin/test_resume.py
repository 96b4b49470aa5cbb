"""Copies, pickles and checkpoints: a run that is taken up again equals one that never stopped."""

import copy
import pickle

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_hosts import (
    TinyHost,
    assert_same_weights,
    fit,
    make_callback,
    make_clips,
    make_host,
    make_loader,
    maps_of,
    weights,
)
from torch.utils.data import DataLoader

from ssync_pl import SSyncRegularizer

HOOKS = [
    "on_fit_start",
    "on_train_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_train_batch_end",
    "on_train_end",
]
WAYS = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]


class MixinHost(SSyncRegularizer, TinyHost):
    def training_step(self, batch, batch_idx):
        loss, logits, masks = self.host_loss(batch)
        return self.ssync(loss, maps_of(logits, masks))


class CopiesIn(L.Callback):
    """Copies host and callback in a hook of the training."""

    def __init__(self, hook, way, callback):
        self.copies = []

        def take(trainer, pl_module, *args):
            self.copies.append((way(pl_module), way(callback)))

        setattr(self, hook, take)


def train_alike(one, two):
    fit(one[0], *one[1:], steps=3)
    fit(two[0], *two[1:], steps=3)
    assert_same_weights(one[0], two[0], exact=True)


@pytest.mark.parametrize("way", WAYS, ids=["deepcopy", "pickle"])
def test_copies_before_and_after_a_training(way):
    host, callback = make_host(), make_callback(relative_weight=0.1)
    train_alike((way(host), way(callback)), (host, callback))
    train_alike((way(host), way(callback)), (host, callback))


@pytest.mark.parametrize("way", WAYS, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("hook", HOOKS)
def test_copies_taken_during_a_training(way, hook):
    host, callback = make_host(), make_callback(relative_weight=0.1, guard_window=2)
    look = CopiesIn(hook, way, callback)
    fit(host, callback, look, steps=3)
    for twin, other in look.copies:
        # What was copied in the middle trains on as a plain host with a callback of its own.
        assert other._session is None
        plain = make_host()
        plain.load_state_dict(twin.state_dict())
        train_alike((twin, other), (plain, make_callback(relative_weight=0.1, guard_window=2)))
    assert len(look.copies) >= 1


def test_a_copy_taken_during_a_training_runs_the_plain_step():
    callback = make_callback()
    look = CopiesIn("on_train_batch_start", copy.deepcopy, callback)
    fit(make_host(), callback, look, steps=1)
    twin = look.copies[0][0]
    batch = next(iter(make_loader()))
    assert torch.equal(twin.training_step(batch, 0), make_host().training_step(batch, 0))


OPTIONS = {
    "absolute": {},
    "relative": {"relative_weight": 0.3},
    "guarded": {"on_collapse": "backoff", "collapse_threshold": 0.99, "relative_weight": 0.3},
    "ramp": {"ramp_steps": 9, "warmup_steps": 3},
}


@pytest.mark.filterwarnings("ignore:Slots fall out of use")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("stop", [2, 7])
@pytest.mark.parametrize("mixin", [False, True])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, options, stop, mixin):
    options = {"warmup_steps": 2, "guard_window": 3, **options}

    def start(collapse_at=4):
        if mixin:
            torch.manual_seed(0)
            host, callbacks = MixinHost(ssync=options), []
        else:
            host, callbacks = make_host(), [make_callback(**options)]
        host.collapse_at = collapse_at
        return host, callbacks

    def engine_of(host, callbacks):
        return host._ssync_engine if mixin else callbacks[0].engine

    def saver():
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)

    # Lightning starts the epoch's data over when it resumes inside an epoch, so all batches are alike.
    data = DataLoader(make_clips(2) * 4, batch_size=2)
    host, callbacks = start()
    fit(host, *callbacks, saver(), steps=10, loader=data, enable_checkpointing=True)
    path = tmp_path / f"step={stop}.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(weights(make_host()))

    again, others = start()
    fit(again, *others, steps=10, loader=data, ckpt_path=str(path))
    assert_same_weights(again, host, exact=True)
    assert engine_of(again, others).state_dict() == engine_of(host, callbacks).state_dict()


def test_checkpoints_are_interchangeable_with_those_of_the_plain_host(tmp_path):
    host, plain = make_host(), make_host()
    saver = ModelCheckpoint(tmp_path / "with")
    fit(host, make_callback(), saver, enable_checkpointing=True)
    plain.load_state_dict(torch.load(saver.best_model_path, weights_only=True)["state_dict"])
    assert_same_weights(plain, host, exact=True)

    saver = ModelCheckpoint(tmp_path / "without")
    start = make_host()
    fit(start, saver, steps=2, enable_checkpointing=True)
    callback = make_callback(warmup_steps=3)
    trainer = fit(start, callback, steps=4, ckpt_path=saver.best_model_path)
    assert trainer.global_step == 4
    assert callback.engine.guard.state_dict()["on"]
