"""Adjusted Rand index of predicted slots against true masks, for videos and for frames."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ssync_pl.metrics.functional.contingency import Contingency, contingency
from ssync_pl.metrics.functional.reduction import reduce_values, validate_level

__all__ = ["adjusted_rand_index", "ari_from_table", "ari_values"]


def ari_from_table(table: Tensor) -> Tensor:
    """Adjusted Rand index of contingency tables (Hubert and Arabie, 1985).

    Args:
        table: pixel counts `(..., C, S)`, true masks against slots.

    Returns:
        Float64 `(...)`, at most 1, near 0 for partitions by chance. 1 where the index is not defined: both
        partitions have one cluster, or there is no pixel.

    Example:
        >>> import torch
        >>> ari_from_table(torch.tensor([[2, 0], [0, 2]])).item()
        1.0
    """
    counts = table.double()
    rows, columns = counts.sum(dim=-1), counts.sum(dim=-2)
    pixels = rows.sum(dim=-1)
    agreeing = (counts * (counts - 1)).sum(dim=(-2, -1))
    true_pairs = (rows * (rows - 1)).sum(dim=-1)
    slot_pairs = (columns * (columns - 1)).sum(dim=-1)
    expected = true_pairs * slot_pairs / (pixels * (pixels - 1)).clamp(min=1)
    spread = (true_pairs + slot_pairs) / 2 - expected
    defined = spread != 0
    score = (agreeing - expected) / torch.where(defined, spread, 1.0)
    return torch.where(defined, score, 1.0)


def ari_values(counts: Contingency, *, skip_empty: bool = False) -> tuple[Tensor, Tensor]:
    """Adjusted Rand index of each item, and which items count.

    Args:
        counts: tables with any leading dimensions; drop the background first for FG-ARI.
        skip_empty: do not count items in which no true pixel is left, instead of counting them as 1.

    Returns:
        Values (float64) and counted (bool), both with the leading dimensions of `counts`.

    Example:
        >>> import torch
        >>> true = torch.ones(1, 2, 1, 4, 4, dtype=torch.bool)
        >>> counts = contingency(torch.zeros(1, 2, 4, 4, dtype=torch.long), true).foreground()
        >>> ari_values(counts)[1].tolist(), ari_values(counts, skip_empty=True)[1].tolist()
        ([[True, True]], [[False, False]])
    """
    counted = counts.labelled
    if skip_empty:
        counted = counted & (counts.table.sum(dim=(-2, -1)) > 0)
    return ari_from_table(counts.table), counted


def adjusted_rand_index(
    pred: Tensor,
    true: Tensor,
    valid: Tensor | None = None,
    *,
    level: Literal["video", "image"] = "video",
    ignore_background: bool = False,
    ignore_overlaps: bool = False,
    skip_empty: bool = False,
    resolution: tuple[int, int] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Adjusted Rand index over the pixels that have a true mask; FG-ARI with `ignore_background=True`.

    Protocol, as published for VideoSAUR, SlotContrast and SSync: hard labels (soft masks resized bilinearly to the
    size of `true`, then argmax), no matching, the first frame included. `level="video"` takes all frames of a video
    as one partition, `"image"` each frame apart. The score is the mean over videos or frames; those without any true
    mask are skipped.

    Args:
        pred: integer labels `(B, T, H, W)`, or float or bool masks `(B, T, S, h, w)`.
        true: bool masks `(B, T, C, H, W)`, channel 0 = background where the set has one.
        valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.
        level: "video" or "image".
        ignore_background: drop true channel 0, so that background pixels do not count.
        ignore_overlaps: leave out pixels with several true masks instead of refusing them.
        skip_empty: skip items with nothing but background in FG-ARI; published scores count them as 1.
        resolution: `(h, w)` at which to evaluate; None takes the size of `true`. Scores at other sizes are not
            comparable with published ones.
        reduction: "mean", or "none" for one value an item, NaN where it is skipped.

    Returns:
        Float64 scalar (NaN if no item counts), or `(B,)` / `(B, T)` with `reduction="none"`.

    Raises:
        ShapeError: if the inputs do not fit; the message says how.
        ConfigError: if `level` or `reduction` is unknown.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0, 0, 0]], [[0, 0, 1, 1, 0, 0]], [[0, 0, 0, 0, 1, 1]]]]]).bool()
        >>> pred = torch.tensor([[[[0, 0, 1, 1, 0, 0]]]])
        >>> round(adjusted_rand_index(pred, true).item(), 4)
        0.4444
        >>> adjusted_rand_index(pred, true, ignore_background=True).item()
        1.0
    """
    validate_level(level, reduction)
    counts = contingency(
        pred,
        true,
        valid,
        has_background=ignore_background,
        ignore_overlaps=ignore_overlaps,
        resolution=resolution,
    )
    counts = counts.foreground() if ignore_background else counts
    counts = counts.videos() if level == "video" else counts
    return reduce_values(*ari_values(counts, skip_empty=skip_empty), reduction)
