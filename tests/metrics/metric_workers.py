"""What the processes of the distributed test run; a module of its own, so that a spawned one can import it."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from ssync_pl.metrics import ImageMIoU, SegmentationMetrics


def rank_main(rank: int, folder: str, pred: torch.Tensor, true: torch.Tensor) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    try:
        # Uneven on purpose: rank 0 has one video, rank 1 two.
        share = slice(0, 1) if rank == 0 else slice(1, 3)
        results = {}
        for name, metric in {"all": SegmentationMetrics(), "single": ImageMIoU(ignore_background=True)}.items():
            metric.update(pred[share], true[share])
            value = metric.compute()
            results[name] = value if isinstance(value, dict) else {"value": value}
        torch.save(results, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def second_rank(_: int, folder: str, pred: torch.Tensor, true: torch.Tensor) -> None:
    rank_main(1, folder, pred, true)
