"""SSync in the training of the VideoSAUR family's forks."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from videosaur_fork_hosts import HOSTS, T, VideosaurHost, videosaur_loader

from ssync_pl.adapters.videosaur import VideosaurAdapter
from ssync_pl.plugin.callback import SSyncCallback


class _Totals(L.Callback):
    def __init__(self) -> None:
        self.totals: list[Tensor] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_backward(self, trainer: Any, host: Any, loss: Tensor) -> None:
        self.totals.append(loss.detach().clone())

    def on_after_backward(self, trainer: Any, host: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in host.named_parameters() if p.grad is not None})


def _fit(host: nn.Module, *callbacks: L.Callback, batches: int = 3, validate: bool = False) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        num_sanity_val_steps=1 if validate else 0,
        val_check_interval=1 if validate else None,
        limit_val_batches=1 if validate else 0,
    )
    trainer.fit(host, videosaur_loader(batches), videosaur_loader(1) if validate else None)  # type: ignore[arg-type]
    return trainer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _own_parts(host: Any) -> tuple[Any, Any]:
    return getattr(host.processor, "module", host.processor).corrector, getattr(host.decoder, "module", host.decoder)


def test_slots_grow_in_training_while_validation_scans_forth_and_back() -> None:
    def trained(validate: bool) -> tuple[Any, _Totals]:
        torch.manual_seed(0)
        host: Any = HOSTS["videosaur_growing"]()
        totals = _Totals()
        _fit(host, SSyncCallback(warmup_steps=0), totals, validate=validate)
        return host, totals

    host, totals = trained(validate=True)
    corrector, _ = _own_parts(host)
    # The sanity check and one validation after each step: T frames forth, T - 1 back, with all slots.
    assert host.corrector_calls == [2 * T - 1, *[T, 2 * T - 1] * 3]
    training = [n for n, calls in enumerate(host.corrector_calls) if calls == T]
    starts = [sum(host.corrector_calls[:n]) for n in training]
    assert [corrector.own_logits[start].shape[1] for start in starts] == [2, 3, 4]
    quiet, same = trained(validate=False)
    assert all(torch.equal(one, two) for one, two in zip(totals.totals, same.totals, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(host.parameters(), quiet.parameters(), strict=True))


def test_growth_raises_no_false_alarm_and_keeps_relative_weights_in_measure() -> None:
    host = VideosaurHost(slots=(2, 4, 8), growth=(4, 8), lr=1e-4)
    callback = SSyncCallback(warmup_steps=2, guard_window=2, relative_weight=0.5)
    totals = _Totals()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Slots fall out of use")
        trainer = _fit(host, callback, totals, batches=12)
    assert trainer.global_step == 12
    before = callback.engine.guard.before
    assert before is not None
    assert max(before) > 2.5  # it followed the growth
    shares = [float((total - own) / own) for total, own in zip(totals.totals, host.host_losses, strict=True)]
    assert shares[:2] == [0.0, 0.0]
    assert all(0.05 < share < 1.5 for share in shares[2:]), shares


def test_losses_of_ssync_that_the_host_has_itself_are_told() -> None:
    host = VideosaurHost()
    host.loss_fns = nn.ModuleDict({"loss_featrec": nn.Identity(), "loss_grp2deccls": nn.Identity()})
    with pytest.warns(UserWarning, match=r"VideosaurHost has SSync's losses itself \(loss_grp2deccls\)"):
        VideosaurAdapter().attach(host).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del host.loss_fns["loss_grp2deccls"]
        VideosaurAdapter().attach(host).remove()
