"""What each process of the distributed test of dense alignment runs."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from ddp_workers import strategy
from tiny_hosts import fit
from torch.utils.data import DataLoader

from ssync_pl.hosts import SlotContrast
from ssync_pl.rivals.dense_callback import DenseAlignmentCallback

STEPS = 3


def make_host() -> SlotContrast:
    torch.manual_seed(0)
    sizes = {"backbone": None, "feature_dim": 6, "grid": (3, 4), "decoder_hidden": (8,)}
    return SlotContrast(num_slots=3, slot_dim=8, warmup_steps=1, contrast_weight=0.0, **sizes)


def make_callback() -> DenseAlignmentCallback:
    return DenseAlignmentCallback(warmup_steps=0, neighbours=2, redundancy_weight=0.1, redundancy_steps=9)


def make_clips() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"features": torch.randn(2, 12, 6, generator=generator)} for _ in range(4 * STEPS)]


def run_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.chdir(folder)
    host, callback = make_host(), make_callback()
    torch.manual_seed(rank)  # the ranks draw other projections
    data = DataLoader(make_clips()[rank::2], batch_size=2)  # type: ignore[arg-type]
    fit(host, callback, steps=STEPS, loader=data, devices=2, use_distributed_sampler=False, strategy=strategy())
    results = {"host": host.state_dict(), "projections": callback.state_dict()["projections"]}
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
