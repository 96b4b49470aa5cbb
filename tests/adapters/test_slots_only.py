"""What holds for every host whose slot attention gives no map: SOLD, Genera1Z, SlotFormer, junkeun-yi."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from slots_only_cases import CASES, FAMILIES, hear, pooled
from torch import Tensor, nn
from videosaur_hosts import Host, MLPDecoder

from ssync_pl import attach, ssync_loss
from ssync_pl.errors import HostError
from ssync_pl.hosts import SAVi
from ssync_pl.method.maps import SSyncMaps

EVERY = pytest.mark.parametrize("name", CASES)
ONE_EACH = pytest.mark.parametrize("name", [next(iter(hosts.HOSTS)) for _, hosts in FAMILIES])


def _expected(case: Any, host: Any, maps: SSyncMaps) -> SSyncMaps:
    """Maps from the tensors that the host itself computed."""
    attention, masks = case.hosts.own_maps(host)
    same = tuple(masks.shape[-2:]) == maps.grid
    side = {"mask_logits": masks.flatten(3)} if same else {"mask_probs": pooled(masks.float(), maps.grid)}
    return SSyncMaps(attention_logits=attention, attention_probs=maps.attention_probs, grid=maps.grid, **side)


@EVERY
def test_logits_are_the_hosts_own_to_the_bit(name: str) -> None:
    case = CASES[name]
    host = case.host()
    heard = hear(case, host)
    own = _expected(case, host, heard.maps)
    assert torch.equal(heard.maps.attention_logits, own.attention_logits)
    if own.mask_logits is None:
        assert heard.maps.mask_logits is None
        torch.testing.assert_close(heard.maps.mask_probs, own.mask_probs)
    else:
        assert torch.equal(heard.maps.mask_logits, own.mask_logits)
    batch, frames, _, patches = heard.maps.shape
    assert (batch, frames) == (2, 3)
    assert heard.maps.grid[0] * heard.maps.grid[1] == patches
    heard.adapter.verify(heard.capture, heard.maps)
    assert heard.maps.slot_valid is None


@EVERY
def test_autocast_of_the_host_is_kept(name: str) -> None:
    case = CASES[name]
    host = case.host()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heard = hear(case, host)
    maps = heard.adapter.collect(heard.capture)  # outside of autocast on purpose
    own = _expected(case, host, maps)
    assert torch.equal(maps.attention_logits, own.attention_logits)
    assert own.mask_logits is None or torch.equal(maps.mask_logits, own.mask_logits)
    if maps.attention_probs is None:
        assert maps.attention_logits.dtype == torch.bfloat16
    heard.adapter.verify(heard.capture, maps)


@ONE_EACH
def test_a_slot_attention_that_switches_autocast_off_is_recomputed_in_full_precision(name: str) -> None:
    case = CASES[name]
    host = case.host()
    module = {"sold": "autoencoder.corrector", "genera1z": "model.processor.correct", "slotformer": "slot_attention"}
    attention: Any = host.get_submodule(module.get(name, "corrector"))
    plain = attention.forward

    def careful(first: Tensor, second: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return plain(first.float(), second.float(), *args, **kwargs)

    attention.forward = careful
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heard = hear(case, host)
    assert heard.maps.attention_logits.dtype == torch.float32
    assert torch.equal(heard.maps.attention_logits, case.hosts.own_maps(host)[0])
    heard.adapter.verify(heard.capture, heard.maps)


@EVERY
def test_loss_and_gradients_are_those_of_the_hosts_own_tensors(name: str) -> None:
    case = CASES[name]
    host = case.host()
    with attach(host, warmup_steps=0) as ssync:
        loss = case.hosts.training_loss(host)
        total = ssync.add(loss)
    expected = ssync_loss(_expected(case, host, ssync.maps)).loss
    torch.testing.assert_close(total, loss + expected)
    parameters = [p for p in host.parameters() if p.requires_grad]
    mine = torch.autograd.grad(total - loss, parameters, retain_graph=True, allow_unused=True)
    own = torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True)
    if ssync.maps.attention_probs is None:
        for p, a, b in zip(parameters, mine, own, strict=True):
            zero = torch.zeros_like(p)
            torch.testing.assert_close(zero if a is None else a, zero if b is None else b, atol=1e-6, rtol=1e-4)
    assert all(a is None or bool(a.isfinite().all()) for a in mine)


@EVERY
def test_gradient_reaches_both_sides(name: str) -> None:
    case = CASES[name]
    host = case.host()
    maps = hear(case, host).maps
    named = {key: p for key, p in host.named_parameters() if p.requires_grad}
    query = next(p for key, p in named.items() if any(q in key for q in ("to_q.w", "proj_q", "project_q.1", "dense_q")))
    decoder = next(p for key, p in named.items() if "decoder." in key and "weight" in key)
    for side, parameter in ((maps.attention[:, -1], query), (maps.masks, decoder)):
        assert torch.autograd.grad(side.square().sum(), parameter, retain_graph=True)[0].abs().sum() > 0


@EVERY
def test_nothing_of_the_host_changes(name: str) -> None:
    case = CASES[name]
    host, twin = case.host(), case.host()
    keys = list(host.state_dict())
    torch.manual_seed(1)
    heard = hear(case, host)
    torch.manual_seed(1)
    assert torch.equal(heard.loss, case.hosts.training_loss(twin))
    assert list(host.state_dict()) == keys
    heard.loss.backward()
    heard.capture.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in host.modules())


@ONE_EACH
def test_a_copy_of_the_host_is_not_heard(name: str) -> None:
    case = CASES[name]
    host = case.host()
    heard = hear(case, host)
    counts = {key: len(values) for key, values in heard.capture._records.items()}
    for module in host.modules():  # graph tensors that the test's host keeps for itself cannot be copied
        for key in [k for k in vars(module) if k.startswith(("own", "first_alpha", "outputs", "attention_masks"))]:
            setattr(module, key, [])
    heard.capture.open()
    case.hosts.training_loss(copy.deepcopy(host))
    assert {key: len(values) for key, values in heard.capture._records.items()} == counts


@pytest.mark.parametrize("side", [0, 1])
@EVERY
def test_verify_refuses_a_host_that_changes_its_maps(name: str, side: int) -> None:
    case = CASES[name]
    host = case.host()
    case.hosts.parts(host)[side].sharpen = 2.0
    heard = hear(case, host)
    with pytest.raises(HostError, match="but they differ by up to"):
        heard.adapter.verify(heard.capture, heard.maps)


@EVERY
def test_three_steps_in_a_loop(name: str) -> None:
    case = CASES[name]
    host, alone = case.host(), case.host()
    for model, active in ((host, True), (alone, False)):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        if active:
            with attach(model, warmup_steps=0) as ssync:
                for _ in range(3):
                    total = ssync.add(case.hosts.training_loss(model))
                    optimizer.zero_grad()
                    total.backward()
                    optimizer.step()
                assert ssync.step == 3
                assert bool(total.isfinite())
        else:
            for _ in range(3):
                optimizer.zero_grad()
                case.hosts.training_loss(model).backward()
                optimizer.step()
    pairs = zip(host.state_dict().values(), alone.state_dict().values(), strict=True)
    assert sum(not torch.equal(a, b) for a, b in pairs) > 4


@pytest.mark.parametrize(("adapter", "hosts"), FAMILIES)
def test_only_its_own_hosts_are_matched(adapter: Any, hosts: Any) -> None:
    strangers = [SAVi(), nn.Linear(1, 1), nn.Sequential(nn.Identity()), Host(MLPDecoder(8))]
    strangers += [case.host() for case in CASES.values() if case.hosts is not hosts]
    for host in strangers:
        assert not any(adapter().match(module) for module in host.modules())
    with pytest.raises(HostError, match=r"Expected Linear to have .* Name the modules yourself"):
        adapter().attach(nn.Linear(1, 1))


@ONE_EACH
def test_a_second_pass_is_refused(name: str) -> None:
    case = CASES[name]
    host = case.host()
    adapter = case.adapter()
    root = next(module for module in host.modules() if adapter.match(module))
    capture = adapter.attach(root)
    capture.open()
    case.hosts.training_loss(host)
    case.hosts.training_loss(host)
    with pytest.raises(HostError, match=r"to run once inside|the slot attention saw, but it ran on"):
        adapter.collect(capture)


@ONE_EACH
def test_only_the_last_step_counts(name: str) -> None:
    case = CASES[name]
    host = case.host()
    with attach(host, warmup_steps=0) as ssync:
        for _ in range(2):
            case.hosts.training_loss(host)
            ssync.loss()
    assert torch.equal(ssync.maps.attention_logits, case.hosts.own_maps(host)[0].detach())


def test_copies_of_data_parallel_are_refused() -> None:
    for case in (CASES["junkeun_yi"], CASES["genera1z"]):
        host = case.host()
        key = "corrector.dense_k" if case.name == "junkeun_yi" else "model.processor.correct.proj_k"
        # What torch.nn.DataParallel sets on the copies that it runs in threads.
        host.get_submodule(key)._is_replica = True
        with pytest.raises(HostError, match=r"torch\.nn\.DataParallel runs one for each of several devices"):
            hear(case, host)
