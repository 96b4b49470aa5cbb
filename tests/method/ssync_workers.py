"""What each process of the distributed test runs; a module of its own, so that a spawned process can import it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssync_pl.method import ssync_loss
from ssync_pl.method.maps import SSyncMaps


def joined_batch() -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Two videos for two ranks; they select different numbers of patches, the second one few."""
    generator = torch.Generator().manual_seed(0)
    d, a = (torch.randn((2, 2, 3, 12), generator=generator, dtype=torch.float64) for _ in range(2))
    d[1] = 0
    d[1, :, 0] = 1.0
    d[1, 0, 1, 0] = 2.0
    return d, a, (3, 4)


def one_patch() -> tuple[Tensor, Tensor, tuple[int, int]]:
    """A single patch is selected in all: the mean over ranks of the count is below 1."""
    d = torch.zeros(2, 1, 2, 9, dtype=torch.float64)
    d[:, :, 0] = 1.0
    d[0, 0, 1, 4] = 2.0
    return d, torch.linspace(-1, 1, d.numel(), dtype=torch.float64).view_as(d), (3, 3)


CASES: dict[str, Any] = {
    "brier": (joined_batch, {}),
    "ce": (joined_batch, {"loss": "ce"}),
    "one patch": (one_patch, {"loss": "ce", "n_bd": 8, "merge": False}),
}


def loss_and_gradients(case: str, videos: slice, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    make, settings = CASES[case]
    d, a, grid = make()
    leaves = [x[videos].clone().requires_grad_() for x in (d, a)]
    loss = ssync_loss(SSyncMaps(*leaves, grid=grid), **settings, **options).loss
    return loss.detach(), torch.autograd.grad(loss, leaves)


def rank_step(index: int, first: int, folder: str) -> None:
    """Each of two ranks takes its video."""
    rank = first + index
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {case: loss_and_gradients(case, slice(rank, rank + 1), sync_counts=True) for case in CASES}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
