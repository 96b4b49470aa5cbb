"""Hosts that cannot be served are refused at once, with a word on what to do, and are left as they were."""

import lightning.pytorch as L
import pytest
import torch
from tiny_hosts import ManualHost, TinyHost, assert_untouched, fit, make_callback, make_host
from torch import nn

from ssync_pl import SSyncCallback, SSyncRegularizer
from ssync_pl.errors import ConfigError, HostError, ShapeError


class WithMixin(SSyncRegularizer, TinyHost):
    pass


class SecondCallback(SSyncCallback):
    """A subclass, since Lightning itself refuses two of one class."""


class OverPatches(nn.Module):
    def forward(self, logits):
        return logits.softmax(-1)


class Odd(TinyHost):
    """Has a module that never runs, and one whose softmax runs over the wrong axis."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Identity()
        self.show = OverPatches()

    def host_loss(self, batch):
        loss, logits, masks = super().host_loss(batch)
        return loss + 0 * self.show(logits).sum(), logits, masks


def with_part(part, name, value):
    host = make_host()
    setattr(getattr(host, part), name, value)
    return host


PROBS = {"attention_kind": "probs"}
# The host, the callbacks, the error, and words of its message.
CASES = {
    "manual optimization": (
        lambda: (make_host(ManualHost), make_callback()),
        HostError,
        ["automatic_optimization=False", "SSyncRegularizer mixin, or ssync_loss"],
    ),
    "unrecognised": (
        lambda: (make_host(), SSyncCallback()),
        HostError,
        ["TinyHost is none", "savi", "attention='path.of.attention'", "Candidates: corrector, decoder"],
    ),
    "unknown path": (
        lambda: (make_host(), make_callback(attention="corrector.softmax")),
        HostError,
        ["no child 'softmax'", "to_q, to_k, update"],
    ),
    "unknown key": (lambda: (make_host(), make_callback(attention="corrector:attn")), HostError, ["slots, logits"]),
    "unknown adapter": (lambda: (make_host(), SSyncCallback("nothing")), ConfigError, ["nothing"]),
    "another adapter": (lambda: (make_host(), SSyncCallback("savi")), HostError, ["'savi'", "TinyHost", "corrector"]),
    "module that does not run": (
        lambda: (make_host(Odd), make_callback(attention="spare")),
        HostError,
        ["run 'spare', but it did not", "torch._dynamo.reset()"],
    ),
    "attention without gradient": (
        lambda: (with_part("corrector", "detach", True), make_callback()),
        HostError,
        ["slot attention of TinyHost", "detached"],
    ),
    "masks without gradient": (
        lambda: (with_part("decoder", "detach", True), make_callback()),
        HostError,
        ["decoder masks of TinyHost", "detached"],
    ),
    "no gradient, during the warm-up": (
        lambda: (with_part("corrector", "detach", True), make_callback(warmup_steps=100)),
        HostError,
        ["slot attention of TinyHost"],
    ),
    "reentrant checkpointing": (
        lambda: (make_host(checkpointing="reentrant"), make_callback(attention="corrector.soft", **PROBS)),
        HostError,
        ["slot attention of TinyHost", "use_reentrant=False"],
    ),
    "NaN": (
        lambda: (with_part("decoder", "nan", True), make_callback()),
        ShapeError,
        ["`mask_logits` to be finite"],
    ),
    "NaN, during the warm-up": (
        lambda: (with_part("decoder", "nan", True), make_callback(warmup_steps=100)),
        ShapeError,
        ["`mask_logits` to be finite"],
    ),
    "slot counts that differ": (
        lambda: (with_part("decoder", "extra_slots", 1), make_callback()),
        ShapeError,
        ["(2, 4, 12)", "(2, 2, 5, 12)"],
    ),
    "logits taken for probabilities": (
        lambda: (make_host(), make_callback(masks_kind="probs")),
        ShapeError,
        ["`mask_probs`"],
    ),
    "softmax over patches": (
        lambda: (make_host(Odd), make_callback(attention="show", **PROBS)),
        ShapeError,
        ["sum to 1 over slots"],
    ),
    "wrong grid": (lambda: (make_host(), make_callback(grid=(5, 5))), HostError, ["`grid` to have 12 patches"]),
    "two callbacks": (
        lambda: (make_host(), make_callback(), make_callback(SecondCallback)),
        HostError,
        ["already has SSync"],
    ),
    "mixin beside the callback": (
        lambda: (make_host(WithMixin), make_callback()),
        HostError,
        ["is an SSyncRegularizer"],
    ),
}


@pytest.mark.parametrize(("case", "error", "words"), CASES.values(), ids=CASES.keys())
def test_refused_with_what_to_do(case, error, words):
    host, *callbacks = case()
    with pytest.raises(error) as caught:
        fit(host, *callbacks, steps=1)
    assert [word for word in words if word not in str(caught.value)] == []
    assert_untouched(host)


def test_lightning_refuses_two_of_one_class():
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        L.Trainer(callbacks=[make_callback(), make_callback()], accelerator="cpu", logger=False)


@pytest.mark.parametrize(("part", "weight"), [("corrector", "interior_weight"), ("decoder", "boundary_weight")])
def test_a_side_that_is_not_trained_needs_no_gradient(part, weight):
    trainer = fit(with_part(part, "detach", True), make_callback(**{weight: 0.0}), steps=1)
    assert "ssync/boundary_loss" in trainer.callback_metrics


def test_checkpointing_that_is_not_reentrant_is_served():
    fit(make_host(checkpointing="non-reentrant"), make_callback(attention="corrector.soft", **PROBS), steps=1)


def test_maps_that_turn_to_nan_later_are_named():
    class Turns(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.decoder.nan = trainer.global_step == 2

    host = make_host()
    with pytest.raises(ShapeError, match=r"mask.* to be finite"):
        fit(host, make_callback(), Turns())
    assert_untouched(host)
    assert all(bool(torch.isfinite(value).all()) for value in host.state_dict().values())
