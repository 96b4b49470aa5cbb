from __future__ import annotations

from typing import Any

import pytest
import torch
from adaslot_hosts import AdaSlotHost, DroppingAttention, DroppingPixelDecoder
from oclf_hosts import GRID, SLOTS, N, oclf_batch
from torch import Tensor

from ssync_pl.adapters.oclf import AdaSlotAdapter
from ssync_pl.errors import HostError
from ssync_pl.method.loss import ssync_loss
from ssync_pl.method.maps import SSyncMaps

KEPT = torch.tensor([[1.0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0], [0, 1, 1, 0]])
NONE_LEFT = torch.tensor([[1.0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]])


def _run(host: Any, kept: Tensor | None = KEPT) -> tuple[AdaSlotAdapter, Any, SSyncMaps]:
    host.inner[0].kept = kept
    adapter = AdaSlotAdapter()
    capture = adapter.attach(host)
    batch = oclf_batch(images=4)
    capture.open()
    host.training_step(batch, 0)
    capture.close()
    return adapter, capture, adapter.collect(capture, batch)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("mask_type", ["mask_normalized", "mask", "logit"])
@pytest.mark.parametrize("heads", [1, 2])
def test_dropped_slots_do_not_exist(heads: int, mask_type: str) -> None:
    host = AdaSlotHost(heads=heads, mask_type=mask_type)
    adapter, capture, maps = _run(host)
    attention, decoder = host.inner
    assert torch.equal(maps.slot_valid, KEPT.bool())
    assert maps.patch_valid.all()
    assert torch.equal(maps.mask_logits[:, 0], decoder.own_logits[0])
    own = attention.own_logits[0]
    if heads == 1:
        assert torch.equal(maps.attention_logits[:, 0], own[:, :, 0])
    maps.check_values()
    adapter.verify(capture, maps)
    # The loss by hand: each image with its own number of slots, weighed by its patches and slots.
    output = ssync_loss(maps, merge=False)
    sums, entries = torch.zeros(2), torch.zeros(2)
    for image, kept in enumerate(KEPT.bool()):
        small = SSyncMaps(
            attention_logits=own[image, kept].logsumexp(1)[None, None],
            mask_logits=decoder.own_logits[0][image, kept][None, None],
            grid=GRID,
        )
        one = ssync_loss(small, merge=False)
        counts = torch.stack([one.boundary_count, one.interior_count]) * kept.sum()
        sums += torch.stack([one.boundary_loss, one.interior_loss]) * counts
        entries += counts
    expected = sums / entries.clamp_min(1)
    torch.testing.assert_close(torch.stack([output.boundary_loss, output.interior_loss]), expected)


@pytest.mark.parametrize("decoder", ["patches", "pixels", "fine_pixels"])
def test_images_without_slots_are_left_out_and_nothing_is_nan(decoder: str) -> None:
    drawn = {"patches": None, "pixels": DroppingPixelDecoder(GRID), "fine_pixels": DroppingPixelDecoder()}[decoder]
    host = AdaSlotHost(drawn, heads=2)
    adapter, capture, maps = _run(host, NONE_LEFT)
    assert torch.equal(maps.patch_valid, NONE_LEFT.any(1)[:, None, None].expand(4, 1, N))
    maps.check_values()
    assert not maps.masks.isnan().any()
    assert not maps.attention.isnan().any()
    adapter.verify(capture, maps)
    output = ssync_loss(maps)
    assert output.loss > 0
    assert output.used_decoder_slots[1] == output.used_encoder_slots[2] == 0
    grads = torch.autograd.grad(output.loss, [*host.parameters()], allow_unused=True)
    assert any((grad != 0).any() for grad in grads if grad is not None)
    assert all(grad.isfinite().all() for grad in grads if grad is not None)
    everything = ssync_loss(_run(host, torch.zeros(4, SLOTS))[2])
    assert everything.loss == 0
    everything.loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in host.parameters())


def test_the_decision_gets_no_gradient_and_both_maps_do() -> None:
    host = AdaSlotHost(heads=2)
    _, _, maps = _run(host)
    attention, decoder = host.inner
    score = attention.single_gumbel_score_network.weight
    loss = ssync_loss(maps).loss
    of_key, of_alpha, of_score = torch.autograd.grad(
        loss, [attention.to_k.weight, decoder.decoder.weight, score], allow_unused=True
    )
    assert of_score is None
    assert (of_key != 0).any()
    assert (of_alpha != 0).any()


def test_a_decoder_that_ignores_the_decision_keeps_all_slots() -> None:
    host = AdaSlotHost(mask_type="none")
    adapter, capture, maps = _run(host)
    assert maps.slot_valid is None
    adapter.verify(capture, maps)


@pytest.mark.parametrize("kept", [None, KEPT, NONE_LEFT])
def test_half_precision(kept: Tensor | None) -> None:
    host = AdaSlotHost(heads=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapter, capture, maps = _run(host, kept)
    adapter.verify(capture, maps)
    assert torch.equal(maps.attention_logits[:, 0], host.inner[0].own_logits[0].float().logsumexp(2))
    assert ssync_loss(maps).loss.isfinite()


def test_verify_refuses_a_host_that_draws_dropped_slots() -> None:
    host = AdaSlotHost(mask_type="mask")
    adapter = AdaSlotAdapter()
    host.inner[0].kept = KEPT
    capture = adapter.attach(host)
    host.inner[1].mask_type = "none"
    capture.open()
    host.training_step(batch := oclf_batch(images=4), 0)
    with pytest.raises(HostError, match="masks that 'decoder' returns"):
        adapter.verify(capture, adapter.collect(capture, batch))


def test_slot_attention_without_a_decision_is_refused() -> None:
    class Short(DroppingAttention):
        def forward(self, inputs: Tensor, slots: Tensor, masked: Tensor | None = None) -> Any:
            return super().forward(inputs, slots, masked)[:3]

    host = AdaSlotHost()
    host.models["perceptual_grouping"].slot_attention = Short()
    with pytest.raises(HostError, match="Short to return its map as '3'"):
        _run(host)


def test_masked_slots_are_dropped_as_well() -> None:
    host = AdaSlotHost()
    host.inner[0].kept = KEPT
    adapter = AdaSlotAdapter()
    capture = adapter.attach(host)
    capture.open()
    host.training_step(batch := oclf_batch(images=4, n_slots=torch.tensor([3, 2, 3, 4])), 0)
    maps = adapter.collect(capture, batch)
    masked = torch.arange(SLOTS) >= batch["n_slots"][:, None]
    assert torch.equal(maps.slot_valid, KEPT.bool() & ~masked)
    assert ssync_loss(maps).loss.isfinite()
