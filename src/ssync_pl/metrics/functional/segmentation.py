"""ARI, mean best overlap and mean IoU of contingency tables."""

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ssync_pl.metrics.functional.contingency import Contingency


def adjusted_rand_index(counts: Contingency) -> Tensor:
    """Computes the adjusted Rand index over the pixels that have a true mask (Hubert and Arabie, 1985).

    Args:
        counts: tables `(..., C, S)` of frames or, after `counts.videos()`, of videos. For FG-ARI drop the background
            first: `counts.foreground()`.

    Returns:
        Float64 `(...)`, at most 1, near 0 by chance, 1 where it is not defined; NaN for items without any true mask.

    Examples:
        >>> from ssync_pl.metrics.functional import contingency, read_scene
        >>> true = torch.tensor([[[[[1, 1, 0, 0, 0, 0]], [[0, 0, 1, 1, 0, 0]], [[0, 0, 0, 0, 1, 1]]]]]).bool()
        >>> counts = contingency(read_scene(torch.tensor([[[[0, 0, 1, 1, 0, 0]]]]), true)).videos()
        >>> round(adjusted_rand_index(counts).item(), 4), adjusted_rand_index(counts.foreground()).item()
        (0.4444, 1.0)
    """
    table = counts.table
    rows, columns = table.sum(dim=-1), table.sum(dim=-2)
    pixels = rows.sum(dim=-1)
    agreeing = (table * (table - 1)).sum(dim=(-2, -1))
    true_pairs, slot_pairs = (rows * (rows - 1)).sum(dim=-1), (columns * (columns - 1)).sum(dim=-1)
    expected = true_pairs * slot_pairs / (pixels * (pixels - 1)).clamp(min=1)
    spread = (true_pairs + slot_pairs) / 2 - expected
    defined = spread != 0
    score = torch.where(defined, (agreeing - expected) / torch.where(defined, spread, 1.0), 1.0)
    return score.masked_fill(~counts.labelled, torch.nan)


def mean_best_overlap(counts: Contingency) -> Tensor:
    """Computes mBO: for each true object the largest IoU with any slot, averaged over the objects present.

    Slots may be reused, and unions include background pixels.

    Args:
        counts: tables `(..., C, S)`; drop the background first.

    Returns:
        Float64 `(...)` in [0, 1]; NaN for items without an object.
    """
    return _object_mean(counts, counts.iou().amax(dim=-1).sum(dim=-1))


def mean_iou(counts: Contingency) -> Tensor:
    """Computes mIoU: as `mean_best_overlap`, but objects and slots are matched one to one (Hungarian matching on IoU).

    Args:
        counts: tables `(..., C, S)`; drop the background first.

    Returns:
        Float64 `(...)` in [0, 1], objects without a slot counting 0; NaN for items without an object.
    """
    iou = counts.iou()
    tables = iou.reshape(math.prod(iou.shape[:-2]), *iou.shape[-2:]).cpu().numpy()
    total = [float(table[linear_sum_assignment(table, maximize=True)].sum()) for table in tables]
    return _object_mean(counts, torch.tensor(total, dtype=torch.float64).view(iou.shape[:-2]).to(iou.device))


def _object_mean(counts: Contingency, total: Tensor) -> Tensor:
    """Total over the number of objects present: 0 / 0 is NaN."""
    return total / (counts.table.sum(dim=-1) > 0).sum(dim=-1)
