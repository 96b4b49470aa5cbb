"""Validation shared by the reference hosts: which frames count, masks at full size, metrics and used slots."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ssync_pl.errors import ConfigError, require_shape
from ssync_pl.metrics import SegmentationMetrics, metric_names


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


class SlotEvaluation(nn.Module):
    """Collects segmentation metrics, used slots and the loss over an evaluation, for any host with object masks.

    It is a submodule of the host so that its metrics follow the host's device; it adds no state-dict keys.
    """

    def __init__(self, prefix: str = "val/", has_background: bool = True, ignore_overlaps: bool = False) -> None:
        super().__init__()
        self.prefix = prefix
        self.has_background = has_background
        self.ignore_overlaps = ignore_overlaps
        scores = (*metric_names("segmentation"), "used_slots")
        self.metrics = SegmentationMetrics(prefix, has_background, ignore_overlaps, scores)
        self.loss = MeanMetric()

    @torch.no_grad()
    def update(self, masks: Tensor, batch: Mapping[str, Any], loss: Tensor) -> None:
        """Add a batch."""
        truth = batch.get("segmentations")
        if truth is None:
            raise ConfigError(f"Expected key `segmentations` in an evaluation batch, but got the keys {sorted(batch)}.")
        fits = truth.ndim == 5 and truth.shape[:2] == masks.shape[:2]
        require_shape(fits, f"`segmentations` (B, T, C, H, W) with B, T = {tuple(masks.shape[:2])}", truth)
        valid = frame_validity(batch)
        self.metrics.update(masks.nan_to_num(), truth, valid)  # a training that diverged is logged, not ended
        self.loss.update(loss.detach().float(), valid.sum().float())

    def compute(self) -> dict[str, Tensor]:
        """Return segmentation metrics, `used_slots` and `loss` since the last reset, 0-dim, by prefixed name."""
        return {**self.metrics.compute(), f"{self.prefix}loss": self.loss.compute()}

    def reset(self) -> None:
        """Forget everything."""
        self.metrics.reset()
        self.loss.reset()
