"""What each process of the distributed test runs; a module of its own, so that a spawned process can import it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ssync_pl.method import ssync_loss
from ssync_pl.method.maps import SSyncMaps


def joined_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two videos for two ranks; they select different numbers of patches, the second one few."""
    generator = torch.Generator().manual_seed(0)
    d, a = (torch.randn((2, 2, 3, 12), generator=generator, dtype=torch.float64) for _ in range(2))
    d[1] = 0
    d[1, :, 0] = 1.0
    d[1, 0, 1, 0] = 2.0
    return d, a


CASES = {
    "brier": {},
    "ce": {"loss": "ce"},
    # A single patch in all: the mean over ranks of the count is below 1.
    "one patch": {"loss": "ce", "n_bd": 8, "merge": False},
}


def one_patch() -> tuple[torch.Tensor, torch.Tensor]:
    d = torch.zeros(2, 1, 2, 9, dtype=torch.float64)
    d[:, :, 0] = 1.0
    d[0, 0, 1, 4] = 2.0
    a = torch.linspace(-1, 1, d.numel(), dtype=torch.float64).view_as(d)
    return d, a


def batch_of(case: str) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    if case == "one patch":
        return *one_patch(), (3, 3)
    return *joined_batch(), (3, 4)


def rank_step(index: int, first: int, folder: str) -> None:
    """Each of two ranks takes its video; losses and gradients are averaged over ranks, as DDP does."""
    rank, world = first + index, 2
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results = {}
    for case in CASES:
        d, a, grid = batch_of(case)
        leaves = [x[rank : rank + 1].clone().requires_grad_() for x in (d, a)]
        out = ssync_loss(SSyncMaps(*leaves, grid=grid), sync_counts=True, **CASES[case])
        grads = torch.autograd.grad(out.loss, leaves)
        results[case] = {"loss": out.loss.detach(), "grads": [g / world for g in grads]}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
