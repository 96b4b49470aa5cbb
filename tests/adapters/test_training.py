"""Hosts of the VideoSAUR family in training: slots that grow or collapse, validation, activation checkpointing."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from feature_hosts import VideosaurHost
from stand_in_parts import FRAME, T
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssync_pl import SSyncCallback, attach
from ssync_pl.errors import HostError


class _Totals(L.Callback):
    def __init__(self) -> None:
        self.totals: list[Tensor] = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.totals.append(loss.detach().clone())


def _fit(host: Any, *callbacks: L.Callback, batches: int = 3, validate: bool = False) -> None:
    clips = torch.randn(2 * batches, T, 3, *FRAME, generator=torch.Generator().manual_seed(0))
    train, val = (torch.utils.data.DataLoader([{"video": one} for one in part], 2) for part in (clips, clips[:2]))
    trainer = L.Trainer(
        max_epochs=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=int(validate),
        val_check_interval=1 if validate else None, limit_val_batches=int(validate),
    )  # fmt: skip
    trainer.fit(host, train, val if validate else None)


def test_slots_grow_in_training_while_validation_scans_forth_and_back() -> None:
    def trained(validate: bool) -> tuple[Any, _Totals, SSyncCallback]:
        torch.manual_seed(0)
        host, totals = VideosaurHost(slots=(2, 3, 4), growth=(1, 2)), _Totals()
        callback = SSyncCallback(warmup_steps=0, guard_window=1)
        with warnings.catch_warnings():  # growth is no collapse
            warnings.filterwarnings("error", message="Slots fall out of use")
            _fit(host, callback, totals, validate=validate)
        return host, totals, callback

    host, totals, callback = trained(validate=True)
    # The sanity check and one validation after each step: T frames forth, T - 1 back, with all slots.
    assert host.corrector_calls == [2 * T - 1, *[T, 2 * T - 1] * 3]
    starts = [sum(host.corrector_calls[:n]) for n, calls in enumerate(host.corrector_calls) if calls == T]
    assert [host.processor.module.corrector.own_logits[start].shape[1] for start in starts] == [2, 3, 4]
    assert max(callback.engine.guard.before) > 2  # the guard followed the growth
    quiet, same, _ = trained(validate=False)
    torch.testing.assert_close(totals.totals, same.totals, rtol=0, atol=0)
    torch.testing.assert_close([*host.parameters()], [*quiet.parameters()], rtol=0, atol=0)


def _checkpointed(host: Any) -> Any:
    for part, name in ((host.processor.module.corrector, "forward"), (host, "draw")):
        setattr(part, name, functools.partial(checkpoint, getattr(part, name), use_reentrant=True))
    return host


def test_reentrant_checkpointing_is_refused_with_the_way_out() -> None:
    host = _checkpointed(VideosaurHost())
    with attach(host, warmup_steps=0) as ssync:
        with pytest.raises(HostError, match=r"activation checkpointing without use_reentrant=False"):
            host.training_step(host.batch(), 0)
        host.processor.module.corrector = VideosaurHost().processor.module.corrector
        with pytest.raises(HostError, match=r"to run .*, but it did not.*reentrant activation checkpointing"):
            ssync.add(host.training_step(host.batch(), 0))
    with pytest.raises(HostError, match=r"to carry gradient.*use_reentrant=False"):
        _fit(_checkpointed(VideosaurHost()), SSyncCallback(warmup_steps=0), batches=1)
