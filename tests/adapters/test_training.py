"""Hosts of the VideoSAUR family in training: slots that grow or collapse, validation, activation checkpointing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from feature_hosts import VideosaurHost
from stand_in_parts import FRAME, T
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssync_pl import SSyncCallback, attach
from ssync_pl.errors import HostError


class _Totals(L.Callback):
    def __init__(self) -> None:
        self.totals: list[Tensor] = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.totals.append(loss.detach().clone())


def _loader(batches: int, videos: int = 2) -> Any:
    clips = torch.randn(batches * videos, T, 3, *FRAME, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader([{"video": clip} for clip in clips], videos, generator=torch.Generator())


def _fit(host: Any, *callbacks: L.Callback, batches: int = 3, validate: bool = False) -> None:
    trainer = L.Trainer(
        max_epochs=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=int(validate),
        val_check_interval=1 if validate else None, limit_val_batches=int(validate),
    )  # fmt: skip
    trainer.fit(host, _loader(batches), _loader(1) if validate else None)


def test_slots_grow_in_training_while_validation_scans_forth_and_back() -> None:
    def trained(validate: bool) -> tuple[Any, _Totals]:
        torch.manual_seed(0)
        host, totals = VideosaurHost(slots=(2, 3, 4), growth=(1, 2)), _Totals()
        _fit(host, SSyncCallback(warmup_steps=0), totals, validate=validate)
        return host, totals

    host, totals = trained(validate=True)
    # The sanity check and one validation after each step: T frames forth, T - 1 back, with all slots.
    assert host.corrector_calls == [2 * T - 1, *[T, 2 * T - 1] * 3]
    starts = [sum(host.corrector_calls[:n]) for n, calls in enumerate(host.corrector_calls) if calls == T]
    assert [host.processor.module.corrector.own_logits[start].shape[1] for start in starts] == [2, 3, 4]
    quiet, same = trained(validate=False)
    assert all(torch.equal(one, two) for one, two in zip(totals.totals, same.totals, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(host.parameters(), quiet.parameters(), strict=True))


def test_growth_raises_no_false_alarm_and_keeps_relative_weights_in_measure() -> None:
    host, totals = VideosaurHost(slots=(2, 4, 8), growth=(4, 8), lr=1e-4), _Totals()
    callback = SSyncCallback(warmup_steps=2, guard_window=2, relative_weight=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Slots fall out of use")
        _fit(host, callback, totals, batches=12)
    assert max(callback.engine.guard.before) > 2.5  # it followed the growth
    shares = [float((total - own) / own) for total, own in zip(totals.totals, host.host_losses, strict=True)]
    assert shares[:2] == [0.0, 0.0]
    assert all(0.05 < share < 1.5 for share in shares[2:]), shares


def _checkpointed(host: Any, reentrant: bool) -> Any:
    def wrap(module: nn.Module) -> None:
        forward: Callable[..., Any] = module.forward
        # The reentrant kind takes no keywords, so they are bound first.
        module.forward = lambda *args, **kwargs: checkpoint(
            lambda *values: forward(*values, **kwargs), *args, use_reentrant=reentrant
        )

    wrap(host.processor.module.corrector)
    wrap(host.decoder)
    return host


def test_reentrant_checkpointing_is_refused_with_the_way_out() -> None:
    host = _checkpointed(VideosaurHost(), reentrant=True)
    with attach(host, warmup_steps=0) as ssync:
        with pytest.raises(HostError, match=r"activation checkpointing without use_reentrant=False"):
            host.training_step(host.batch(), 0)
        host.processor.module.corrector = VideosaurHost().processor.module.corrector
        with pytest.raises(HostError, match=r"to run .*, but it did not.*reentrant activation checkpointing"):
            ssync.add(host.training_step(host.batch(), 0))
    with pytest.raises(HostError, match=r"to carry gradient.*use_reentrant=False"):
        _fit(_checkpointed(VideosaurHost(), reentrant=True), SSyncCallback(warmup_steps=0), batches=1)
