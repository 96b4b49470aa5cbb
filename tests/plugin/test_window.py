"""Forward passes outside of the training step are not captured, and recomputation is not captured twice."""

import lightning.pytorch as L
import pytest
import torch
from tiny_hosts import (
    HandWritten,
    TinyHost,
    assert_same_weights,
    fit,
    make_callback,
    make_host,
    make_loader,
    make_trainer,
    weights,
)

from ssync_pl.adapters.paths import Pick


class Counted:
    """Keeps which map was taken in which stage."""

    def __init__(self, monkeypatch):
        self.stages = []
        self.trainer = None
        take = Pick.__call__

        def spy(pick, module, args, output):
            self.stages.append((self.trainer.state.stage.value, pick.place.text))
            return take(pick, module, args, output)

        monkeypatch.setattr(Pick, "__call__", spy)


def test_sanity_check_summary_and_validation_are_not_captured(monkeypatch):
    class Host(TinyHost):
        example_input_array = torch.rand(1, 2, 3, 3, 4)

    spy = Counted(monkeypatch)
    host = make_host(Host)
    spy.trainer = make_trainer(
        make_callback(),
        L.callbacks.ModelSummary(),
        steps=4,
        limit_val_batches=1,
        num_sanity_val_steps=1,
        val_check_interval=2,
    )
    spy.trainer.fit(host, make_loader(), make_loader())
    # Four steps of two frames each, and the decoder once a step.
    assert spy.stages == ([("train", "corrector:logits")] * 2 + [("train", "decoder:mask_logits")]) * 4


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
def test_activation_checkpointing_is_captured_once(monkeypatch, kind):
    # What a reentrant checkpoint returns belongs to the graph; what it computes inside does not.
    plain, host = make_host(HandWritten), make_host(checkpointing=kind)
    fit(plain)
    spy = Counted(monkeypatch)
    spy.trainer = make_trainer(make_callback())
    spy.trainer.fit(host, make_loader())
    assert len(spy.stages) == 4 * (2 + 1)
    assert_same_weights(host, plain)


def test_nothing_is_held_after_a_step():
    held = []

    class Look(L.Callback):
        def __init__(self, callback):
            self.callback = callback

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            capture = self.callback._session.capture
            held.append((capture.is_open, capture.silent))

    callback = make_callback()
    fit(make_host(), callback, Look(callback), steps=2)
    assert held == [(False, ["corrector:logits", "decoder:mask_logits"])] * 2


def test_slots_that_grow_during_training():
    host, by_hand = make_host(grow=True), make_host(HandWritten, grow=True)
    fit(host, make_callback(), steps=6)
    fit(by_hand, steps=6)
    assert_same_weights(host, by_hand)


def test_state_dict_gains_no_keys():
    keys = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            keys.append(set(pl_module.state_dict()))
            assert {n for n, _ in pl_module.named_parameters()} == expected
            assert not list(pl_module.buffers())

    host = make_host()
    expected = set(weights(host))
    fit(host, make_callback(), Look(), steps=2)
    assert keys == [expected] * 2
