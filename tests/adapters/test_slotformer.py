from __future__ import annotations

import pytest
import torch
from slotformer_hosts import SIZE, SLOTS, SlotFormerHost, own_maps, slotformer_batch

from ssync_pl import attach, ssync_loss
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


def test_extraction_of_slots_without_a_decoder_is_refused() -> None:
    host = SlotFormerHost()
    host.decode = lambda slots: (slots.mean((1, 2))[:, None, None, None].expand(-1, 3, SIZE, SIZE), slots)  # type: ignore
    with attach(host, warmup_steps=0) as ssync:
        host.loss_function(slotformer_batch(host))
        with pytest.raises(HostError, match="'decoder' did not run"):
            ssync.loss()
