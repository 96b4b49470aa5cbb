from __future__ import annotations

import pytest
import torch
from slotformer_hosts import SIZE, SLOTS, SlotFormerHost, own_maps, slotformer_batch

from ssync_pl import attach, ssync_loss
from ssync_pl.adapters.savi import SlotFormerAdapter
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps


def test_a_trainer_that_goes_past_the_models_call_is_served() -> None:
    torch.manual_seed(0)
    host = SlotFormerHost()
    with attach(host, warmup_steps=0) as ssync:
        loss = host.loss_function(slotformer_batch(host))["post_recon_loss"]
        total = ssync.add(loss)
    attention, masks = own_maps(host)
    expected = ssync_loss(SSyncMaps(attention_logits=attention, mask_logits=masks.flatten(3), grid=(SIZE, SIZE))).loss
    torch.testing.assert_close(total, loss + expected, rtol=0, atol=0)


def test_a_wrapper_of_data_parallel_training_is_looked_into() -> None:
    host = SlotFormerHost()
    wrapped = torch.nn.DataParallel(host)  # without several devices it calls the model itself
    batch = slotformer_batch(host)
    with attach(wrapped, warmup_steps=0) as ssync:
        loss = wrapped.module.calc_train_loss(batch, wrapped(batch))["post_recon_loss"]
        assert float(ssync.add(loss).detach()) > float(loss.detach())
    assert ssync.maps.shape == (2, 3, SLOTS, SIZE * SIZE)


def test_masks_finer_than_the_attention_are_averaged_to_its_grid() -> None:
    host = SlotFormerHost(resolution=2 * SIZE)
    adapter = SlotFormerAdapter()
    capture = adapter.attach(host)
    capture.open()
    host(slotformer_batch(host))
    maps = adapter.collect(capture)
    assert maps.grid == (SIZE, SIZE)
    assert maps.mask_logits is None
    torch.testing.assert_close(maps.mask_probs.sum(2), torch.ones(2, 3, SIZE * SIZE))
    adapter.verify(capture, maps)


def test_kernels_are_drawn_as_without_ssync() -> None:
    torch.manual_seed(0)
    host = SlotFormerHost()
    batch = slotformer_batch(host)
    torch.manual_seed(1)
    alone = host(batch)["post_masks"]
    torch.manual_seed(1)
    with attach(host, warmup_steps=0) as ssync:
        assert torch.equal(host(batch)["post_masks"], alone)
        ssync.loss()
        after = torch.rand(3)
    torch.manual_seed(1)
    host(batch)
    assert torch.equal(torch.rand(3), after)


def test_validation_between_steps_is_not_heard() -> None:
    host = SlotFormerHost()
    with attach(host, warmup_steps=0) as ssync:
        host(slotformer_batch(host))
        own = own_maps(host)[0].detach()
        host.eval()
        with torch.no_grad():
            host.loss_function(slotformer_batch(host))
        host.train()
        ssync.loss()
    assert torch.equal(ssync.maps.attention_logits, own)


def test_extraction_of_slots_without_a_decoder_is_refused() -> None:
    host = SlotFormerHost()
    host.decode = lambda slots: (slots.mean((1, 2))[:, None, None, None].expand(-1, 3, SIZE, SIZE), slots)  # type: ignore
    with attach(host, warmup_steps=0) as ssync:
        host.loss_function(slotformer_batch(host))
        with pytest.raises(HostError, match="'decoder' did not run"):
            ssync.loss()
