"""Hosts give the same results with and without `memory_efficient`, and SSync sees the same maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssync_pl.adapters import find_adapter
from ssync_pl.hosts import DINOSAUR, SOLV, SlotContrast, VideoSAUR

Build = Callable[..., Any]
HOSTS = [SlotContrast, VideoSAUR, DINOSAUR, SOLV]


def _build(tiny_host: Build, kind: Any, memory_efficient: bool) -> Any:
    options = {"memory_efficient": memory_efficient}
    if kind is not SOLV:
        return tiny_host(kind, decoder="mlp", **options)
    torch.manual_seed(0)
    host = SOLV(
        3, 8, None, feature_dim=6, grid=(2, 3), clip_length=3, temporal_heads=2, decoder_hidden=(16, 12), **options
    )
    host.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return host


def _train(host: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results of a training step with a loss on the maps that SSync's adapter collects."""
    adapter = find_adapter(host)
    capture = adapter.attach(host)
    capture.open(training_only=True)
    torch.manual_seed(1)
    loss = host.training_step(batch, 0)
    maps = adapter.collect(capture, batch)
    adapter.verify(capture, maps)
    assert maps.mask_logits is not None
    assert maps.mask_logits.requires_grad
    (loss + maps.mask_logits.square().mean()).backward()
    assert not capture.silent
    capture.remove()
    found = {"loss": loss.detach(), "masks": maps.mask_logits.detach()}
    return found | {name: p.grad for name, p in host.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", HOSTS, ids=lambda kind: kind.__name__)
def test_a_training_step_with_ssync_is_the_same(kind: Any, tiny_host: Build, feature_batch: dict[str, Tensor]) -> None:
    plain, efficient = (_train(_build(tiny_host, kind, option), feature_batch) for option in (False, True))
    assert plain.keys() == efficient.keys()
    assert any(name.startswith("decoder") for name in plain)
    for name, value in plain.items():
        torch.testing.assert_close(
            efficient[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("kind", HOSTS, ids=lambda kind: kind.__name__)
def test_the_option_reaches_the_decoder(kind: Any, tiny_host: Build) -> None:
    states = []
    for option in (True, False):
        host = _build(tiny_host, kind, option)
        (found,) = {module.memory_efficient for module in host.modules() if hasattr(module, "memory_efficient")}
        assert found is option
        assert host.hparams.memory_efficient is option
        states.append(host.state_dict())
    assert list(states[0]) == list(states[1])


def test_masks_are_the_logits_that_the_decoder_returned(tiny_host: Build, feature_batch: dict[str, Tensor]) -> None:
    host = tiny_host(SlotContrast)
    adapter = find_adapter(host)
    capture = adapter.attach(host)
    capture.open(training_only=True)
    output = host(feature_batch["features"])
    maps = adapter.collect(capture, feature_batch)
    assert maps.mask_logits is not None
    assert torch.equal(maps.mask_logits, output.mask_logits.flatten(3))
    (maps.mask_logits * torch.randn_like(maps.mask_logits)).sum().backward()
    assert host.decoder.module.pos_emb.grad.any()
    capture.remove()


@pytest.mark.slow
@pytest.mark.parametrize("attached_first", [True, False])
def test_a_compiled_scan_trains_as_before(
    attached_first: bool, tiny_host: Build, feature_batch: dict[str, Tensor]
) -> None:
    torch.compiler.reset()
    plain = _train(tiny_host(SlotContrast), feature_batch)
    host = tiny_host(SlotContrast, compile_scan=True)
    if not attached_first:
        host.training_step(feature_batch, 0).backward()
        host.zero_grad()
    compiled = _train(host, feature_batch)
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)
