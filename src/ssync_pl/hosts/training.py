"""What the reference hosts share around their models: validation, test, prediction, the data module's facts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ssync_pl.hosts.evaluation import SlotEvaluation, resize_masks

__all__ = ["SlotHost"]


class SlotHost(L.LightningModule, ABC):
    """Base of the reference hosts. A subclass says how a batch becomes object masks and a loss.

    Args:
        has_background: channel 0 of `segmentations` is the background; the data module's own answer comes first.

    Example:
        >>> from ssync_pl.hosts import SAVi, VideoSAUR
        >>> issubclass(SAVi, SlotHost), issubclass(VideoSAUR, SlotHost)
        (True, True)
    """

    carries_slots: bool = False
    """Whether a clip can start from given slots: `initializer` gives the first ones, `forward(...).slots` all."""

    def __init__(self, has_background: bool = True) -> None:
        super().__init__()
        self.evaluation = SlotEvaluation("val/", has_background)

    @abstractmethod
    def segment(self, batch: Mapping[str, Any]) -> Tensor:
        """Decompose a batch.

        Args:
            batch: of the data module.

        Returns:
            Object-mask probabilities `(B, T, S, h, w)`.
        """

    @abstractmethod
    def evaluate(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Decompose a batch and say how well it is explained.

        Args:
            batch: of the data module.

        Returns:
            Object-mask probabilities `(B, T, S, h, w)` and the loss over frames that count, 0-dim.
        """

    def setup(self, stage: str) -> None:
        """Ask the data module whether its masks have a background channel and may overlap.

        Args:
            stage: `"fit"`, `"validate"`, `"test"` or `"predict"`.
        """
        data = getattr(self.trainer, "datamodule", None)
        has_background = getattr(data, "has_background", None)
        prefix = "test/" if stage == "test" else "val/"
        if has_background is None:
            has_background = self.evaluation.has_background
        wanted = (prefix, bool(has_background), bool(getattr(data, "ignore_overlaps", False)))
        now = self.evaluation
        if wanted != (now.prefix, now.has_background, now.ignore_overlaps):
            self.evaluation = SlotEvaluation(*wanted).to(self.device)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add a batch to the metrics.

        Args:
            batch: of the data module, with `segmentations`.
            batch_idx: number of the batch.
        """
        masks, loss = self.evaluate(batch)
        self.evaluation.update(masks, batch, loss)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics under `val/` and start afresh."""
        # Every rank computes the same reduced value; sync_dist only keeps Lightning from warning that it might not.
        self.log_dict(self.evaluation.compute(), sync_dist=True)
        self.evaluation.reset()

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add a batch to the metrics, as in validation.

        Args:
            batch: of the data module, with `segmentations`.
            batch_idx: number of the batch.
        """
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics under `test/` and start afresh."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Segment a batch at the size of its frames.

        Args:
            batch: of the data module; without `video`, the masks keep the size of the patches.
            batch_idx: number of the batch.

        Returns:
            `labels` long `(B, T, H, W)` and `masks` `(B, T, S, H, W)`, probabilities over slots.
        """
        masks = self.segment(batch)
        if "video" in batch:
            height, width = batch["video"].shape[-2:]
            masks = resize_masks(masks, (height, width))
        return {"labels": masks.max(dim=2).indices, "masks": masks}

    def adam(self, learning_rate: float, factor: Callable[[int], float]) -> OptimizerLRScheduler:
        """Adam over all parameters, with a schedule of its rate.

        Args:
            learning_rate: rate that the schedule multiplies.
            factor: factor at an optimizer step.

        Returns:
            Lightning's optimizer dictionary.
        """
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
