"""The metrics as torchmetrics classes: means over videos or frames, summed over batches and ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ssync_pl.errors import require
from ssync_pl.metrics.functional.boundary import boundary_f
from ssync_pl.metrics.functional.contingency import contingency
from ssync_pl.metrics.functional.scene import read_scene
from ssync_pl.metrics.functional.slots import used_slots
from ssync_pl.metrics.table import METRICS, ScoredBatch, metric_names

_NEED_BACKGROUND = ("video_ari", "image_ari")  # without one they are FG-ARI again


class ItemMean(Metric):
    """Means over videos or frames: float64 sums, so that batches and ranks of different sizes weigh by their items.

    Args:
        size: number of means.
        **kwargs: for `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, size: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def add_items(self, *values: Tensor) -> None:
        """Adds a tensor of any shape to each mean, NaN for items that do not count."""
        totals = torch.stack([value.nansum() for value in values])
        counts = torch.stack([(~value.isnan()).sum() for value in values])
        # A host cast to half precision casts the states: sums go back to float64.
        self.total = self.total.double() + totals.to(self.total.device)
        self.count = self.count.double() + counts.to(self.count.device)

    def compute(self) -> Any:
        """Returns the mean over the items so far, float64; NaN if there are none."""
        return (self.total.double() / self.count.double())[0]


class MaskMetric(ItemMean):
    """Base of the metrics that score predicted masks against true masks, by rows of `ssync_pl.metrics.METRICS`.

    Args:
        ignore_background: channel 0 of the true masks is the background and does not count.
        ignore_overlaps: leave out pixels with several true masks, in true masks and slots, instead of refusing them.
        **kwargs: for `torchmetrics.Metric`.
    """

    score_names: tuple[str, ...] = ()

    def __init__(self, ignore_background: bool = False, ignore_overlaps: bool = False, **kwargs: Any) -> None:
        super().__init__(len(self.score_names), **kwargs)
        self.has_background = ignore_background
        self.ignore_overlaps = ignore_overlaps

    def update(self, pred: Tensor, true: Tensor, valid: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            pred: integer labels `(B, T, H, W)`, or float or bool masks `(B, T, S, h, w)`.
            true: bool masks `(B, T, C, H, W)`.
            valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.

        Raises:
            ShapeError: the inputs do not fit.
        """
        scene = read_scene(pred, true, valid)
        frames = contingency(scene, self.has_background, self.ignore_overlaps)
        counts = {"video": frames.videos(), "image": frames}
        objects = {level: one.foreground() for level, one in counts.items()} if self.has_background else counts
        batch = ScoredBatch(pred, valid, scene, counts, objects)
        self.add_items(*(METRICS[name].score(batch) for name in self.score_names))  # type: ignore[misc]


class VideoARI(MaskMetric):
    """Adjusted Rand index of whole videos; video FG-ARI with `ignore_background=True`.

    As published for VideoSAUR, SlotContrast and SSync: all frames of a video, the first included, are one partition,
    so a slot must keep its object over time; only pixels with a true mask count; soft masks are resized bilinearly to
    the true masks' size, then argmax; mean over videos that have any true mask, of which those with nothing but
    background count as 1 in FG-ARI. Arguments as `MaskMetric`.

    Examples:
        >>> true = torch.tensor([[[[[1, 1, 0, 0]], [[0, 0, 1, 1]]]]], dtype=torch.bool)
        >>> metric = VideoARI()
        >>> metric.update(torch.tensor([[[[5, 5, 2, 2]]]]), true)
        >>> metric.compute().item()
        1.0
    """

    score_names = ("video_fg_ari",)  # with a background of which nothing is known, it is the ARI


class ImageARI(MaskMetric):
    """As `VideoARI`, but each frame is a partition of its own: identity over time does not matter."""

    score_names = ("image_fg_ari",)


class VideoMBO(MaskMetric):
    """Mean best overlap (mBO) of whole videos: for each true object the largest IoU with any slot.

    As published for VideoSAUR, SlotContrast and SSync: objects and slots over all frames of a video, the first
    included; slots may be reused; unions include background pixels; soft masks are resized bilinearly to the true
    masks' size, then argmax; mean over the objects present, then over videos that have an object. Arguments as
    `MaskMetric`.
    """

    score_names = ("video_mbo",)


class ImageMBO(MaskMetric):
    """As `VideoMBO`, but each frame apart; mean over all frames that have an object."""

    score_names = ("image_mbo",)


class VideoMIoU(MaskMetric):
    """As `VideoMBO`, but objects and slots are matched one to one: mean IoU (mIoU); objects without a slot count 0."""

    score_names = ("video_miou",)


class ImageMIoU(MaskMetric):
    """As `VideoMIoU`, but each frame apart; mean over all frames that have an object."""

    score_names = ("image_miou",)


class SlotsPerObject(MaskMetric):
    """Slots that an object of a video is cut into (`functional.slots_per_object`): more than 1 is over-segmentation."""

    score_names = ("slots_per_object",)
    higher_is_better = False


class SlotIdentity(MaskMetric):
    """How often an object keeps its slot from one frame to the next (`functional.slot_identity`); mean over videos."""

    score_names = ("identity",)


class BoundaryF(ItemMean):
    """F-measure of the borders between slots (`functional.boundary_f`): mean over frames, then videos."""

    def update(self, pred: Tensor, true: Tensor, valid: Tensor | None = None) -> None:
        """Adds a batch; arguments as `MaskMetric.update`."""
        self.add_items(boundary_f(read_scene(pred, true, valid)).nanmean(dim=1))


class UnusedSlots(ItemMean):
    """Number of slots that win no place of a video, at the host's own size; mean over videos."""

    higher_is_better = False

    def update(self, masks: Tensor, valid: Tensor | None = None) -> None:
        """Adds a batch; arguments as `functional.used_slots`."""
        self.add_items(masks.shape[2] - used_slots(masks, valid))


class SegmentationMetrics(MaskMetric):
    """FG-ARI, ARI, mBO and mIoU of videos and of frames, from one pass over the pixels and one exchange between ranks.

    As an attribute of a LightningModule it follows the module's device and sums over ranks:
    `self.log_dict(self.metrics.compute())` in `on_validation_epoch_end`, then `self.metrics.reset()`. `used_slots` and
    `unused_slots` need float masks at the host's own size.

    Args:
        prefix: put before each name, for example "val/".
        has_background: channel 0 of the true masks is the background. FG-ARI, mBO and mIoU drop it, ARI keeps it.
            If False, `*_fg_ari` is the ARI over all true masks, and `*_ari` is left out.
        ignore_overlaps: leave out pixels with several true masks instead of refusing them.
        scores: names of `ssync_pl.metrics.METRICS`; None takes the group "segmentation".
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ConfigError: a score is unknown.

    Examples:
        >>> true = torch.tensor([[[[[1, 1, 0, 0, 0, 0]], [[0, 0, 1, 1, 0, 0]], [[0, 0, 0, 0, 1, 1]]]]]).bool()
        >>> metrics = SegmentationMetrics(prefix="val/")
        >>> metrics.update(torch.tensor([[[[0, 0, 1, 1, 2, 0]]]]), true)
        >>> metrics.compute()["val/video_mbo"].item()
        0.75
    """

    def __init__(
        self,
        prefix: str = "",
        has_background: bool = True,
        ignore_overlaps: bool = False,
        scores: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        wanted = metric_names("segmentation") if scores is None else tuple(scores)
        unknown = [name for name in wanted if name not in METRICS]
        require(not unknown, f"scores among {list(METRICS)}", unknown)
        self.prefix = prefix
        self.score_names = tuple(name for name in wanted if has_background or name not in _NEED_BACKGROUND)
        super().__init__(has_background, ignore_overlaps, **kwargs)

    def keys(self) -> list[str]:
        """Returns the names of the scores, with the prefix, in the order of `compute`."""
        return [self.prefix + name for name in self.score_names]

    def compute(self) -> dict[str, Tensor]:
        """Returns the mean over the items so far of every score, float64 scalars; NaN where there are none."""
        return dict(zip(self.keys(), (self.total.double() / self.count.double()).unbind(), strict=True))
