"""Items of a score, and what the processes of the distributed test run (spawned ones import this module)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssync_pl import metrics
from ssync_pl.metrics import functional
from ssync_pl.metrics.functional import contingency, read_scene

# Class and function of each score, and whether its items are videos or frames
CLASSES: dict[str, tuple[type[metrics.MaskMetric], Callable[..., Tensor], str]] = {
    "video_fg_ari": (metrics.VideoARI, functional.adjusted_rand_index, "video"),
    "image_fg_ari": (metrics.ImageARI, functional.adjusted_rand_index, "image"),
    "video_mbo": (metrics.VideoMBO, functional.mean_best_overlap, "video"),
    "image_mbo": (metrics.ImageMBO, functional.mean_best_overlap, "image"),
    "video_miou": (metrics.VideoMIoU, functional.mean_iou, "video"),
    "image_miou": (metrics.ImageMIoU, functional.mean_iou, "image"),
    "slots_per_object": (metrics.SlotsPerObject, functional.slots_per_object, "video"),
    "identity": (metrics.SlotIdentity, functional.slot_identity, "image"),
}


def items(
    function: Callable[..., Tensor],
    pred: Tensor,
    true: Tensor,
    valid: Tensor | None = None,
    *,
    level: str = "video",
    background: bool = False,
    overlaps: bool = False,
    **options: Any,
) -> Tensor:
    """Score of each video or frame; `background`: channel 0 is dropped."""
    counts = contingency(read_scene(pred, true, valid), background, overlaps)
    counts = counts.foreground() if background else counts
    return function(counts.videos() if level == "video" else counts, **options)


def metrics_by_name() -> dict[str, Any]:
    return {
        "all": metrics.SegmentationMetrics(),
        "borders": metrics.BoundaryF(),
        "unused": metrics.UnusedSlots(),
        **{name: CLASSES[name][0](ignore_background=True) for name in ("image_miou", "slots_per_object", "identity")},
    }


def given(name: str, pred: torch.Tensor, true: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if name == "unused":
        return (torch.nn.functional.one_hot(pred, 7).movedim(-1, 2).float(),)
    return (pred, true)


def rank_main(rank: int, folder: str, pred: torch.Tensor, true: torch.Tensor) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    try:
        # Uneven on purpose: rank 0 has one video, rank 1 two.
        share = slice(0, 1) if rank == 0 else slice(1, 3)
        results = {}
        for name, metric in metrics_by_name().items():
            metric.update(*given(name, pred[share], true[share]))
            value = metric.compute()
            results[name] = value if isinstance(value, dict) else {"value": value}
        torch.save(results, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def second_rank(_: int, folder: str, pred: torch.Tensor, true: torch.Tensor) -> None:
    rank_main(1, folder, pred, true)
