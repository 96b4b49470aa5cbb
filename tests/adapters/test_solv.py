import copy
import random
from typing import Any

import pytest
import solv_hosts as solv
import torch
from torch import Tensor, nn

from ssync_pl import attach, ssync_loss
from ssync_pl.adapters import Capture
from ssync_pl.adapters.solv import SolvAdapter
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps

Run = tuple[solv.SolvHost, Any, Capture, SSyncMaps, tuple[Tensor, Tensor, Tensor]]


def _run(host: solv.SolvHost | None = None, seed: int = 3) -> Run:
    host = host or solv.SolvHost()
    adapter, batch = SolvAdapter(), solv.solv_inputs()
    capture = adapter.attach(host)
    random.seed(seed)
    capture.open()
    host(*batch)
    capture.close()
    return host, adapter, capture, adapter.collect(capture, batch), batch


def _expected(host: solv.SolvHost, places: Tensor) -> SSyncMaps:
    dots, where = solv.centre(host.s_bind.own_logits), solv.centre(places)
    clusters = host.merge.own_clusters if host.merge_slots else [list(range(solv.SLOTS))] * len(dots)
    logits, masks = torch.zeros(2, len(dots), 1, solv.SLOTS, solv.PATCHES)
    slots, patches = torch.zeros(len(dots), solv.SLOTS).bool(), torch.zeros(len(dots), 1, solv.PATCHES).bool()
    for video, labels in enumerate(clusters):
        patches[video, 0, where[video]] = True
        masks[video, 0, : len(host.own_alpha[video])] = host.own_alpha[video].detach()
        for cluster in set(labels):
            members = [slot for slot in range(solv.SLOTS) if labels[slot] == cluster]
            slots[video, cluster] = True
            logits[video, 0, cluster, where[video]] = dots[video, members].logsumexp(0)
    return SSyncMaps(logits, masks, grid=solv.GRID, slot_valid=slots, patch_valid=patches)


@pytest.mark.parametrize("merge", [True, False])
def test_maps_and_loss_are_the_hosts_own(merge: bool) -> None:
    host, adapter, capture, maps, batch = _run(solv.SolvHost(merge))
    own = _expected(host, batch[2])
    assert maps.grid == own.grid
    assert torch.equal(maps.patch_valid, own.patch_valid)
    if merge:
        assert torch.equal(maps.slot_valid, own.slot_valid)
        assert not own.slot_valid.all()  # some are merged in this case
        assert own.slot_valid.all(1).any()  # and some videos are left alone
    else:
        assert maps.slot_valid is None
    exact = {} if merge else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(maps.attention_logits, own.attention_logits, **exact)
    there = own.slot_valid[:, None, :, None].expand(maps.shape)
    assert torch.equal(maps.mask_logits[there], own.mask_logits[there])
    adapter.verify(capture, maps)
    maps.check_values()
    torch.testing.assert_close(ssync_loss(maps).loss, ssync_loss(own).loss)
    for side, weight in ((maps.attention_logits, host.s_bind.Q.weight), (maps.mask_logits, host.dec[2].weight)):
        assert torch.autograd.grad(side.square().sum(), weight, retain_graph=True)[0].any()
    ssync_loss(maps).loss.backward()
    assert all(p.grad.isfinite().all() for p in host.parameters() if p.grad is not None)


@pytest.mark.parametrize("seed", range(4))
def test_both_ways_to_find_the_members_agree_with_the_clustering(seed: int) -> None:
    host, _, capture, _, batch = _run(seed=seed)
    members = capture.only("merger")[2]
    for video, labels in enumerate(host.merge.own_clusters):
        assert labels == members[video, 0].int().argmax(0).tolist()
    capture.clear()
    random.seed(seed)
    with torch.no_grad():  # as in validation, where there is no gradient to read
        capture.open()
        host(*batch)
        after = random.random()
        capture.close()
    assert torch.equal(capture.only("merger")[2], members)
    random.seed(seed)
    host(*batch)
    assert random.random() == after  # the second merging took no random number of its own


def test_hooks_change_nothing_and_go_away() -> None:
    host = solv.SolvHost()
    twin, batch, keys, results = copy.deepcopy(host), solv.solv_inputs(), list(host.state_dict()), []
    with attach(host, warmup_steps=10):
        for model in (host, twin):
            random.seed(1)
            out = model(*batch)
            (out["rec"].square().mean() + out["mask"].square().mean()).backward()
            results.append({**out, "random": random.random(), "gradients": [p.grad for p in model.parameters()]})
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert list(host.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())


@pytest.mark.parametrize("part", ["merge of the merger", " masks of the host"])
def test_a_host_that_changes_its_maps_is_refused(part: str) -> None:
    host = solv.SolvHost()
    path, _, words = part.partition(" ")
    host.get_submodule(path).tamper = True
    _, adapter, capture, maps, _ = _run(host)
    with pytest.raises(HostError, match=words):
        adapter.verify(capture, maps)


def test_autocast_is_kept() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        host, adapter, capture, maps, _ = _run(solv.SolvHost(merge=False, iterations=4))
    own = solv.centre(host.s_bind.own_logits)
    assert torch.equal(capture.only("binder").logits[:, 0], own)
    assert own.dtype == torch.bfloat16
    adapter.verify(capture, maps)


def test_other_layouts_are_refused() -> None:
    class KeysOnly(solv.Binder):
        def forward(self, inputs: Tensor, token_indices: Tensor) -> Any:
            return self.f(self.Q(self.slots))

    host, adapter, capture, _, batch = _run()
    capture.open()
    host(*batch)
    with pytest.raises(HostError, match="'binder' to run once"):
        adapter.collect(capture, batch)
    host = solv.SolvHost()
    host.s_bind = KeysOnly()
    SolvAdapter().attach(host).open()
    with pytest.raises(HostError, match="KeysOnly to take a softmax"):
        host(*batch)
    del host.merge
    for other in (host, nn.ModuleDict({"s_bind": nn.Linear(1, 1)})):
        assert not SolvAdapter().match(other)
        with pytest.raises(HostError, match="binder `s_bind`"):
            SolvAdapter().attach(other)


@pytest.mark.parametrize("training", [True, False])
def test_maps_of_the_packaged_host(training: bool) -> None:
    host, adapter = solv.packaged().train(training), SolvAdapter()
    capture = adapter.attach(host)
    capture.open()
    out = host(torch.randn(2, solv.FRAMES if training else 6, solv.PATCHES, 6))
    maps = adapter.collect(capture)
    adapter.verify(capture, maps)
    if not training:  # all frames, as probabilities
        assert maps.patch_valid is None
        torch.testing.assert_close(maps.mask_probs, out.masks)
        attention = torch.einsum("btij,btjn->btin", out.members.float(), out.attention_logits.softmax(2))
        torch.testing.assert_close(maps.attention_probs, attention)
        return
    assert torch.equal(maps.mask_logits, out.mask_logits)
    assert torch.equal(maps.slot_valid, out.slot_valid[:, 0])
    assert not maps.slot_valid.all()
    assert maps.patch_valid.sum().item() == 2 * solv.KEPT
    own, where = out.attention_logits[:, solv.RADIUS], out.token_indices[:, solv.RADIUS]
    expected = (out.members[:, 0].float() @ own.exp()).log()
    got = maps.attention_logits[:, 0].gather(2, where[:, None].expand_as(own))
    torch.testing.assert_close(got[maps.slot_valid], expected[maps.slot_valid])
