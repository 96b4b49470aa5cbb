"""What holds for every host that a spec serves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from spec_cases import CASES, FAMILIES, OWN, hear, own_maps

from ssync_pl import attach, ssync_loss
from ssync_pl.adapters import base
from ssync_pl.errors import HostError

EVERY = pytest.mark.parametrize("name", CASES)
ONE_EACH = pytest.mark.parametrize("name", [next(iter(hosts.HOSTS)) for hosts in FAMILIES.values()])
SIDES = ("attention_logits", "mask_logits", "mask_probs")


@EVERY
def test_logits_are_the_hosts_own_to_the_bit_and_nothing_of_the_host_changes(name: str) -> None:
    case = CASES[name]
    host, twin = case.host(), case.host()
    keys = list(host.state_dict())
    torch.manual_seed(1)
    heard = hear(case, host)
    own = own_maps(case, host, heard.maps)
    for side in SIDES:
        mine, expected = getattr(heard.maps, side), getattr(own, side)
        assert (mine is None) == (expected is None)
        if mine is not None and side == "mask_probs":
            torch.testing.assert_close(mine, expected)
        elif mine is not None:
            assert torch.equal(mine, expected)
    heard.adapter.verify(heard.capture, heard.maps)
    torch.manual_seed(1)
    assert torch.equal(heard.loss, case.hosts.training_loss(twin))
    assert list(host.state_dict()) == keys
    heard.capture.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in host.modules())


@EVERY
def test_autocast_of_the_host_is_kept(name: str) -> None:
    case = CASES[name]
    host = case.host()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heard = hear(case, host)
    maps = heard.adapter.collect(heard.capture, case.batch(host))  # outside of autocast on purpose
    own = own_maps(case, host, maps)
    assert torch.equal(maps.attention_logits, own.attention_logits)
    assert own.mask_logits is None or torch.equal(maps.mask_logits, own.mask_logits)
    heard.adapter.verify(heard.capture, maps)


@ONE_EACH
def test_a_slot_attention_that_switches_autocast_off_is_recomputed_in_full_precision(name: str) -> None:
    case = CASES[name]
    host = case.host()
    attention = case.attention(host)
    plain = attention.forward

    def careful(first: Any, second: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return plain(first.float(), second.float(), *args, **kwargs)

    attention.forward = careful
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heard = hear(case, host)
    assert heard.maps.attention_logits.dtype == torch.float32
    assert torch.equal(heard.maps.attention_logits, own_maps(case, host, heard.maps).attention_logits)
    heard.adapter.verify(heard.capture, heard.maps)


@EVERY
def test_loss_and_gradients_are_those_of_the_hosts_own_tensors(name: str) -> None:
    case = CASES[name]
    host = case.host()
    maps = hear(case, host).maps
    mine, expected = ssync_loss(maps).loss, ssync_loss(own_maps(case, host, maps)).loss
    torch.testing.assert_close(mine, expected)
    named = {key: p for key, p in host.named_parameters() if p.requires_grad}
    one, two = (
        torch.autograd.grad(x, [*named.values()], retain_graph=True, allow_unused=True) for x in (mine, expected)
    )
    for key, a, b in zip(named, one, two, strict=True):
        assert a is None or bool(a.isfinite().all()), key
        if maps.attention_probs is None and a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    words = ("to_q.w", "proj_q", "project_q.1", "dense_q")
    query = next(p for key, p in named.items() if any(word in key for word in words))
    decoder = next(p for key, p in named.items() if "decode" in key and "weight" in key)
    for side, parameter in ((maps.attention[:, -1], query), (maps.masks, decoder)):
        side = side.masked_fill(side.isinf(), 0.0)
        assert torch.autograd.grad(side.square().sum(), parameter, retain_graph=True)[0].abs().sum() > 0


@ONE_EACH
def test_a_copy_of_the_host_is_not_heard(name: str) -> None:
    case = CASES[name]
    host = case.host()
    heard = hear(case, host)
    counts = {key: len(values) for key, values in heard.capture._records.items()}
    for module in host.modules():  # graph tensors that the test's host keeps for itself cannot be copied
        for key in [key for key in vars(module) if key.startswith(OWN)]:
            setattr(module, key, [])
    heard.capture.open()
    case.hosts.training_loss(copy.deepcopy(host))
    assert {key: len(values) for key, values in heard.capture._records.items()} == counts


@pytest.mark.parametrize("side", [0, 1])
@EVERY
def test_verify_refuses_a_host_that_changes_its_maps(name: str, side: int) -> None:
    case = CASES[name]
    host = case.host()
    part = case.parts(host)[side]
    if not hasattr(part, "sharpen"):
        pytest.skip("it gives probabilities, with which there is nothing to compare")
    part.sharpen = 3.0
    heard = hear(case, host)
    with pytest.raises(HostError, match="but they differ by up to"):
        heard.adapter.verify(heard.capture, heard.maps)


@EVERY
def test_steps_in_a_loop(name: str) -> None:
    case = CASES[name]
    host, alone = case.host(), case.host()
    for model in (host, alone):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ssync = attach(model, warmup_steps=0).__enter__() if model is host else None
        for _ in range(2):
            loss = case.hosts.training_loss(model)
            total = loss if ssync is None else ssync.add(loss)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        if ssync is not None:
            own = own_maps(case, host, ssync.maps)  # of the last step alone
            assert torch.equal(ssync.maps.attention_logits, own.attention_logits)
            ssync.__exit__(None, None, None)
    pairs = zip(host.state_dict().values(), alone.state_dict().values(), strict=True)
    assert sum(not torch.equal(a, b) for a, b in pairs) > 2


@ONE_EACH
def test_a_second_pass_is_refused(name: str) -> None:
    case = CASES[name]
    if case.adapter in ("oclf", "adaslot"):
        pytest.skip("two passes of images are two frames there")
    host = case.host()
    adapter = base._REGISTRY[case.adapter]()
    capture = adapter.attach(next(module for module in host.modules() if adapter.match(module)))
    capture.open()
    case.hosts.training_loss(host)
    case.hosts.training_loss(host)
    with pytest.raises(HostError, match=r"to run once inside|the slot attention saw, but it ran on"):
        adapter.collect(capture)


@pytest.mark.parametrize("adapter", FAMILIES)
def test_what_a_host_needs_is_named(adapter: str) -> None:
    with pytest.raises(HostError, match=r"Expected Linear to have .* Name the modules yourself"):
        base._REGISTRY[adapter]().attach(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "path"), [("junkeun_yi", "corrector"), ("genera1z", "model.processor.correct.proj_k")]
)
def test_copies_of_data_parallel_are_refused(name: str, path: str) -> None:
    host = CASES[name].host()
    host.get_submodule(path)._is_replica = True  # as on the copies that torch.nn.DataParallel runs in threads
    with pytest.raises(HostError, match="DataParallel"):
        hear(CASES[name], host)
