"""All scores of a validation run from one pass over the pixels."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from ssync_pl.metrics.base import validate_resolution
from ssync_pl.metrics.functional.ari import ari_values
from ssync_pl.metrics.functional.contingency import Contingency, contingency
from ssync_pl.metrics.functional.overlap import best_overlap_values, matched_iou_values

__all__ = ["SegmentationMetrics"]


class SegmentationMetrics(Metric):
    """FG-ARI, ARI, mBO and mIoU of videos and of frames, from one pass over the pixels and one exchange between ranks.

    Used like a `torchmetrics.MetricCollection`: `update`, `compute` gives a dict with prefixed names, `reset`,
    `clone(prefix=...)`; as an attribute of a LightningModule it follows the module's device and sums over ranks:
    `self.log_dict(self.metrics.compute())` in `on_validation_epoch_end`, then `self.metrics.reset()`.

    Protocol of each score: see `VideoARI`, `VideoMBO`, `VideoMIoU` and their frame-wise siblings. mBO and mIoU never
    take the background for an object.

    Args:
        prefix: put before each name, for example "val/".
        has_background: channel 0 of the true masks is the background. FG-ARI, mBO and mIoU drop it, ARI keeps it.
            If False, `*_fg_ari` is the ARI over all true masks, and `*_ari` is left out.
        ignore_overlaps: leave out pixels with several true masks instead of refusing them.
        skip_empty: skip videos and frames with nothing but background in FG-ARI; published scores count them as 1.
        resolution: `(h, w)` at which to evaluate; None takes the size of the true masks. A lower one is quicker, for
            scores that only watch a training; do not compare these with published ones.
        **kwargs: for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> true = torch.tensor([[[[[1, 1, 0, 0, 0, 0]], [[0, 0, 1, 1, 0, 0]], [[0, 0, 0, 0, 1, 1]]]]]).bool()
        >>> metrics = SegmentationMetrics(prefix="val/")
        >>> metrics.update(torch.tensor([[[[0, 0, 1, 1, 2, 0]]]]), true)
        >>> scores = metrics.compute()
        >>> sorted(scores) == sorted(metrics.keys())
        True
        >>> scores["val/video_mbo"].item()
        0.75
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    totals: Tensor
    counts: Tensor

    def __init__(
        self,
        prefix: str = "",
        has_background: bool = True,
        ignore_overlaps: bool = False,
        skip_empty: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.prefix = prefix
        self.has_background = has_background
        self.ignore_overlaps = ignore_overlaps
        self.skip_empty = skip_empty
        self.resolution = validate_resolution(resolution)
        scores = ("fg_ari", "ari", "mbo", "miou") if has_background else ("fg_ari", "mbo", "miou")
        self.score_names = tuple(f"{level}_{score}" for level in ("video", "image") for score in scores)
        self.add_state("totals", torch.zeros(len(self.score_names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(self.score_names), dtype=torch.float64), dist_reduce_fx="sum")

    def keys(self) -> list[str]:
        """Names of the scores, with the prefix, in the order of `compute`."""
        return [self.prefix + name for name in self.score_names]

    def clone(self, prefix: str | None = None) -> SegmentationMetrics:
        """Copy with its own sums, under another prefix if one is given.

        Args:
            prefix: put before each name; None keeps this one's.

        Returns:
            The copy.
        """
        copy = cast(SegmentationMetrics, super().clone())
        copy.prefix = self.prefix if prefix is None else prefix
        return copy

    def update(self, pred: Tensor, true: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            pred: integer labels `(B, T, H, W)`, or float or bool masks `(B, T, S, h, w)`.
            true: bool masks `(B, T, C, H, W)`.
            valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.

        Raises:
            ShapeError: if the inputs do not fit; the message says how.
        """
        frames = contingency(
            pred,
            true,
            valid,
            has_background=self.has_background,
            ignore_overlaps=self.ignore_overlaps,
            resolution=self.resolution,
        )
        scores = [*self._scores(frames.videos()), *self._scores(frames)]
        totals = torch.stack([values.masked_fill(~counted, 0.0).sum() for values, counted in scores])
        counts = torch.stack([counted.sum() for _, counted in scores])
        # A host cast to half precision casts the states: sums go back to float64.
        self.totals = self.totals.double() + totals.to(self.totals.device)
        self.counts = self.counts.double() + counts.to(self.counts.device)

    def _scores(self, counts: Contingency) -> list[tuple[Tensor, Tensor]]:
        objects = counts.foreground() if self.has_background else counts
        scores = [ari_values(objects, skip_empty=self.skip_empty)]
        if self.has_background:
            scores.append(ari_values(counts))
        return [*scores, best_overlap_values(objects), matched_iou_values(objects)]

    def compute(self) -> dict[str, Tensor]:
        """Mean over the items so far of every score, float64 scalars; NaN where there are none."""
        return dict(zip(self.keys(), (self.totals.double() / self.counts.double()).unbind(), strict=True))
