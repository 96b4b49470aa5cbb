"""SSync that waits for a mature host, in a Trainer."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_hosts import Recorder, TinyHost, assert_same_weights, fit, make_callback, make_clips, make_host, maps_of
from torch.utils.data import DataLoader

import ssync_pl.plugin.engine
from ssync_pl import SSyncRegularizer

MATURE = {"start": "mature", "warmup_steps": 2, "guard_window": 2}


class MixinHost(SSyncRegularizer, TinyHost):
    def training_step(self, batch, batch_idx):
        loss, logits, masks = self.host_loss(batch)
        return self.ssync(loss, maps_of(logits, masks))


def start(mixin, **options):
    if mixin:
        torch.manual_seed(0)
        return MixinHost(ssync={**MATURE, **options}), []
    return make_host(), [make_callback(**MATURE, **options)]


def told(caught):
    return [str(w.message) for w in caught if "never switched on" in str(w.message)]


@pytest.mark.parametrize("mixin", [False, True])
def test_a_host_that_never_matures_trains_alone_and_one_warning_says_so(mixin):
    plain, alone = make_host(), Recorder()
    fit(plain, alone, steps=8)
    host, callbacks = start(mixin, mature_agreement=1.0)
    recorder = Recorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(host, *callbacks, recorder, steps=8)
    assert len(told(caught)) == 1
    assert torch.equal(torch.stack(recorder.losses), torch.stack(alone.losses))
    assert_same_weights(host, plain, exact=True)
    assert "ssync/agreement" not in recorder.logs[1]
    assert 0 <= recorder.logs[2]["ssync/agreement"] < 1
    assert recorder.logs[-1]["ssync/weight"] == 0


@pytest.mark.parametrize("mixin", [False, True])
def test_a_mature_host_trains_as_by_the_schedule(mixin):
    host, callbacks = start(mixin, mature_agreement=1e-6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(host, *callbacks, steps=6)
    assert not told(caught)
    late = make_host()
    fit(late, make_callback(warmup_steps=2, guard_window=2), steps=6)
    assert_same_weights(host, late, exact=True)


@pytest.mark.parametrize("mixin", [False, True])
@pytest.mark.parametrize("stop", [3, 5, 8])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, monkeypatch, mixin, stop):
    def as_if(maps):
        """The host agrees more and more: 0.1 in the first step, 0.2 in the second."""
        return torch.tensor([0.1 * (now.trainer.global_step + 1), 4.0, 4.0])

    def engine_of(host, callbacks):
        return host._ssync_engine if mixin else callbacks[0].engine

    monkeypatch.setattr(ssync_pl.plugin.engine, "watched", as_if)
    # Lightning starts the epoch's data over when it resumes inside an epoch, so all batches are alike.
    data = DataLoader(make_clips(2) * 4, batch_size=2)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    host, callbacks = start(mixin, mature_agreement=0.51, ramp_steps=3)
    now = host
    fit(host, *callbacks, saver, steps=10, loader=data, enable_checkpointing=True)
    path = tmp_path / f"step={stop}.ckpt"
    torch.load(path, weights_only=True)
    again, others = start(mixin, mature_agreement=0.51, ramp_steps=3)
    now = again
    fit(again, *others, steps=10, loader=data, ckpt_path=str(path))
    assert_same_weights(again, host, exact=True)
    engine = engine_of(host, callbacks)
    assert engine_of(again, others).state_dict() == engine.state_dict()
    assert engine.maturity.opened == 6
    assert engine.guard.state_dict()["on"]
