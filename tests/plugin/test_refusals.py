"""Hosts that cannot be served are refused at once, with a word on what to do, and are left as they were."""

import pytest
import torch
from tiny_hosts import ManualHost, MixinHost, assert_untouched, fit, in_hook, make_callback, make_host
from torch import nn

from ssync_pl import SSyncCallback
from ssync_pl.errors import ConfigError, HostError, ShapeError


class SecondCallback(SSyncCallback):
    """A subclass, since Lightning itself refuses two of one class."""


def idle():
    host = make_host()
    host.spare = nn.Identity()
    return host


def with_part(part, name, value):
    def make():
        host = make_host()
        setattr(getattr(host, part), name, value)
        return host

    return make


DETACHED, NAN = with_part("corrector", "detach", True), with_part("decoder", "nan", True)
MORE = with_part("decoder", "extra_slots", 1)
LATE = {"warmup_steps": 100}
SOFT = {"attention": "corrector.soft", "attention_kind": "probs"}
# The host, the options of the callback or callbacks, the error, and words of its message.
CASES = {
    "manual optimization": (lambda: make_host(ManualHost), {}, HostError, ["automatic_optimization=False", "mixin"]),
    "unrecognised": (make_host, [SSyncCallback()], HostError, ["TinyHost is none", "attention='path", "Candidates: c"]),
    "unknown path": (make_host, {"attention": "corrector.softmax"}, HostError, ["no child 'softmax'", "to_q, to_k"]),
    "unknown key": (make_host, {"attention": "corrector:attn"}, HostError, ["slots, logits"]),
    "unknown adapter": (make_host, [SSyncCallback("nothing")], ConfigError, ["nothing"]),
    "another adapter": (make_host, [SSyncCallback("savi")], HostError, ["'savi'", "TinyHost", "corrector"]),
    "silent module": (idle, {"attention": "spare"}, HostError, ["run 'spare', but it did not", "_dynamo.reset()"]),
    "a list is returned": (lambda: make_host(returns="list"), {}, HostError, ["or None, but got list"]),
    "attention without gradient": (DETACHED, {}, HostError, ["slot attention of TinyHost", "detached"]),
    "masks without gradient": (with_part("decoder", "detach", True), {}, HostError, ["decoder masks", "detached"]),
    "no gradient, in the warm-up": (DETACHED, LATE, HostError, ["slot attention of TinyHost"]),
    "reentrant": (lambda: make_host(checkpointing="reentrant"), SOFT, HostError, ["use_reentrant=False"]),
    "NaN": (NAN, {}, ShapeError, ["`mask_logits` to be finite"]),
    "NaN, in the warm-up": (NAN, LATE, ShapeError, ["`mask_logits` to be finite"]),
    "slot counts that differ": (MORE, {}, ShapeError, ["(2, 4, 12)", "(2, 2, 5, 12)"]),
    "logits as probabilities": (make_host, {"masks_kind": "probs"}, ShapeError, ["`mask_probs`"]),
    "wrong grid": (make_host, {"grid": (5, 5)}, HostError, ["`grid` to have 12 patches"]),
    "two callbacks": (make_host, [make_callback(), make_callback(SecondCallback)], HostError, ["already has SSync"]),
    "mixin beside the callback": (lambda: make_host(MixinHost), {}, HostError, ["is an SSyncRegularizer"]),
}


@pytest.mark.parametrize(("host", "callbacks", "error", "words"), CASES.values(), ids=CASES.keys())
def test_refused_with_what_to_do(host, callbacks, error, words):
    host = host()
    with pytest.raises(error) as caught:
        fit(host, *(callbacks if isinstance(callbacks, list) else [make_callback(**callbacks)]), steps=1)
    assert [word for word in words if word not in str(caught.value)] == []
    assert_untouched(host)


@pytest.mark.parametrize(("part", "weight"), [("corrector", "interior_weight"), ("decoder", "boundary_weight")])
def test_a_side_that_is_not_trained_needs_no_gradient(part, weight):
    trainer = fit(with_part(part, "detach", True)(), make_callback(**{weight: 0.0}), steps=1)
    assert "ssync/boundary_loss" in trainer.callback_metrics


def test_maps_that_turn_to_nan_later_are_named():
    def turn(trainer, module, *args):
        module.decoder.nan = trainer.global_step == 2

    host = make_host()
    with pytest.raises(ShapeError, match=r"mask.* to be finite"):
        fit(host, make_callback(), in_hook("on_train_batch_start", turn))
    assert_untouched(host)
    assert all(bool(torch.isfinite(value).all()) for value in host.state_dict().values())
