from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from randsfq_hosts import (
    HOSTS,
    RANDSFQ_GRID,
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


def test_decoders_without_masks_are_refused_with_the_way_out() -> None:
    wanted = {
        "randsfq_step_by_step": r"StepByStepDecode predicts patches one.* of its last block \(need_weights=True\)",
        "randsfq_diffusion": r"DiffusionDecode is a diffusion model.* an nn.Identity .* of its denoiser",
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
