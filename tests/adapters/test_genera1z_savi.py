from __future__ import annotations

import pytest
import torch
from genera1z_savi_hosts import Genera1zHelper, Genera1zHost, genera1z_batch, own_maps, training_loss

from ssync_pl import attach
from ssync_pl.adapters.savi import Genera1zSaviAdapter
from ssync_pl.errors import HostError


def test_slots_of_padded_boxes_are_equal_and_merge_without_harm() -> None:
    torch.manual_seed(0)
    host = Genera1zHelper(Genera1zHost())
    with attach(host, warmup_steps=0, merge_threshold=0.3) as ssync:
        total = ssync.add(training_loss(host, genera1z_batch(padded=2)))
    total.backward()
    logits = own_maps(host)[0]
    torch.testing.assert_close(logits[:, :, 0], logits[:, :, 2])  # background and padding
    torch.testing.assert_close(logits[:, :, 2], logits[:, :, 3])
    assert float(ssync.logs["ssync/merged_slots"]) >= 2
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in host.parameters())


def test_a_decoder_with_another_number_of_channels_is_refused() -> None:
    host = Genera1zHelper(Genera1zHost(channels=5))
    capture = Genera1zSaviAdapter().attach(host.model)
    capture.open()
    with pytest.raises(HostError, match=r"decoder\.readout to give 3 colours and alpha, but got 5"):
        training_loss(host)


def test_a_loop_that_calls_methods_of_the_model_is_served_without_the_check_of_its_reconstruction() -> None:
    torch.manual_seed(0)
    host = Genera1zHost()
    host.sharpen = 2.0  # would be refused, if the model itself were called
    adapter = Genera1zSaviAdapter()
    capture = adapter.attach(host)
    capture.open()
    batch = genera1z_batch()
    host.forward(batch["video"], batch["boxes"])
    capture.close()
    assert not capture.is_empty
    assert capture["output"] == []
    adapter.verify(capture, adapter.collect(capture))
