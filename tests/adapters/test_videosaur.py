from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from videosaur_hosts import SLOTS, BroadcastDecoder, Corrector, Host, MixerDecoder, MLPDecoder

from ssync_pl.adapters import Capture
from ssync_pl.adapters.videosaur import VideosaurAdapter
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


def test_dots_that_a_fork_returns_are_used() -> None:
    host = Host(MLPDecoder(N), give_dots=True)
    adapter, capture, batch = _run(host)
    adapter.collect(capture, batch)
    assert all(c.logits is own for c, own in zip(capture["corrector"], host.inner[0].own_logits, strict=True))


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
    with pytest.raises(HostError, match="Idle to call 'to_q"):
        _run(host)
