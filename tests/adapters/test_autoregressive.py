from __future__ import annotations

from typing import Any

import pytest
import torch
from autoregressive_hosts import HOSTS, TokenHost, training_loss
from spec_cases import CASES
from torch import nn

from ssync_pl import attach
from ssync_pl.adapters.autoregressive import AutoregressiveAdapter
from ssync_pl.adapters.base import locate
from ssync_pl.errors import HostError

PLACES = {
    "slotformer_steve": ("slot_attention", "trans_decoder.tf_dec.blocks.1.encoder_decoder_attn"),
    "steve": ("steve_encoder.savi", "steve_decoder.tf.blocks.1.encoder_decoder_attn"),
    "slate": ("slot_attn", "tf_dec.blocks.1.encoder_decoder_attn"),
}


@pytest.mark.parametrize("name", HOSTS)
def test_recognised_and_refused_with_the_way_out(name: str) -> None:
    host = HOSTS[name]()
    assert isinstance(locate("auto", nn.ModuleDict({"model": host})).adapter, AutoregressiveAdapter)
    attention, masks = PLACES[name]
    with pytest.raises(HostError) as error, attach(host, warmup_steps=0):
        pass
    message = str(error.value)
    assert "decoder draws object masks, but TokenHost predicts tokens" in message
    if name == "steve":
        assert "'steve_encoder.savi' runs once for all frames, call an nn.Identity" in message
        attention = "path.of.your_identity', attention_kind='logits"
    else:
        attention = f"softmax:{attention}"
    assert f"SSyncCallback(attention='{attention}', masks='softmax:{masks}')" in message


@pytest.mark.parametrize("name", ["slotformer_steve", "slate"])
def test_what_the_message_says_works(name: str) -> None:
    torch.manual_seed(0)
    host = HOSTS[name]()
    attention, masks = PLACES[name]
    with attach(host, attention=f"softmax:{attention}", masks=f"softmax:{masks}", warmup_steps=0) as ssync:
        for _ in range(3):
            total = ssync.add(training_loss(host))
            host.zero_grad()
            total.backward()
    own = torch.stack(host.get_submodule(attention).own_logits[-3:], 1)
    assert torch.equal(ssync.maps.attention_logits, own.detach())
    cross = host.get_submodule(masks).own_logits.unflatten(0, own.shape[:2]).transpose(2, 3)
    assert torch.equal(ssync.maps.mask_logits, cross.detach())
    for side in (attention, masks):
        assert all(bool(p.grad.isfinite().all()) for p in host.get_submodule(side).parameters())


def test_an_identity_in_a_slot_attention_of_all_frames_works() -> None:
    torch.manual_seed(0)
    host = HOSTS["steve"]()
    attention, masks = PLACES["steve"]
    seen = nn.Identity()
    host.add_module("seen", seen)

    def show(module: Any, args: Any, output: Any) -> None:
        seen(module.own_logits[-1])

    host.get_submodule(attention).register_forward_hook(show)
    with attach(
        host, attention="seen", attention_kind="logits", masks=f"softmax:{masks}", warmup_steps=0, merge_threshold=0.5
    ) as ssync:
        loss = training_loss(host)
        assert float(ssync.add(loss).detach()) > float(loss.detach())
    assert ssync.maps.attention_logits is not None
    assert ssync.maps.shape == (2, 3, 3, 64)


def test_hosts_with_masks_or_without_slots_are_not_matched() -> None:
    for case in CASES.values():
        assert not any(AutoregressiveAdapter().match(module) for module in case.host().modules())
    rollout = TokenHost("elsewhere", "decoder")  # tokens, but slots come from a file
    assert not AutoregressiveAdapter().match(rollout)
