"""Hosts that cannot be served are refused at once, with a word on what to do, and are left as they were."""

import lightning.pytorch as L
import pytest
import torch
from tiny_hosts import ManualHost, TinyHost, assert_untouched, fit, make_callback, make_host
from torch import nn

from ssync_pl import SSyncCallback, SSyncRegularizer
from ssync_pl.errors import HostError, ShapeError


class WithMixin(SSyncRegularizer, TinyHost):
    pass


class SecondCallback(SSyncCallback):
    """A subclass, since Lightning itself refuses two of one class."""


def refuse(match, host, *callbacks, error=HostError, **options):
    with pytest.raises(error, match=match) as caught:
        fit(host, *callbacks, steps=1, **options)
    assert_untouched(host)
    return str(caught.value)


def test_manual_optimization():
    message = refuse("automatic_optimization=False", make_host(ManualHost), make_callback())
    assert "SSyncRegularizer mixin, or ssync_loss" in message


def test_unrecognised_host_names_candidates_and_the_way_out():
    message = refuse("TinyHost is none", make_host(), SSyncCallback())
    assert "savi" in message
    assert "attention='path.of.attention', masks='path.of.decoder'" in message
    assert "Candidates: corrector, decoder, decoder.to_mask" in message


def test_path_that_does_not_exist_names_the_children():
    host = make_host()
    callback = make_callback(attention="corrector.softmax")
    refuse("no child 'softmax'. Its children: to_q, to_k, update", host, callback)


def test_key_that_does_not_exist_names_the_fields():
    refuse("Corrected with fields slots, logits", make_host(), make_callback(attention="corrector:attn"))


def test_a_module_that_does_not_run_in_the_training_step():
    host = make_host()
    host.spare = nn.Identity()
    message = refuse("run 'spare', but it did not", host, make_callback(attention="spare"))
    assert "torch._dynamo.reset()" in message


@pytest.mark.parametrize(("part", "name"), [("corrector", "slot attention"), ("decoder", "decoder masks")])
def test_maps_without_gradient(part, name):
    host = make_host()
    getattr(host, part).detach = True
    assert "detached" in refuse(f"{name} of TinyHost to carry gradient", host, make_callback())


@pytest.mark.parametrize(("part", "weight"), [("corrector", "interior_weight"), ("decoder", "boundary_weight")])
def test_a_side_that_is_not_trained_needs_no_gradient(part, weight):
    host = make_host()
    getattr(host, part).detach = True
    trainer = fit(host, make_callback(**{weight: 0.0}), steps=1)
    assert "ssync/boundary_loss" in trainer.callback_metrics


def test_a_map_inside_reentrant_activation_checkpointing():
    callback = make_callback(attention="corrector.soft", attention_kind="probs")
    message = refuse("slot attention of TinyHost to carry gradient", make_host(checkpointing="reentrant"), callback)
    assert "use_reentrant=False" in message
    fit(make_host(checkpointing="non-reentrant"), make_callback(attention="corrector.soft", attention_kind="probs"))


@pytest.mark.parametrize("warmup_steps", [0, 100])
def test_nan_maps_in_the_first_step(warmup_steps):
    host = make_host()
    host.decoder.nan = True
    refuse("`mask_logits` to be finite", host, make_callback(warmup_steps=warmup_steps), error=ShapeError)


def test_slot_counts_that_differ():
    host = make_host()
    host.decoder.extra_slots = 1
    message = refuse("both maps to have the same slots", host, make_callback(), error=ShapeError)
    assert "(2, 4, 12) with slots on axis 1" in message
    assert "(2, 2, 5, 12) with slots on axis 2" in message


def test_logits_that_were_announced_as_probabilities():
    callback = make_callback(masks_kind="probs")
    refuse("`mask_probs` to be probabilities in", make_host(), callback, error=ShapeError)


def test_probabilities_over_patches_instead_of_slots():
    class OverPatches(nn.Module):
        def forward(self, logits):
            return logits.softmax(-1)

    class Host(TinyHost):
        def __init__(self):
            super().__init__()
            self.show = OverPatches()

        def host_loss(self, batch):
            loss, logits, masks = super().host_loss(batch)
            return loss + 0 * self.show(logits).sum(), logits, masks

    callback = make_callback(attention="show", attention_kind="probs")
    refuse("sum to 1 over slots", make_host(Host), callback, error=ShapeError)


def test_two_callbacks():
    refuse("already has SSync in its training step", make_host(), make_callback(), make_callback(SecondCallback))
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SSyncCallback`"):
        L.Trainer(callbacks=[make_callback(), make_callback()], accelerator="cpu", logger=False)


def test_callback_beside_the_mixin():
    refuse("is an SSyncRegularizer and adds it itself", make_host(WithMixin), make_callback())


def test_unknown_adapter_is_named():
    host = make_host()
    with pytest.raises(ValueError, match="but got 'nothing'"):
        fit(host, SSyncCallback("nothing"), steps=1)
    assert_untouched(host)


def test_named_adapter_that_does_not_fit():
    assert "Candidates in this host: corrector" in refuse(
        "'savi' knows, but TinyHost", make_host(), SSyncCallback("savi")
    )


def test_wrong_grid():
    refuse("`grid` to have 12 patches", make_host(), make_callback(grid=(5, 5)))


def test_the_first_step_is_checked_during_the_warm_up_too():
    host = make_host()
    host.corrector.detach = True
    refuse("to carry gradient", host, make_callback(warmup_steps=100))


def test_maps_that_turn_to_nan_later_are_named():
    class Turns(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.decoder.nan = trainer.global_step == 2

    host = make_host()
    with pytest.raises(ShapeError, match=r"mask.* to be finite, but got NaN"):
        fit(host, make_callback(), Turns())
    assert_untouched(host)
    assert all(bool(torch.isfinite(value).all()) for value in host.state_dict().values())
