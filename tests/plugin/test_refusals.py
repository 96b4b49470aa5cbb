"""Hosts that cannot be served are refused at once, with a word on what to do, and are left as they were."""

import lightning.pytorch as L
import pytest
import torch
from tiny_hosts import ManualHost, MixinHost, TinyHost, assert_untouched, fit, in_hook, make_callback, make_host
from torch import nn

from ssync_pl import SSyncCallback
from ssync_pl.errors import ConfigError, HostError, ShapeError


class SecondCallback(SSyncCallback):
    """A subclass, since Lightning itself refuses two of one class."""


class OverPatches(nn.Module):
    def forward(self, logits):
        return logits.softmax(-1)


class Odd(TinyHost):
    """Has a module that never runs, and one whose softmax runs over the wrong axis."""

    def __init__(self):
        super().__init__()
        self.spare, self.show = nn.Identity(), OverPatches()

    def host_loss(self, batch):
        loss, logits, masks = super().host_loss(batch)
        return loss + 0 * self.show(logits).sum(), logits, masks


def host_with(part, name, value):
    def make():
        host = make_host()
        setattr(getattr(host, part), name, value)
        return host

    return make


class ReturnsList(TinyHost):
    def training_step(self, batch, batch_idx):
        return [self.host_loss(batch)[0]]


PROBS = {"attention_kind": "probs"}
REENTRANT = {"checkpointing": "reentrant"}
LATE = {"warmup_steps": 100}
DETACHED = host_with("corrector", "detach", True)
# The host, the options of the callback or callbacks, the error, and words of its message.
CASES = {
    "manual optimization": (lambda: make_host(ManualHost), {}, HostError, ["automatic_optimization=False", "mixin"]),
    "unrecognised": (
        make_host, [SSyncCallback()], HostError, ["TinyHost is none", "savi", "attention='path", "Candidates: corr"]
    ),
    "unknown path": (make_host, {"attention": "corrector.softmax"}, HostError, ["no child 'softmax'", "to_q, to_k"]),
    "unknown key": (make_host, {"attention": "corrector:attn"}, HostError, ["slots, logits"]),
    "unknown adapter": (make_host, [SSyncCallback("nothing")], ConfigError, ["nothing"]),
    "another adapter": (make_host, [SSyncCallback("savi")], HostError, ["'savi'", "TinyHost", "corrector"]),
    "silent module": (
        lambda: make_host(Odd), {"attention": "spare"}, HostError, ["run 'spare', but it did not", "_dynamo.reset()"]
    ),
    "attention without gradient": (DETACHED, {}, HostError, ["slot attention of TinyHost", "detached"]),
    "masks without gradient": (host_with("decoder", "detach", True), {}, HostError, ["decoder masks", "detached"]),
    "no gradient, in the warm-up": (DETACHED, LATE, HostError, ["slot attention of TinyHost"]),
    "reentrant checkpointing": (
        lambda: make_host(**REENTRANT), {"attention": "corrector.soft", **PROBS}, HostError, ["use_reentrant=False"]
    ),
    "NaN": (host_with("decoder", "nan", True), {}, ShapeError, ["`mask_logits` to be finite"]),
    "NaN, in the warm-up": (host_with("decoder", "nan", True), LATE, ShapeError, ["`mask_logits` to be finite"]),
    "slot counts that differ": (
        host_with("decoder", "extra_slots", 1), {}, ShapeError, ["(2, 4, 12)", "(2, 2, 5, 12)"]
    ),
    "logits as probabilities": (make_host, {"masks_kind": "probs"}, ShapeError, ["`mask_probs`"]),
    "softmax over patches": (
        lambda: make_host(Odd), {"attention": "show", **PROBS}, ShapeError, ["sum to 1 over slots"]
    ),
    "wrong grid": (make_host, {"grid": (5, 5)}, HostError, ["`grid` to have 12 patches"]),
    "two callbacks": (
        make_host, [make_callback(), make_callback(SecondCallback)], HostError, ["already has SSync"]
    ),
    "a list is returned": (lambda: make_host(ReturnsList), {}, HostError, ["or None, but got list"]),
    "mixin beside the callback": (lambda: make_host(MixinHost), {}, HostError, ["is an SSyncRegularizer"]),
}  # fmt: skip


@pytest.mark.parametrize(("host", "callbacks", "error", "words"), CASES.values(), ids=CASES.keys())
def test_refused_with_what_to_do(host, callbacks, error, words):
    host = host()
    with pytest.raises(error) as caught:
        fit(host, *(callbacks if isinstance(callbacks, list) else [make_callback(**callbacks)]), steps=1)
    assert [word for word in words if word not in str(caught.value)] == []
    assert_untouched(host)


def test_lightning_refuses_two_of_one_class():
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        L.Trainer(callbacks=[make_callback(), make_callback()], accelerator="cpu", logger=False)


@pytest.mark.parametrize(("part", "weight"), [("corrector", "interior_weight"), ("decoder", "boundary_weight")])
def test_a_side_that_is_not_trained_needs_no_gradient(part, weight):
    trainer = fit(host_with(part, "detach", True)(), make_callback(**{weight: 0.0}), steps=1)
    assert "ssync/boundary_loss" in trainer.callback_metrics


def test_maps_that_turn_to_nan_later_are_named():
    def turn(trainer, module, *args):
        module.decoder.nan = trainer.global_step == 2

    host = make_host()
    with pytest.raises(ShapeError, match=r"mask.* to be finite"):
        fit(host, make_callback(), in_hook("on_train_batch_start", turn))
    assert_untouched(host)
    assert all(bool(torch.isfinite(value).all()) for value in host.state_dict().values())
