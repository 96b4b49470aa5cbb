from __future__ import annotations

from typing import Any

import pytest
import torch
from slot_package_hosts import (
    PACKAGE_GRID,
    PACKAGE_SLOTS,
    PACKAGE_T,
    PackageAttention,
    PackageCodes,
    PackageHost,
    PackageWrapper,
    package_batch,
    training_loss,
)
from torch import Tensor, nn

from ssync_pl import SSyncMaps, ssync_loss
from ssync_pl.adapters import Capture
from ssync_pl.adapters.slot_attention_package import SlotAttentionPackageAdapter
from ssync_pl.errors import ConfigError, HostError

PATCHES = PACKAGE_GRID[0] * PACKAGE_GRID[1]


def _run(host: Any, adapter: SlotAttentionPackageAdapter | None = None) -> tuple[SlotAttentionPackageAdapter, Capture]:
    adapter = adapter or SlotAttentionPackageAdapter()
    capture = adapter.attach(host)
    capture.open()
    training_loss(host)
    capture.close()
    return adapter, capture


def _attention(host: Any) -> PackageAttention:
    return next(module for module in host.modules() if isinstance(module, PackageAttention))


def _own(host: Any, calls: int = 1) -> SSyncMaps:
    """From the tensors that the host kept, each frame as a clip."""
    logits = torch.stack(_attention(host).own_logits[-calls:], 1).flatten(0, 1)
    alpha = torch.stack(host.decoder.own_logits[-calls:], 1).flatten(0, 1)
    probs = alpha.softmax(1).unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).mean((-1, -3)).flatten(2)
    heads = logits.ndim == 4
    kept = None
    if isinstance(host.slot_attn, PackageWrapper):
        kept = host.slot_attn.kept.expand(len(probs), -1) > 0.5
        probs = probs * kept[:, :, None] / (probs * kept[:, :, None]).sum(1, keepdim=True)
    return SSyncMaps(
        attention_logits=(logits.mean(1) if heads else logits)[:, None],
        attention_probs=logits.softmax(2).mean(1)[:, None] if heads else None,
        mask_probs=probs[:, None],
        grid=PACKAGE_GRID,
        slot_valid=kept,
        patch_valid=None if kept is None else torch.ones(len(probs), 1, PATCHES, dtype=torch.bool),
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("frames", "last", "options"),
    [
        ("image", False, {}),
        ("image", False, {"masks": "decoder", "alpha_axis": 1}),
        ("image", True, {"masks": "decoder", "alpha_axis": -1}),
        ("folded", False, {}),
        ("folded", False, {"masks": "decoder", "alpha_axis": 1}),
        ("loop", False, {"masks": "decoder", "alpha_axis": 1, "attention": "slot_attn"}),
    ],
)
@pytest.mark.parametrize("heads", [None, 2])
def test_every_frame_is_a_clip_with_the_hosts_own_logits(
    heads: int | None, frames: str, last: bool, options: dict[str, Any]
) -> None:
    host = PackageHost(PackageAttention(heads), frames, last)
    adapter, capture = _run(host, SlotAttentionPackageAdapter(**options))
    maps = adapter.collect(capture, package_batch())
    own = _own(host, PACKAGE_T if frames == "loop" else 1)
    assert maps.shape == (2 if frames == "image" else 2 * PACKAGE_T, 1, PACKAGE_SLOTS, PATCHES)
    assert maps.attention_logits is not None
    assert own.attention_logits is not None
    if heads is None:
        assert torch.equal(maps.attention_logits, own.attention_logits)
    torch.testing.assert_close(maps.attention_logits, own.attention_logits)
    torch.testing.assert_close(maps.attention, own.attention)
    torch.testing.assert_close(maps.masks, own.masks)
    adapter.verify(capture, maps)


def test_frames_that_get_their_axis_back_are_still_clips_of_their_own() -> None:
    host = PackageHost(frames="folded", unfold=True)
    adapter, capture = _run(host)
    maps = adapter.collect(capture)
    assert maps.shape == (2 * PACKAGE_T, 1, PACKAGE_SLOTS, PATCHES)
    torch.testing.assert_close(maps.masks, _own(host).masks)


def test_the_hosts_autocast_is_kept() -> None:
    host = PackageHost(PackageAttention(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapter, capture = _run(host)
    maps = adapter.collect(capture)
    assert maps.attention_logits is not None
    # Several heads are merged in full precision.
    assert torch.equal(maps.attention_logits[:, 0], _attention(host).own_logits[0].float().mean(1))
    adapter.verify(capture, maps)


def test_images_that_keep_no_slot_are_left_out() -> None:
    host = PackageHost(PackageWrapper(PackageAttention()))
    assert isinstance(host.slot_attn, PackageWrapper)
    host.slot_attn.kept = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    host.slot_attn.kept.expand = lambda *sizes: host.slot_attn.kept  # type: ignore[method-assign]
    adapter, capture = _run(host)
    maps = adapter.collect(capture)
    assert maps.slot_valid is not None
    assert maps.patch_valid is not None
    assert maps.slot_valid.tolist() == [[True, False, True, True], [False] * 4]
    assert maps.patch_valid.flatten(1).all(1).tolist() == [True, False]
    maps.check_values()
    output = ssync_loss(maps)
    output.loss.backward()
    assert output.loss.isfinite()
    assert output.used_encoder_slots[1] == 0
    assert all(p.grad.isfinite().all() for p in host.parameters() if p.grad is not None)


@pytest.mark.parametrize("heads", [None, 2])
def test_verify_refuses_a_host_that_changes_its_attention(heads: int | None) -> None:
    host = PackageHost(PackageAttention(heads))
    _attention(host).sharpen = 2.0
    adapter, capture = _run(host)
    with pytest.raises(HostError, match=r"update of the slots .* differ by up to"):
        adapter.verify(capture, adapter.collect(capture))


def test_what_cannot_be_known_is_refused() -> None:
    class Growing(PackageAttention):
        def forward(self, inputs: Tensor, num_slots: int | None = None) -> Tensor:
            return super().forward(inputs, 2 + len(self.own_logits))

    class OnceForAll(PackageHost):
        def forward(self, video: Tensor) -> Tensor:
            slots = [self.slot_attn(self.encoder(frame).flatten(2).transpose(1, 2)) for frame in video.unbind(1)]
            return self.decoder(torch.cat(slots))

    adapter, capture = _run(PackageHost(Growing(), "loop"), SlotAttentionPackageAdapter(masks="decoder", alpha_axis=1))
    with pytest.raises(HostError, match="'attention' to give one shape"):
        adapter.collect(capture)
    adapter, capture = _run(OnceForAll(), SlotAttentionPackageAdapter(masks="decoder", alpha_axis=1))
    with pytest.raises(HostError, match="ran 2 times and the decoder once, on frames folded into its batch"):
        adapter.collect(capture)
    adapter, capture = _run(OnceForAll())
    with pytest.raises(HostError, match=r"'softmax:.' to give masks over the slots .* in 2 call\(s\), but it gave"):
        adapter.collect(capture)
    adapter, capture = _run(PackageHost(), SlotAttentionPackageAdapter(masks="decoder"))
    with pytest.raises(HostError, match=r"'decoder' to give masks over the slots .* but it gave \[\(8, 4, 8, 8\)\]"):
        adapter.collect(capture)
    with pytest.raises(HostError, match="MetaSlotAttention averages slots of one code and packs"):
        SlotAttentionPackageAdapter().attach(PackageHost(PackageCodes(PackageAttention())))


def test_found_where_there_is_exactly_one() -> None:
    two = nn.ModuleDict({"a": PackageAttention(), "b": PackageAttention()})
    assert not SlotAttentionPackageAdapter().match(two)
    assert SlotAttentionPackageAdapter(attention="b").match(two)
    assert not SlotAttentionPackageAdapter(masks="nowhere").match(PackageHost())
    assert not SlotAttentionPackageAdapter().match(PackageAttention())
    with pytest.raises(HostError, match="ModuleDict to have one module of the `slot-attention` package"):
        SlotAttentionPackageAdapter().attach(two)
    with pytest.raises(HostError, match="package at encoder"):
        SlotAttentionPackageAdapter(attention="encoder").attach(PackageHost())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (0, 4)}, "`grid` to be .* two positive integers"),
        ({"alpha_axis": 1}, "`alpha_axis` only with the output of a module"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SlotAttentionPackageAdapter(**options)
