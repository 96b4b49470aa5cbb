from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
from oclf_hosts import (
    GRID,
    HOSTS,
    PATCH,
    SLOTS,
    AmodalDecoder,
    AutoregressiveDecoder,
    DensityDecoder,
    N,
    OclfAttention,
    OclfHost,
    OncePerFrame,
    PatchDecoder,
    PixelDecoder,
    oclf_batch,
    training_loss,
)
from torch import Tensor, nn

from ssync_pl import SSyncCallback
from ssync_pl.adapters import Capture, find_adapter, locate
from ssync_pl.adapters.oclf import AdaSlotAdapter, OclfAdapter
from ssync_pl.adapters.videosaur import VideosaurAdapter
from ssync_pl.errors import ConfigError, HostError
from ssync_pl.hosts import SAVi
from ssync_pl.method.loss import ssync_loss
from ssync_pl.method.maps import SSyncMaps

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


@pytest.mark.parametrize("kind", HOSTS)
def test_logits_are_the_hosts_own_to_the_bit(kind: str) -> None:
    host: Any = HOSTS[kind]()
    adapter, capture, batch = _run(host)
    maps = adapter.collect(capture, batch)
    frames = T if host.video else 1
    assert maps.shape == (B, frames, SLOTS, N)
    assert maps.grid == GRID
    assert maps.slot_valid is None
    attention, alpha = _own(host)
    if kind == "oclf_heads":
        # One softmax over slots and heads, summed over heads.
        together = attention.flatten(2, 3).softmax(2).unflatten(2, (SLOTS, 4)).sum(3)
        torch.testing.assert_close(maps.attention_logits.softmax(2), together)
    else:
        assert torch.equal(maps.attention_logits, attention.squeeze(3))
    assert torch.equal(maps.mask_logits, alpha if alpha.ndim == 4 else alpha.flatten(3))
    adapter.verify(capture, maps)


@pytest.mark.parametrize("kind", HOSTS)
def test_found_by_structure(kind: str) -> None:
    host = HOSTS[kind]()
    assert type(find_adapter(host)) is OclfAdapter
    assert locate("oclf", host).path == ""
    # A loop of one's own may train the models without the module around them.
    assert type(find_adapter(host.models)) is OclfAdapter  # type: ignore[arg-type]


def test_other_hosts_are_not_matched() -> None:
    no_heads = OclfHost()
    del no_heads.inner[0].n_heads
    bare = OclfHost(nn.Linear(1, 1))
    others = [SAVi(), nn.Linear(1, 1), nn.ModuleDict(), no_heads, bare, OclfAttention()]
    assert not any(OclfAdapter().match(host) for host in others)
    assert not any(adapter().match(OclfHost()) for adapter in (AdaSlotAdapter, VideosaurAdapter))
    with pytest.raises(HostError, match=r"slot attention at 'models.perceptual_grouping.slot_attention' \(with `to_q`"):
        OclfAdapter().attach(no_heads)


@pytest.mark.parametrize("heads", [1, 4])
def test_gradient_is_that_of_the_hosts_own_logits(heads: int) -> None:
    host = OclfHost(attention=OclfAttention(heads))
    adapter, capture, batch = _run(host)
    maps = adapter.collect(capture, batch)
    attention, alpha = _own(host)
    together = attention.flatten(2, 3).softmax(2).unflatten(2, (SLOTS, heads)).sum(3)
    weights = torch.randn(maps.shape)
    to_k, positions = host.inner[0].to_k.weight, host.inner[1].pos_embed
    for mine, own, parameter in (
        (maps.attention_logits.softmax(2), together, to_k),
        (maps.mask_logits, alpha, positions),
    ):
        grads = [torch.autograd.grad((m * weights).sum(), parameter, retain_graph=True)[0] for m in (mine, own)]
        assert grads[0].abs().sum() > 0
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("heads", [1, 2])
def test_autocast_of_the_host_is_kept(heads: int) -> None:
    host = OclfHost(attention=OclfAttention(heads))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapter, capture, batch = _run(host)
    maps = adapter.collect(capture, batch)  # outside of autocast on purpose
    attention, alpha = _own(host)
    expected = attention.squeeze(3) if heads == 1 else attention.float().logsumexp(3)
    assert torch.equal(maps.attention_logits, expected)
    assert torch.equal(maps.mask_logits, alpha)
    adapter.verify(capture, maps)


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


@pytest.mark.parametrize("kind", ["oclf_heads", "oclf_savi"])
def test_three_training_steps(kind: str) -> None:
    host: Any = HOSTS[kind]()
    keys = list(host.state_dict())
    losses: list[tuple[Tensor, Tensor]] = []

    class Check(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            attention, alpha = _own(module)
            maps = SSyncMaps(
                attention_logits=attention.logsumexp(3).detach(), mask_logits=alpha.flatten(3).detach(), grid=GRID
            )
            losses.append((outputs["loss"].detach(), module.own_loss + ssync_loss(maps).loss))
            for part in module.inner:
                part.own_logits.clear()

    class Keeping(type(host)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.own_loss = loss.detach()
            return loss

    host.__class__ = Keeping
    trainer = L.Trainer(
        max_steps=3,
        callbacks=[SSyncCallback(warmup_steps=0), Check()],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [oclf_batch(host.video) for _ in range(3)]
    trainer.fit(host, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert len(losses) == 3
    for total, expected in losses:
        torch.testing.assert_close(total, expected)
    assert list(host.state_dict()) == keys
    assert not any(module._forward_hooks for module in host.modules())


def test_without_ssync_the_host_does_the_same() -> None:
    host = OclfHost(attention=OclfAttention(2))
    batch = oclf_batch()
    before = host.training_step(batch, 0)
    keys = list(host.state_dict())
    _, capture, _ = _run(host, batch)
    assert torch.equal(host.training_step(batch, 0), before)
    assert list(host.state_dict()) == keys
    capture.remove()
    assert not any(module._forward_hooks for module in host.modules())


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", HOSTS)
def test_verify_refuses_a_host_that_changes_its_masks(kind: str, side: int) -> None:
    host: Any = HOSTS[kind]()
    host.inner[side].sharpen = 2.0
    adapter, capture, batch = _run(host)
    maps = adapter.collect(capture, batch)
    with pytest.raises(HostError, match=f"masks that '{('slot_attention', 'decoder')[side]}' returns .* by up to"):
        adapter.verify(capture, maps)


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
    with pytest.raises(HostError, match=r"DensityDecoder to draw object masks .* renders densities"):
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
        (Deaf(), "Deaf to call 'decoder.decoder'"),
        (Vectors(), r"inner network to give \(B \* S, N, C\) or .* got Tensor \(8, 9\)"),
    ):
        with pytest.raises(HostError, match=message):
            _run(OclfHost(decoder))
    for attention, message in (
        (OneValue(), "OneValue to return its map as '1', but got tuple"),
        (Idle(), "Idle to call 'slot_attention.to_q'"),
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


def test_only_the_calls_of_the_step_count() -> None:
    host = OclfHost(OncePerFrame(PixelDecoder(GRID)), video=True)
    _, capture, _ = _run(host)
    assert len(capture["slot_attention.to_k"]) == 1
    assert len(capture["slot_attention.to_q"]) == 2
    assert len(capture["slot_attention"]) == T
    assert len(capture["decoder"]) == T
