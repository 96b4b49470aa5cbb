from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from videosaur_hosts import SLOTS, BroadcastDecoder, Corrector, Host, MixerDecoder, MLPDecoder

from ssync_pl.adapters import Capture, VideosaurAdapter, find_adapter, locate
from ssync_pl.errors import ConfigError, HostError
from ssync_pl.hosts import SAVi

B, T, GRID = 2, 3, (2, 4)
N = GRID[0] * GRID[1]
FRAME = (8, 16)
DECODERS = {
    "mlp": lambda: MLPDecoder(N),
    "mixer": lambda: MixerDecoder(N),
    "broadcast": lambda: BroadcastDecoder(GRID),
    "broadcast_pixels": lambda: BroadcastDecoder(FRAME),
}


def _run(host: Host, adapter: VideosaurAdapter | None = None) -> tuple[VideosaurAdapter, Capture, dict[str, Tensor]]:
    adapter = adapter or VideosaurAdapter()
    capture = adapter.attach(host)
    batch = {"video": torch.randn(B, T, 3, *FRAME)} if host.video else {"image": torch.randn(B, 3, *FRAME)}
    capture.open()
    host(next(iter(batch.values())))
    capture.close()
    return adapter, capture, batch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("video", [True, False])
@pytest.mark.parametrize("kind", DECODERS)
def test_logits_are_the_hosts_own_to_the_bit(kind: str, video: bool) -> None:
    host = Host(DECODERS[kind](), video=video)
    adapter, capture, batch = _run(host)
    maps = adapter.collect(capture, batch)
    corrector, decoder = host.inner
    frames = T if video else 1
    assert len(corrector.own_logits) == frames
    assert len(decoder.own_logits) == 1
    assert maps.shape == (B, frames, SLOTS, N)
    assert maps.grid == GRID
    assert torch.equal(maps.attention_logits, torch.stack(corrector.own_logits, 1))
    own = decoder.own_logits[0].unflatten(0, (B, frames))
    if kind == "broadcast_pixels":
        assert maps.mask_logits is None
        # Means over blocks of 4 x 4 pixels.
        blocks = own.softmax(2).unflatten(-1, (4, 4)).unflatten(-3, (2, 4)).mean((-1, -3))
        torch.testing.assert_close(maps.mask_probs, blocks.flatten(3))
    else:
        assert torch.equal(maps.mask_logits, own if own.ndim == 4 else own.flatten(3))
    adapter.verify(capture, maps)


@pytest.mark.parametrize("kind", DECODERS)
def test_gradient_reaches_both_sides(kind: str) -> None:
    host = Host(DECODERS[kind]())
    adapter, capture, batch = _run(host)
    maps = adapter.collect(capture, batch)
    corrector, decoder = host.inner
    attention = torch.autograd.grad(maps.attention[:, -1].square().sum(), corrector.to_q.weight, retain_graph=True)[0]
    masks = torch.autograd.grad(maps.masks.square().sum(), decoder.positions)[0]
    assert attention.abs().sum() > 0
    assert masks.abs().sum() > 0


def test_gradient_of_recomputed_logits_is_that_of_the_hosts_own() -> None:
    host = Host(MixerDecoder(N))
    adapter, capture, batch = _run(host)
    maps = adapter.collect(capture, batch)
    corrector, decoder = host.inner
    weights = torch.randn(maps.shape)
    for mine, own, parameter in (
        (maps.attention_logits, torch.stack(corrector.own_logits, 1), corrector.to_q.weight),
        (maps.mask_logits, decoder.own_logits[0].unflatten(0, (B, T)), decoder.to_k.weight),
    ):
        grads = [torch.autograd.grad((m * weights).sum(), parameter, retain_graph=True)[0] for m in (mine, own)]
        torch.testing.assert_close(*grads)


def test_only_the_last_iteration_and_the_last_step_count() -> None:
    host = Host(MLPDecoder(N), iterations=1)
    adapter, capture, batch = _run(host)
    first = adapter.collect(capture, batch)
    capture.clear()
    capture.open()
    host(batch["video"].flip(0))
    maps = adapter.collect(capture, batch)
    assert torch.equal(maps.attention_logits, torch.stack(host.inner[0].own_logits[T:], 1))
    assert not torch.equal(maps.attention_logits, first.attention_logits)


def test_projections_do_not_pile_up_over_frames() -> None:
    _, capture, _ = _run(Host(MLPDecoder(N)))
    assert len(capture["corrector.to_k"]) == 1
    assert len(capture["corrector.to_q"]) == 2
    assert len(capture["corrector"]) == T


@pytest.mark.parametrize("kind", ["mlp", "mixer", "broadcast"])
def test_autocast_of_the_host_is_kept(kind: str) -> None:
    host = Host(DECODERS[kind]())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapter, capture, batch = _run(host)
    maps = adapter.collect(capture, batch)  # outside of autocast on purpose
    assert maps.attention_logits.dtype == torch.bfloat16
    assert torch.equal(maps.attention_logits, torch.stack(host.inner[0].own_logits, 1))
    assert torch.equal(maps.mask_logits.flatten(), host.inner[1].own_logits[0].flatten())
    adapter.verify(capture, maps)


def test_a_corrector_that_switches_autocast_off_is_recomputed_in_full_precision() -> None:
    class Careful(Corrector):
        def forward(self, slots: Tensor, features: Tensor, n_iters: int | None = None) -> dict[str, Tensor]:
            with torch.autocast("cpu", enabled=False):
                return super().forward(slots.float(), features.float(), n_iters)

    host = Host(MLPDecoder(N))
    host.processor.module.corrector = Careful()  # type: ignore[union-attr]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapter, capture, batch = _run(host)
    maps = adapter.collect(capture, batch)
    assert maps.attention_logits.dtype == torch.float32
    assert torch.equal(maps.attention_logits, torch.stack(host.inner[0].own_logits, 1))


def test_dots_that_a_fork_returns_are_used() -> None:
    host = Host(MLPDecoder(N), give_dots=True)
    adapter, capture, batch = _run(host)
    adapter.collect(capture, batch)
    assert all(c.logits is own for c, own in zip(capture["corrector"], host.inner[0].own_logits, strict=True))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", ["mlp", "mixer", "broadcast"])
def test_verify_refuses_a_host_that_changes_its_masks(kind: str, side: int) -> None:
    host = Host(DECODERS[kind]())
    host.inner[side].sharpen = 2.0
    adapter, capture, batch = _run(host)
    maps = adapter.collect(capture, batch)
    with pytest.raises(HostError, match=f"masks that '{('corrector', 'decoder')[side]}' returns .* differ by up to"):
        adapter.verify(capture, maps)


@pytest.mark.parametrize("video", [True, False])
@pytest.mark.parametrize("kind", DECODERS)
def test_found_by_structure(kind: str, video: bool) -> None:
    host = Host(DECODERS[kind](), video=video)
    assert isinstance(find_adapter(host), VideosaurAdapter)
    assert isinstance(locate("videosaur", host).adapter, VideosaurAdapter)


def test_other_hosts_are_not_matched() -> None:
    no_scale = Host(MLPDecoder(N))
    del no_scale.inner[0].scale
    others = [SAVi(), nn.Linear(1, 1), nn.Sequential(nn.Identity()), no_scale, Host(nn.Identity()), Corrector()]
    assert not any(VideosaurAdapter().match(host) for host in others)
    with pytest.raises(HostError, match=r"corrector with `to_q`, `to_k` and `scale` at 'processor.module.corrector'"):
        VideosaurAdapter().attach(no_scale)


def test_grid_from_the_frames_and_the_patch_size() -> None:
    # 32 patches of 4 pixels: no square, and the batch says 16 x 32.
    host = Host(MLPDecoder(32))
    adapter = VideosaurAdapter()
    capture = adapter.attach(host)
    capture.open()
    host(video := torch.randn(1, 2, 3, 16, 32))
    assert adapter.collect(capture, {"video": video}).grid == (4, 8)
    with pytest.raises(HostError, match=r"grid for 32 patches, which is no square. Pass grid=\(H, W\)"):
        adapter.collect(capture, None)
    assert VideosaurAdapter(grid=(8, 4)).collect(capture, {"video": video}).grid == (8, 4)
    with pytest.raises(HostError, match="`grid` to have 32 patches"):
        VideosaurAdapter(grid=(5, 5)).collect(capture, {"video": video})


def test_an_oblong_grid_is_never_taken_for_a_square() -> None:
    host = Host(MLPDecoder(16))
    adapter = VideosaurAdapter()
    capture = adapter.attach(host)
    capture.open()
    host(video := torch.randn(1, 1, 3, 8, 32))
    assert adapter.collect(capture, {"video": video}).grid == (2, 8)


def test_grid_of_a_broadcast_decoder_without_a_batch() -> None:
    host = Host(BroadcastDecoder(FRAME))
    adapter, capture, _ = _run(host)
    assert adapter.collect(capture).grid == GRID


@pytest.mark.parametrize("grid", [(3,), (0, 4), (2.5, 4), "ab"])
def test_grid_argument_is_checked(grid: object) -> None:
    with pytest.raises(ConfigError, match=r"`grid` to be .* two positive integers"):
        VideosaurAdapter(grid=grid)  # type: ignore[arg-type]


def test_a_second_pass_of_the_corrector_is_refused() -> None:
    host = Host(MLPDecoder(N))
    adapter = VideosaurAdapter()
    capture = adapter.attach(host)
    capture.open()
    frames = torch.randn(B, T, 3, *FRAME)
    host.processor(host.slots.expand(B, -1, -1), host.encoder(frames))
    host(frames)
    with pytest.raises(HostError, match=r"draw the 2 x 6 x 3 slots .* but it ran on 6 x 3"):
        adapter.collect(capture, {"video": frames})


def test_outputs_of_another_kind_are_refused() -> None:
    class Bare(MLPDecoder):
        def forward(self, slots: Tensor) -> dict[str, Tensor]:
            return {"alpha": super().forward(slots)["masks"]}

    class Idle(Corrector):
        def forward(self, slots: Tensor, features: Tensor, n_iters: int | None = None) -> dict[str, Tensor]:
            self.to_k(features)
            return {"slots": slots, "masks": torch.zeros(len(slots), SLOTS, N)}

    with pytest.raises(HostError, match="Bare to return its map as 'masks', but got dict with keys alpha"):
        _run(Host(Bare(N)))
    host = Host(MLPDecoder(N))
    host.processor.module.corrector = Idle()  # type: ignore[union-attr]
    with pytest.raises(HostError, match="Idle to call 'corrector"):
        _run(host)


def test_removal_and_copies_leave_the_host_as_it_was() -> None:
    host = Host(MixerDecoder(N))
    keys = list(host.state_dict())
    _, capture, batch = _run(host)
    for part in host.inner:
        part.own_logits.clear()
    copy.deepcopy(host)(batch["video"])
    assert len(capture["corrector"]) == T
    assert list(host.state_dict()) == keys
    capture.remove()
    assert not any(module._forward_hooks for module in host.modules())
