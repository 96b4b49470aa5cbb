from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from solv_hosts import (
    COLUMNS,
    FRAMES,
    HOSTS,
    KEPT,
    PATCHES,
    RADIUS,
    ROWS,
    SLOTS,
    VIDEOS,
    Binder,
    SolvHost,
    packaged,
    solv_inputs,
    training_loss,
)
from torch import Tensor, nn

from ssync_pl import ssync_loss
from ssync_pl.adapters import Capture, find_adapter
from ssync_pl.adapters.solv import SolvAdapter, merge_member_logits, scatter_tokens
from ssync_pl.errors import HostError
from ssync_pl.hosts import SAVi
from ssync_pl.method.maps import SSyncMaps

Run = tuple[SolvHost, Any, Capture, SSyncMaps, tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(3)


def _run(host: SolvHost | None = None, seed: int = 3) -> Run:
    host = host or SolvHost()
    adapter = SolvAdapter()
    capture = adapter.attach(host)
    batch = solv_inputs()
    random.seed(seed)
    capture.open()
    training_loss(host, batch)
    capture.close()
    return host, adapter, capture, adapter.collect(capture, batch), batch


def _expected(host: SolvHost, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, slot and patch validity, cluster by cluster from what the host kept of itself."""
    own = host.s_bind.own_logits
    assert own is not None
    dots = own.unflatten(0, (-1, FRAMES))[:, RADIUS]
    where = places.unflatten(0, (-1, FRAMES))[:, RADIUS]
    clusters = host.merge.own_clusters if host.merge_slots else [list(range(SLOTS))] * len(dots)
    logits = torch.zeros(len(dots), 1, SLOTS, PATCHES)
    slots = torch.zeros(len(dots), SLOTS, dtype=torch.bool)
    patches = torch.zeros(len(dots), 1, PATCHES, dtype=torch.bool)
    for video, labels in enumerate(clusters):
        patches[video, 0, where[video]] = True
        for cluster in set(labels):
            members = [slot for slot in range(SLOTS) if labels[slot] == cluster]
            slots[video, cluster] = True
            row = dots[video, members[0]] if len(members) == 1 else dots[video, members].logsumexp(0)
            logits[video, 0, cluster, where[video]] = row
    return logits, slots, patches


def test_maps_are_the_hosts_own() -> None:
    host, adapter, capture, maps, batch = _run()
    logits, slots, patches = _expected(host, batch[2])
    assert maps.shape == (VIDEOS, 1, SLOTS, PATCHES)
    assert maps.grid == (ROWS, COLUMNS)
    assert maps.slot_valid is not None
    assert torch.equal(maps.slot_valid, slots)
    assert not slots.all()  # some are merged in this case
    assert slots.all(1).any()  # and some videos are left alone
    assert torch.equal(maps.patch_valid, patches)
    torch.testing.assert_close(maps.attention_logits, logits)
    alone = torch.tensor([[labels.count(k) == 1 for k in range(SLOTS)] for labels in host.merge.own_clusters])
    assert torch.equal(maps.attention_logits[:, 0][alone], logits[:, 0][alone])
    for video, alpha in enumerate(host.own_alpha):
        assert torch.equal(maps.mask_logits[video, 0, : len(alpha)], alpha)
    adapter.verify(capture, maps)
    maps.check_values()


def test_logits_of_a_host_that_does_not_merge_are_equal_to_the_bit() -> None:
    host, adapter, capture, maps, batch = _run(SolvHost(merge=False))
    logits, _, patches = _expected(host, batch[2])
    assert torch.equal(maps.attention_logits, logits)
    assert torch.equal(maps.patch_valid, patches)
    assert maps.slot_valid is None
    adapter.verify(capture, maps)


@pytest.mark.parametrize("seed", range(8))
def test_both_ways_to_find_the_members_agree_with_the_clustering(seed: int) -> None:
    host, _, capture, maps, batch = _run(seed=seed)
    expected = _expected(host, batch[2])[1]
    members = capture.only("merger")[2]
    for video, labels in enumerate(host.merge.own_clusters):
        assert [labels[slot] for slot in range(SLOTS)] == members[video, 0].int().argmax(0).tolist()
    capture.clear()
    random.seed(seed)
    with torch.no_grad():  # as in validation, where there is no gradient to read
        capture.open()
        training_loss(host, batch)
        after = random.random()
        capture.close()
    assert torch.equal(capture.only("merger")[2], members)
    assert torch.equal(maps.slot_valid, expected)
    random.seed(seed)
    host(*batch)
    assert random.random() == after  # the second merging took no random number of its own


def test_gradient_reaches_both_sides_and_stays_finite() -> None:
    host, _, _, maps, _ = _run()
    encoder = torch.autograd.grad(maps.attention_logits.square().sum(), host.s_bind.Q.weight, retain_graph=True)[0]
    decoder = torch.autograd.grad(maps.mask_logits.square().sum(), host.dec.layer2.weight, retain_graph=True)[0]
    assert encoder.any()
    assert decoder.any()
    ssync_loss(maps).loss.backward()
    grads = [p.grad for p in host.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)


def test_hooks_change_nothing_and_go_away() -> None:
    host, twin = SolvHost(), SolvHost()
    twin.load_state_dict(host.state_dict())
    batch, keys = solv_inputs(), list(host.state_dict())
    capture = SolvAdapter().attach(host)
    capture.open()
    results = []
    for model in (host, twin):
        random.seed(1)
        torch.manual_seed(1)
        out = model(*batch)
        (out["rec"].square().mean() + out["mask"].square().mean()).backward()
        results.append((out, random.random(), torch.rand(1)))
    for name in ("rec", "mask", "slots", "slot_nums"):
        assert torch.equal(results[0][0][name], results[1][0][name])
    assert results[0][1:] == results[1][1:]
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(host.parameters(), twin.parameters(), strict=True))
    assert list(host.state_dict()) == keys
    copied = copy.deepcopy(host)
    copied(*batch)
    assert len(capture["binder"]) == 1
    capture.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())


@pytest.mark.parametrize("part", ["s_bind", "merge", ""])
def test_verify_refuses_a_host_that_changes_its_maps(part: str) -> None:
    host = SolvHost()
    (getattr(host, part) if part else host).tamper = True
    host, adapter, capture, maps, _ = _run(host)
    word = {"s_bind": "attention of the binder", "merge": "slots of the merger", "": "masks of the host"}[part]
    with pytest.raises(HostError, match=word):
        adapter.verify(capture, maps)


def test_autocast_of_the_host_is_kept() -> None:
    host = SolvHost(merge=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        host, adapter, capture, maps, _ = _run(host)
    assert capture.only("binder").logits.dtype == torch.bfloat16
    own = host.s_bind.own_logits
    assert own is not None
    assert torch.equal(capture.only("binder").logits[:, 0], own.unflatten(0, (-1, FRAMES))[:, RADIUS])
    adapter.verify(capture, maps)


def test_memory_of_the_loop_is_let_go() -> None:
    _, _, capture, _, _ = _run(SolvHost(iterations=4))
    assert [capture[key] for key in ("binder Q", "binder f")] == [[], []]


def test_two_calls_in_a_step_are_refused() -> None:
    host, adapter, capture, _, batch = _run()
    capture.open()
    host(*batch)
    with pytest.raises(HostError, match="'binder' to run once"):
        adapter.collect(capture, batch)


def test_a_binder_that_makes_keys_only_is_refused() -> None:
    class KeysOnly(Binder):
        def forward(self, inputs: Tensor, token_indices: Tensor) -> tuple[Tensor, Tensor]:
            slots = self.Q(self.slots.expand(len(inputs), -1, -1))
            return slots, torch.einsum("bsd,bnd->bsn", slots, self.f(self.initial_mlp(inputs)))

    host = SolvHost()
    host.s_bind = KeysOnly()
    capture = SolvAdapter().attach(host)
    capture.open()
    with pytest.raises(HostError, match="KeysOnly to call 'f'"):
        host(*solv_inputs())


def test_only_solv_is_known() -> None:
    adapter = SolvAdapter()
    assert all(adapter.match(make()) for make in HOSTS.values())
    assert adapter.match(packaged())
    for other in (SAVi(), nn.Linear(1, 1), nn.ModuleDict({"s_bind": nn.Linear(1, 1)})):
        assert not adapter.match(other)
    broken = SolvHost()
    del broken.merge
    assert not adapter.match(broken)
    assert isinstance(find_adapter(SolvHost()), SolvAdapter)
    assert isinstance(find_adapter(packaged()), SolvAdapter)


def _packaged_run(training: bool = True) -> tuple[Any, Capture, SSyncMaps, Any]:
    host = packaged().train(training)
    adapter = SolvAdapter()
    capture = adapter.attach(host)
    capture.open()
    out = host(torch.randn(2, FRAMES if training else 6, PATCHES, 6))
    maps = adapter.collect(capture)
    adapter.verify(capture, maps)
    return host, capture, maps, out


def test_maps_of_the_packaged_host() -> None:
    _, _, maps, out = _packaged_run()
    assert maps.shape == (2, 1, SLOTS, PATCHES)
    assert torch.equal(maps.mask_logits, out.mask_logits)
    assert torch.equal(maps.slot_valid, out.slot_valid[:, 0])
    assert not maps.slot_valid.all()
    assert maps.patch_valid.sum().item() == 2 * KEPT
    for video in range(2):
        own = out.attention_logits[video, RADIUS]
        for slot in range(SLOTS):
            members = out.members[video, 0, slot]
            row = maps.attention_logits[video, 0, slot, out.token_indices[video, RADIUS]]
            if members.sum() == 1:
                assert torch.equal(row, own[members][0])
            elif members.any():
                torch.testing.assert_close(row, own[members].logsumexp(0))


def test_an_evaluation_of_the_packaged_host_gives_all_frames() -> None:
    _, _, maps, out = _packaged_run(training=False)
    assert maps.shape == (2, 6, SLOTS, PATCHES)
    assert maps.patch_valid is None
    torch.testing.assert_close(maps.mask_probs, out.masks)
    attention = torch.einsum("btij,btjn->btin", out.members.float(), out.attention_logits.softmax(2))
    torch.testing.assert_close(maps.attention_probs, attention)


def test_slots_without_members_get_no_gradient() -> None:
    logits = torch.randn(1, 1, 3, 4, requires_grad=True)
    members = torch.tensor([[[[True, False, True], [False, True, False], [False, False, False]]]])
    merged = merge_member_logits(logits, members)
    assert torch.equal(merged[0, 0, 1], logits[0, 0, 1])
    assert not merged[0, 0, 2].any()
    (grad,) = torch.autograd.grad(merged.sum(), logits)
    torch.testing.assert_close(grad[0, 0, 0] + grad[0, 0, 2], torch.ones(4))
    torch.testing.assert_close(grad[0, 0, 1], torch.ones(4))


def test_all_tokens_in_another_order_need_no_mask() -> None:
    logits = torch.arange(4.0).view(1, 1, 1, 4)
    grid, valid = scatter_tokens(logits, torch.tensor([[[2, 0, 3, 1]]]), 4)
    assert grid.flatten().tolist() == [1.0, 3.0, 0.0, 2.0]
    assert valid is None
    assert scatter_tokens(logits, None, 4) == (logits, None)
