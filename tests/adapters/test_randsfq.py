from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from randsfq_hosts import (
    HOSTS,
    RANDSFQ_GRID,
    RANDSFQ_SLOTS,
    RANDSFQ_T,
    REFUSED,
    Aggregat,
    MixerDecode,
    RandSFQHost,
    RandSFQWrap,
    randsfq_batch,
    training_loss,
)
from torch import Tensor, nn

from ssync_pl import SSyncMaps, attach, ssync_loss
from ssync_pl.adapters import Capture, locate
from ssync_pl.adapters.randsfq import RandSFQAdapter
from ssync_pl.errors import HostError

VALID = torch.tensor([[True, True, False, True], [True, False, True, True]])


def _run(host: Any) -> tuple[RandSFQAdapter, Capture]:
    adapter = RandSFQAdapter()
    capture = adapter.attach(host.m)
    capture.open()
    training_loss(host)
    capture.close()
    return adapter, capture


def _own(host: Any) -> dict[str, Any]:
    frames = RANDSFQ_T if hasattr(host.m, "transit") else 1
    maps = {"attention_logits": torch.stack(host.m.aggregat.own_logits[-frames:], 1), "grid": RANDSFQ_GRID}
    decode = host.m.decode
    name, value = (
        ("mask_probs", decode.own_masks) if isinstance(decode, MixerDecode) else ("mask_logits", decode.own_logits)
    )
    return {**maps, name: value[-1].unflatten(0, (-1, frames))}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", HOSTS)
def test_maps_are_the_hosts_own_to_the_bit(name: str) -> None:
    host = HOSTS[name]()
    adapter, capture = _run(host)
    maps, own = adapter.collect(capture), _own(host)
    assert maps.shape == (2, 1 if name == "randsfq_images" else RANDSFQ_T, RANDSFQ_SLOTS, 8)
    assert maps.grid == RANDSFQ_GRID
    assert maps.slot_valid is None
    for key in ("attention_logits", "mask_logits", "mask_probs"):
        value = getattr(maps, key)
        assert (value is None) == (key not in own)
        assert value is None or torch.equal(value, own[key])
    adapter.verify(capture, maps)
    for value, weight in ((maps.attention, "aggregat.proj_q.weight"), (maps.masks, "decode.places")):
        grad = torch.autograd.grad(value.square().sum(), host.m.get_parameter(weight), retain_graph=True)[0]  # type: ignore[union-attr]
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("name", HOSTS)
def test_a_plain_loop_trains_with_the_loss_of_the_hosts_own_maps(name: str) -> None:
    host: Any = HOSTS[name]()
    assert isinstance(locate("auto", host).adapter, RandSFQAdapter)
    assert locate("auto", host).path == "m"
    keys = list(host.state_dict())
    plain = copy.deepcopy(host)
    optimizer = torch.optim.Adam(host.parameters(), 1e-2)
    with attach(host, warmup_steps=0, merge=False) as ssync:
        for step in range(3):
            loss = training_loss(host, step)
            added = ssync.loss()
            assert torch.equal(added, ssync_loss(SSyncMaps(**_own(host)), merge=False).loss)
            optimizer.zero_grad()
            (loss + added).backward()
            if step == 0:
                training_loss(plain, step).backward()
                for part in ("m.aggregat", "m.decode"):
                    pairs = zip(host.named_parameters(), plain.parameters(), strict=True)
                    assert any(
                        not torch.equal(p.grad, q.grad)
                        for (key, p), q in pairs
                        if key.startswith(part) and p.grad is not None and q.grad is not None
                    )
            optimizer.step()
            if step == 1:
                host.eval()
                with torch.no_grad():
                    training_loss(host)
                host.train()
    assert list(host.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in host.modules())


def test_the_hosts_autocast_is_kept() -> None:
    host: Any = HOSTS["randsfq_broadcast"]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapter, capture = _run(host)
    maps, own = adapter.collect(capture), _own(host)
    assert maps.attention_logits is not None
    assert maps.attention_logits.dtype == torch.bfloat16
    assert torch.equal(maps.attention_logits, own["attention_logits"])
    assert torch.equal(maps.masks, own["mask_logits"])
    adapter.verify(capture, maps)


def test_a_compiled_host_is_heard() -> None:
    host: Any = HOSTS["randsfq_broadcast"]()
    twin = copy.deepcopy(host)
    torch._dynamo.reset()
    with attach(host, warmup_steps=0) as ssync, attach(twin, warmup_steps=0) as expected:
        host.compile(backend="eager")
        for seed in range(2):
            training_loss(host, seed)
            training_loss(twin, seed)
            torch.testing.assert_close(ssync.loss(), expected.loss())


@pytest.mark.parametrize("loss", ["brier", "ce"])
def test_slots_that_do_not_exist_bring_no_nan(loss: str) -> None:
    host: Any = RandSFQWrap(RandSFQHost(slot_mask=VALID))
    adapter, capture = _run(host)
    maps, own = adapter.collect(capture), _own(host)
    assert maps.slot_valid is not None
    assert torch.equal(maps.slot_valid, VALID)
    assert maps.masks.isfinite().all()
    there = VALID[:, None, :, None].expand(maps.shape)
    for key in ("attention_logits", "mask_logits"):
        assert torch.equal(getattr(maps, key)[there], own[key][there])
        assert own[key][~there].isneginf().all()
    adapter.verify(capture, maps)
    output = ssync_loss(maps, loss=loss, merge=False)  # type: ignore[arg-type]
    own_maps = SSyncMaps(**{**own, "slot_valid": VALID})
    assert torch.equal(output.loss, ssync_loss(own_maps, loss=loss, merge=False).loss)  # type: ignore[arg-type]
    output.loss.backward()
    grads = [p.grad for p in host.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    assert any(grad.abs().sum() > 0 for grad in grads)


def test_slot_masks_that_change_between_frames_are_refused() -> None:
    class Changing(Aggregat):
        def forward(self, *args: Any, smask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return super().forward(*args, smask=smask, **kwargs)

    host: Any = RandSFQWrap(RandSFQHost(slot_mask=VALID))
    flips = iter([VALID, VALID.flip(0), VALID])
    host.m.aggregat = Changing()
    host.m.aggregat.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "smask": next(flips)}), with_kwargs=True
    )
    adapter, capture = _run(host)
    with pytest.raises(HostError, match="differ by up to"):
        adapter.verify(capture, adapter.collect(capture))


@pytest.mark.parametrize("part", ["aggregat", "decode"])
def test_verify_refuses_a_host_that_changes_its_maps(part: str) -> None:
    host: Any = HOSTS["randsfq_broadcast"]()
    getattr(host.m, part).sharpen = 2.0
    adapter, capture = _run(host)
    with pytest.raises(HostError, match=f"masks that '{part}' returns to be the softmax .* differ by up to"):
        adapter.verify(capture, adapter.collect(capture))


def test_decoders_without_masks_are_refused_with_the_way_out() -> None:
    wanted = {
        "randsfq_step_by_step": r"StepByStepDecode predicts patches one.* of its last block \(need_weights=True\)",
        "randsfq_diffusion": r"DiffusionDecode is a diffusion model.* on the slots of its denoiser: add an nn.Identity",
    }
    for name, message in wanted.items():
        located = locate("auto", REFUSED[name]())
        with pytest.raises(HostError, match=message):
            located.adapter.attach(located.root)


def test_other_layouts_are_refused() -> None:
    class Alone(MixerDecode):
        def forward(self, clue: Any, slots: Tensor) -> Any:
            return super().forward(clue, slots)[1]

    class Folded(MixerDecode):
        def forward(self, clue: Any, slots: Tensor) -> Any:
            recon, masks = super().forward(clue, slots)
            return recon, masks[1:]

    class Flat(nn.Conv2d):
        def forward(self, frames: Tensor) -> Tensor:
            return super().forward(frames).flatten(2)

    with pytest.raises(HostError, match="Alone to return its map as '1'"):
        _run(RandSFQWrap(RandSFQHost(Alone())))
    adapter, capture = _run(RandSFQWrap(RandSFQHost(Folded())))
    with pytest.raises(HostError, match=r"draw the 2 x 3 x 4 slots .* ran on 5 x 4"):
        adapter.collect(capture)
    host = RandSFQHost()
    host.encode_backbone = Flat(3, 8, 4, 4)
    capture = RandSFQAdapter().attach(host)
    capture.open()
    with pytest.raises(HostError, match=r"feature map \(B \* T, C, H, W\), but got Tensor \(6, 8, 8\)"):
        host(randsfq_batch(RandSFQWrap(host))["video"])
    assert not RandSFQAdapter().match(nn.Sequential(Aggregat()))
