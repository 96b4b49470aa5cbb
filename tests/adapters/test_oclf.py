from __future__ import annotations

from typing import Any

import pytest
import torch
from oclf_hosts import (
    GRID,
    PATCH,
    SLOTS,
    AmodalDecoder,
    AutoregressiveDecoder,
    DensityDecoder,
    N,
    OclfAttention,
    OclfHost,
    PatchDecoder,
    PixelDecoder,
    oclf_batch,
    training_loss,
)
from torch import Tensor, nn

from ssync_pl.adapters import Capture, find_adapter
from ssync_pl.adapters.oclf import AdaSlotAdapter, OclfAdapter
from ssync_pl.adapters.videosaur import VideosaurAdapter
from ssync_pl.errors import ConfigError, HostError
from ssync_pl.hosts import SAVi
from ssync_pl.method.loss import ssync_loss

T = 3
B = 2


def _run(
    host: Any, batch: dict[str, Any] | None = None, adapter: OclfAdapter | None = None
) -> tuple[Any, Capture, Any]:
    adapter = adapter or OclfAdapter()
    capture = adapter.attach(host)
    batch = batch or oclf_batch(host.video)
    capture.open()
    host.training_step(batch, 0)
    capture.close()
    return adapter, capture, batch


def _own(host: Any) -> tuple[Tensor, Tensor]:
    """The stand-in's own logits, ``(B, T, S, heads, N)`` and ``(B, T, S, ...)``."""
    attention, decoder = host.inner
    logits = torch.stack(attention.own_logits, 1)
    if len(decoder.own_logits) > 1:
        return logits, torch.stack(decoder.own_logits, 1)
    alpha = decoder.own_logits[0]
    return logits, alpha if host.video else alpha[:, None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_other_hosts_are_not_matched() -> None:
    no_heads = OclfHost()
    del no_heads.inner[0].n_heads
    bare = OclfHost(nn.Linear(1, 1))
    others = [SAVi(), nn.Linear(1, 1), nn.ModuleDict(), no_heads, bare, OclfAttention()]
    assert not any(OclfAdapter().match(host) for host in others)
    assert not any(adapter().match(OclfHost()) for adapter in (AdaSlotAdapter, VideosaurAdapter))
    with pytest.raises(HostError, match=r"slot attention at 'models.perceptual_grouping.slot_attention' \(with to_q"):
        OclfAdapter().attach(no_heads)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("decoder", ["patches", "pixels"])
def test_masked_slots_do_not_exist(decoder: str, video: bool, heads: int) -> None:
    host = OclfHost({"patches": PatchDecoder, "pixels": PixelDecoder}[decoder](), OclfAttention(heads), video=video)
    batch = oclf_batch(video, images=3, n_slots=torch.tensor([2, SLOTS, 3]))
    adapter, capture, _ = _run(host, batch)
    maps = adapter.collect(capture, batch)
    valid = torch.tensor([[True, True, False, False], [True] * 4, [True, True, True, False]])
    assert torch.equal(maps.slot_valid, valid)
    maps.check_values()
    adapter.verify(capture, maps)
    loss = ssync_loss(maps).loss
    grads = torch.autograd.grad(loss, list(host.parameters()), allow_unused=True)
    assert loss > 0
    assert all(grad.isfinite().all() for grad in grads if grad is not None)
    # By hand, image by image, with the slots that are there and nothing else.
    attention, alpha = _own(host)
    masks = maps.mask_probs
    if masks is None:
        masks = maps.mask_logits.masked_fill(~valid[:, None, :, None], float("-inf")).softmax(2)
    for index, slots in enumerate(batch["n_slots"]):
        torch.testing.assert_close(maps.attention_logits[index, :, :slots], attention[index, :, :slots].logsumexp(2))
        own = alpha[index, :, :slots].softmax(1)
        if decoder == "pixels":
            own = own.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH)).mean((-1, -3)).flatten(2)
        torch.testing.assert_close(masks[index, :, :slots], own)
        assert (masks[index, :, slots:] == 0).all()


def test_a_slot_masked_in_one_frame_does_not_exist_in_the_clip() -> None:
    host = OclfHost(PixelDecoder(GRID), video=True)
    adapter = OclfAdapter()
    capture = adapter.attach(host)
    capture.open()
    slots, states = host.slots.expand(B, -1, -1), []
    for masked in ([False] * 4, [False, True, False, False]):
        slots = host.models["perceptual_grouping"].module(torch.randn(B, N, 8), slots, torch.tensor([masked] * B))[0]  # type: ignore[union-attr]
        states.append(slots)
    host.models["object_decoder"](torch.stack(states, 1))
    maps = adapter.collect(capture)
    assert torch.equal(maps.slot_valid, torch.tensor([[True, False, True, True]] * B))
    assert ssync_loss(maps).loss.isfinite()


def test_masks_in_pixels_are_averaged_to_the_patches() -> None:
    host = OclfHost(AmodalDecoder())
    adapter, capture, batch = _run(host)
    maps = adapter.collect(capture, batch)
    blocks = _own(host)[1].softmax(2).unflatten(-1, (GRID[1], PATCH)).unflatten(-3, (GRID[0], PATCH))
    torch.testing.assert_close(maps.mask_probs, blocks.mean((-1, -3)).flatten(3))
    adapter.verify(capture, maps)


def test_a_decoder_with_more_patches_than_the_attention() -> None:
    host = OclfHost(PatchDecoder(4 * N))
    adapter, capture, batch = _run(host)
    maps = adapter.collect(capture, batch)
    assert maps.grid == GRID
    blocks = (
        _own(host)[1].softmax(2).unflatten(3, (2 * GRID[0], 2 * GRID[1])).unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    )
    torch.testing.assert_close(maps.mask_probs, blocks.mean((-1, -3)).flatten(3))
    adapter, capture, batch = _run(OclfHost(PatchDecoder(3 * N)))
    with pytest.raises(
        HostError, match=r"decoder's 24 patches to have the proportions of the attention's grid \(2, 4\)"
    ):
        adapter.collect(capture, batch)


def test_grid_without_a_batch() -> None:
    adapter, capture, _ = _run(OclfHost(PixelDecoder()))
    assert adapter.collect(capture).grid == GRID
    adapter, capture, _ = _run(OclfHost())
    with pytest.raises(HostError, match=r"grid for 8 patches, which is no square. Pass grid=\(H, W\)"):
        adapter.collect(capture)
    assert OclfAdapter(grid=(4, 2)).collect(capture).grid == (4, 2)


@pytest.mark.parametrize("grid", [(3,), (0, 4), (2.5, 4), "ab"])
def test_grid_argument_is_checked(grid: object) -> None:
    with pytest.raises(ConfigError, match=r"`grid` to be .* two positive integers"):
        OclfAdapter(grid=grid)  # type: ignore[arg-type]


def test_decoders_without_object_masks_are_refused_with_a_way_out() -> None:
    host = OclfHost(AutoregressiveDecoder(), video=True)
    assert type(find_adapter(host)) is OclfAdapter
    with pytest.raises(HostError, match="AutoregressiveDecoder to draw object masks, but it predicts patches") as error:
        OclfAdapter().attach(host)
    named = "attention='softmax:models.perceptual_grouping.module.slot_attention', masks='models.object_decoder:masks'"
    assert named in str(error.value)
    with pytest.raises(HostError, match=r"DensityDecoder .* renders densities"):
        OclfAdapter().attach(OclfHost(DensityDecoder()))


def test_outputs_of_another_kind_are_refused() -> None:
    class Bare(PatchDecoder):
        def forward(self, slots: Tensor) -> Any:
            output = super().forward(slots)
            del output.masks
            return output

    class Reordered(PatchDecoder):
        def forward(self, slots: Tensor) -> Any:
            output = super().forward(slots)
            output.masks = output.masks.transpose(1, 2)
            return output

    class OneValue(OclfAttention):
        def forward(self, inputs: Tensor, slots: Tensor, masked: Tensor | None = None) -> Any:
            return super().forward(inputs, slots, masked)[:1]

    class Idle(OclfAttention):
        def forward(self, inputs: Tensor, slots: Tensor, masked: Tensor | None = None) -> Any:
            self.to_k(inputs)
            return slots, torch.zeros(len(slots), SLOTS, N)

    class Deaf(PatchDecoder):
        def forward(self, slots: Tensor) -> Any:
            return SimpleMasks(slots.new_zeros(*slots.shape[:2], N))

    class SimpleMasks:
        def __init__(self, masks: Tensor) -> None:
            self.masks = self.reconstruction = masks

    class Vectors(PatchDecoder):
        def forward(self, slots: Tensor) -> Any:
            self.decoder(slots.flatten(0, 1))
            return SimpleMasks(slots.new_zeros(*slots.shape[:2], N))

    for decoder, message in (
        (Bare(), "Bare to return its map as 'masks'"),
        (Reordered(), r"Reordered to have the shape of its masks, \(2, 8, 4\), but got \(8, 8\)"),
        (Deaf(), "Deaf to call 'decoder'"),
        (Vectors(), r"inner network to give \(B \* S, N, C\) or .* got Tensor \(8, 9\)"),
    ):
        with pytest.raises(HostError, match=message):
            _run(OclfHost(decoder))
    for attention, message in (
        (OneValue(), "OneValue to return its map as '1', but got tuple"),
        (Idle(), "Idle to call 'to_q'"),
    ):
        with pytest.raises(HostError, match=message):
            _run(OclfHost(attention=attention))


def test_calls_that_do_not_fit_are_refused() -> None:
    host = OclfHost(PixelDecoder(GRID), video=True)
    adapter = OclfAdapter()
    capture = adapter.attach(host)
    capture.open()
    batch = oclf_batch(video=True)
    host.models["perceptual_grouping"](torch.randn(B, 2, N, 8), host.slots.expand(B, -1, -1))
    training_loss(host)
    with pytest.raises(HostError, match=r"draw the 2 x 5 x 4 slots \(B, T, S\) .* it ran on 2 x 3 x 4"):
        adapter.collect(capture, batch)
    capture.clear()
    with pytest.raises(HostError, match="'slot_attention' to run inside the training step, but it did not"):
        adapter.collect(capture, batch)
