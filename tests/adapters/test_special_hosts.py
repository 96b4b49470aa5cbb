"""What unusual hosts do to the machinery: slots that come and go, infinite logits, activation checkpointing."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from slot_package_hosts import PackageAttention, PackageHost, package_batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from videosaur_fork_hosts import VideosaurHost, videosaur_batch, videosaur_loader

from ssync_pl import SSyncConfig, SSyncMaps, attach, ssync_loss
from ssync_pl.adapters import maps_on_common_grid
from ssync_pl.errors import HostError
from ssync_pl.plugin.callback import SSyncCallback
from ssync_pl.plugin.engine import SSyncEngine, check_first

B, T, S, H, W = 2, 3, 4, 4, 4
VALID = torch.tensor([[True, True, False, True], [True, False, True, True]])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("loss", ["brier", "ce"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("factor", [0.5, 1, 2])
def test_infinite_logits_bring_no_nan(loss: Any, temperature: float, marked: bool, factor: float) -> None:
    side = int(H * factor)
    dots = torch.randn(B, T, S, H * W, requires_grad=True)
    alpha = torch.randn(B, T, S, side, side, requires_grad=True)
    absent = ~VALID[:, None, :, None]
    maps = maps_on_common_grid(
        dots.masked_fill(absent, -torch.inf), (H, W), alpha.masked_fill(absent[..., None], -torch.inf)
    )
    maps = dataclasses.replace(maps, slot_valid=VALID if marked else None)
    check_first(maps, "host", SSyncConfig())
    output = ssync_loss(maps, loss=loss, temperature=temperature, merge_threshold=0.5)
    output.loss.backward()
    assert output.loss.isfinite()
    for grad in (dots.grad, alpha.grad):
        assert grad is not None
        assert grad.isfinite().all()
        assert (grad.flatten(3)[absent.expand(B, T, S, grad[0, 0, 0].numel())] == 0).all()
    assert alpha.grad is not None
    assert alpha.grad.abs().sum() > 0
    labels = torch.cat([output.encoder_labels.flatten(1), output.decoder_labels.flatten(1)], 1)
    assert VALID.gather(1, labels).all()


def _maps(used: int, exist: int, slots: int = 8) -> SSyncMaps:
    """Maps of ``slots`` slots, of which ``exist`` exist and the first ``used`` win patches."""
    logits = torch.zeros(1, 1, slots, 16)
    winners = torch.arange(16) % used
    logits[0, 0, winners, torch.arange(16)] = 9.0
    logits.requires_grad_()
    valid = (torch.arange(slots) < exist)[None]
    return SSyncMaps(attention_logits=logits, mask_logits=logits * 1.0, grid=(4, 4), slot_valid=valid)


def test_slots_that_the_host_drops_raise_no_alarm_and_those_that_collapse_do() -> None:
    engine = SSyncEngine(SSyncConfig(warmup_steps=4, guard_window=2, merge=False))
    engine.start(100)
    verdicts = []
    for step, (used, exist) in enumerate([(6, 8)] * 4 + [(6, 8)] * 2 + [(3, 3)] * 4 + [(1, 3)] * 2):
        verdicts.append(engine.term(None, _maps(used, exist), step)[1])
    collapsed = [verdict.collapsed for verdict in verdicts if verdict is not None]
    assert collapsed == [False, False, False, True]


def _checkpointed(host: VideosaurHost, reentrant: bool) -> VideosaurHost:
    def wrap(module: nn.Module) -> None:
        forward: Callable[..., Any] = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            # The reentrant kind takes no keywords, so they are bound first.
            return checkpoint(lambda *values: forward(*values, **kwargs), *args, use_reentrant=reentrant)

        module.forward = run  # type: ignore[method-assign]

    wrap(host.processor.module.corrector)
    wrap(host.decoder)
    return host


def _step(host: Any, seed: int) -> Tensor:
    return (host(videosaur_batch(2, seed)["video"])["masks"] - 0.3).square().mean()


def test_recomputed_activations_are_not_heard_twice_and_give_the_same_gradients() -> None:
    plain = VideosaurHost()
    host = _checkpointed(copy.deepcopy(plain), reentrant=False)
    with attach(host, warmup_steps=0, merge=False) as ssync, attach(plain, warmup_steps=0, merge=False) as expected:
        for seed in range(3):
            for model, listener in ((host, ssync), (plain, expected)):
                model.zero_grad()
                (_step(model, seed) + listener.loss()).backward()
            for one, two in zip(host.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(one.grad, two.grad)


def test_reentrant_checkpointing_is_refused_with_the_way_out() -> None:
    host = _checkpointed(VideosaurHost(), reentrant=True)
    with attach(host, warmup_steps=0) as ssync:
        with pytest.raises(HostError, match=r"activation checkpointing without use_reentrant=False"):
            _step(host, 0)
        host.processor.module.corrector = VideosaurHost().processor.module.corrector
        with pytest.raises(HostError, match=r"to run .*, but it did not.*reentrant activation checkpointing"):
            ssync.add(_step(host, 0))
    trainer = L.Trainer(
        max_steps=1,
        callbacks=[SSyncCallback(warmup_steps=0)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    with pytest.raises(
        HostError, match=r"to carry gradient, but it does not.*\(use checkpoint\(.*use_reentrant=False\)\)"
    ):
        trainer.fit(_checkpointed(VideosaurHost(), reentrant=True), videosaur_loader(1))


def test_an_image_host_with_several_heads_and_pixel_masks() -> None:
    host = PackageHost(PackageAttention(heads=2))
    host.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(host, warmup_steps=0, merge=False) as ssync:
            loss = host(package_batch()["video"]).square().mean()
            total = ssync.add(loss)
            maps = ssync.maps
    assert maps is not None
    assert maps.shape == (2, 1, 4, 16)
    assert maps.attention_probs is not None
    assert maps.attention_logits is not None
    assert maps.mask_probs is not None
    own = host.slot_attn.own_logits[0]  # type: ignore[union-attr]
    torch.testing.assert_close(maps.attention_probs[:, 0], own.softmax(2).mean(1))  # type: ignore[operator]
    torch.testing.assert_close(total - loss, ssync_loss(maps, merge=False).loss)
    total.backward()
    assert host.slot_attn.to_q.weight.grad.abs().sum() > 0  # type: ignore[union-attr]
