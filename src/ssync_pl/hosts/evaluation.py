"""Validation shared by the reference hosts: which frames count, masks at full size, metrics and used slots."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ssync_pl.errors import ConfigError, require_shape
from ssync_pl.method import SSyncMaps, redundant_slots, relabel
from ssync_pl.metrics import MAPS, METRICS, SegmentationMetrics, metric_names


def frame_validity(batch: Mapping[str, Any]) -> Tensor:
    """Frames of a batch that count: real samples, and in them real frames."""
    clips = batch["video"] if "video" in batch else batch["features"]
    valid = torch.ones(clips.shape[:2], dtype=torch.bool, device=clips.device)
    if batch.get("frame_mask") is not None:
        valid = valid & batch["frame_mask"].to(clips.device).bool()
    if batch.get("batch_padding_mask") is not None:
        valid = valid & batch["batch_padding_mask"].to(clips.device).bool().unsqueeze(1)
    return valid


def mean_over_frames(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of values `(B, T)`, one per frame, over the frames that count; 0 when none does."""
    weights = valid.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1.0)


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize soft masks bilinearly, as published results do before the argmax."""
    if masks.shape[-2:] == tuple(size):
        return masks
    flat = nn.functional.interpolate(masks.flatten(0, 1), size=size, mode="bilinear", align_corners=False)
    return flat.unflatten(0, masks.shape[:2])


class Evaluated(NamedTuple):
    """What a host makes of a batch in an evaluation.

    Args:
        masks: `(B, T, S, h, w)` object masks of the decoder, which sum to 1 over slots.
        loss: 0-dim.
        attention: `(B, T, S, h, w)` logits of slot attention, with the same slots; None where a host has none of these.
        images: slots keep no identity from frame to frame, so that each frame is merged by itself.
    """

    masks: Tensor
    loss: Tensor
    attention: Tensor | None = None
    images: bool = False

    def labels(self, size: tuple[int, int], merge_threshold: float = 0.7) -> dict[str, Tensor]:
        """Labels `(B, T, H, W)` of every map, by the prefix of its scores in `ssync_pl.metrics.MAPS`."""
        found = {"": resize_masks(self.masks.float(), size).max(dim=2).indices}
        if self.attention is not None:
            found["encoder_"] = resize_masks(self.attention.float().softmax(dim=2), size).max(dim=2).indices
            rows, columns = self.attention.shape[-2:]
            logits = self.attention.flatten(3)
            logits = logits.flatten(0, 1).unsqueeze(1) if self.images else logits
            winners = redundant_slots(SSyncMaps(logits, logits, grid=(rows, columns)), merge_threshold)
            for prefix, labels in list(found.items()):
                found[f"merged_{prefix}"] = relabel(labels.reshape(len(winners), -1), winners).view_as(labels)
        return found


class SlotEvaluation(nn.Module):
    """Collects segmentation metrics, used slots and the loss over an evaluation, for any host with object masks.

    It is a submodule of the host so that its metrics follow the host's device; it adds no state-dict keys. Maps other
    than the decoder's get those of the `scores` that are for `both_maps`.
    """

    def __init__(
        self,
        prefix: str = "val/",
        has_background: bool = True,
        ignore_overlaps: bool = False,
        scores: Sequence[str] = (*metric_names("segmentation"), "used_slots"),
    ) -> None:
        super().__init__()
        self.has_background = has_background
        self.ignore_overlaps = ignore_overlaps
        self.metrics = SegmentationMetrics(prefix, has_background, ignore_overlaps, scores)
        shared = [name for name in scores if METRICS[name].both_maps]
        others = {of: SegmentationMetrics(prefix + of, has_background, ignore_overlaps, shared) for of in MAPS if of}
        self.others = nn.ModuleDict(others)
        self.loss = MeanMetric()

    @torch.no_grad()
    def update(self, evaluated: Evaluated, batch: Mapping[str, Any]) -> None:
        """Add a batch."""
        masks = evaluated.masks
        truth = batch.get("segmentations")
        if truth is None:
            raise ConfigError(f"Expected key `segmentations` in an evaluation batch, but got the keys {sorted(batch)}.")
        fits = truth.ndim == 5 and truth.shape[:2] == masks.shape[:2]
        require_shape(fits, f"`segmentations` (B, T, C, H, W) with B, T = {tuple(masks.shape[:2])}", truth)
        valid = frame_validity(batch)
        self.metrics.update(masks.nan_to_num(), truth, valid)  # a training that diverged is logged, not ended
        known = evaluated.attention is not None
        for of, labels in evaluated.labels((truth.shape[-2], truth.shape[-1])).items() if known else ():
            if of:
                self.others[of].update(labels, truth, valid)  # type: ignore[operator]
        self.loss.update(evaluated.loss.detach().float(), valid.sum().float())

    def compute(self) -> dict[str, Tensor]:
        """Return segmentation metrics, `used_slots` and `loss` since the last reset, 0-dim, by prefixed name.

        Scores of the other `MAPS` are there where the host has these.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metrics without a batch; all ranks have to take part all the same
            found = (pair for metrics in self.others.values() for pair in metrics.compute().items())  # type: ignore
            others = {name: value for name, value in found if not value.isnan()}
        return {**self.metrics.compute(), **others, f"{self.metrics.prefix}loss": self.loss.compute()}

    def reset(self) -> None:
        """Forget everything."""
        for metric in (self.metrics, *self.others.values(), self.loss):
            metric.reset()  # type: ignore[operator]
