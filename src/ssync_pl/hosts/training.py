"""What the hosts share around their models: validation, test, prediction, optimizer and learning-rate schedules."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ssync_pl.errors import ConfigError, choose, require
from ssync_pl.hosts.evaluation import Evaluated, SlotEvaluation, resize_masks
from ssync_pl.hosts.nn.feature_encoder import FeatureEncoder

Decay = Literal["cosine", "exponential", "constant"]
"""Shape of a learning-rate schedule after its warm-up."""


class SlotHost(L.LightningModule, ABC):
    """Base of the hosts. A subclass says how a batch becomes object masks and a loss."""

    carries_slots: bool = False
    """Whether a clip can start from given slots: `initializer` gives the first ones, `forward(...).slots` all."""

    def __init__(self, has_background: bool = True) -> None:
        super().__init__()
        self.evaluation = SlotEvaluation("val/", has_background)

    @abstractmethod
    def evaluate(self, batch: Mapping[str, Any]) -> Evaluated:
        """Decompose a batch and say how well it is explained."""

    def segment(self, batch: Mapping[str, Any]) -> Tensor:
        """Object masks `(B, T, S, h, w)` of a batch, as an evaluation has them."""
        return Evaluated(*self.evaluate(batch)).masks

    def setup(self, stage: str) -> None:
        """Ask the data module how frames are normalised, and whether masks have a background and may overlap."""
        data = getattr(self.trainer, "datamodule", None)
        for part in self.modules():
            if isinstance(part, FeatureEncoder):
                part.take_normalization(data)
        has_background = getattr(data, "has_background", None)
        has_background = self.evaluation.has_background if has_background is None else bool(has_background)
        overlaps = bool(getattr(data, "ignore_overlaps", False))
        prefix = "test/" if stage == "test" else "val/"
        self.evaluation = SlotEvaluation(prefix, has_background, overlaps).to(self.device)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add a batch of the data module, with `segmentations`, to the metrics."""
        self.evaluation.update(Evaluated(*self.evaluate(batch)), batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics and start afresh."""
        # Every rank computes the same reduced value; sync_dist only keeps Lightning from warning that it might not.
        self.log_dict(self.evaluation.compute(), sync_dist=True)
        self.evaluation.reset()

    test_step = validation_step  # `setup` gave the metrics their other prefix
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Segment a batch at the size of its frames."""
        masks = self.segment(batch)
        if "video" in batch:
            height, width = batch["video"].shape[-2:]
            masks = resize_masks(masks, (height, width))
        return {"labels": masks.max(dim=2).indices, "masks": masks}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build Adam with warm-up and decay over the Trainer's steps, as the hyperparameters say."""
        given, steps = self.hparams, self.trainer.estimated_stepping_batches
        factor = schedule_for(steps, given["warmup_steps"], given["decay"], given["halvings"])
        return self.adam(given["learning_rate"], factor)

    def adam(self, learning_rate: float, factor: Callable[[int], float]) -> OptimizerLRScheduler:
        """Build Adam over all parameters, with `factor(step)` on its rate, as Lightning's optimizer dictionary."""
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def inputs_of(batch: Mapping[str, Any]) -> Tensor:
    """Cached features of a batch, or else its frames."""
    for name in ("features", "video"):
        if isinstance(batch.get(name), Tensor):
            return batch[name]
    raise ConfigError(f"Expected key `features` or `video` in the batch, but got the keys {sorted(batch)}.")


def schedule_for(
    estimated_steps: float, warmup_steps: int, decay: Decay = "cosine", halvings: float = 3.0
) -> Callable[[int], float]:
    """Build a factor on the learning rate, in [0, 1], for `torch.optim.lr_scheduler.LambdaLR`.

    The warm-up rises linearly to 1 and multiplies the decay, which runs over all steps. A training that is too short
    for its warm-up gets a tenth of its steps as warm-up.
    """
    total, warmup_steps = _fit(estimated_steps, warmup_steps)
    choose("decay", decay, "cosine", "exponential", "constant")
    advice = "Give the Trainer `max_steps` or `max_epochs`, or use decay 'constant'."
    require(
        total < math.inf or decay == "constant", f"a training with an end for decay {decay!r}", "none", advice=advice
    )

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (warmup_steps + 1))
        progress = min(1.0, step / total)
        if decay == "cosine":
            return warmup * 0.5 * (1.0 + math.cos(math.pi * progress))
        if decay == "exponential":
            return warmup * float(0.5 ** (halvings * progress))
        return warmup

    return factor


def exponential_for(
    estimated_steps: float, warmup_steps: int, decay_steps: int | None = None, rate: float = 0.5
) -> Callable[[int], float]:
    """Build the factor of the VideoSAUR family: linear from 0 to 1 in the warm-up, then an exponential decay.

    The decay goes on after `decay_steps`, where the factor is `rate`. The warm-up is cut as in `schedule_for`.
    """
    total, warmup_steps = _fit(estimated_steps, warmup_steps)
    require(0 < rate <= 1, "argument `decay_rate` to be in (0, 1]", rate, advice="Use 0.5.")
    end = total if decay_steps is None else decay_steps
    advice = "Give the Trainer `max_steps`, or use decay_rate=1."
    require(end < math.inf or rate == 1, "an end of the training or argument `decay_steps`", "neither", advice=advice)
    expected = f"argument `decay_steps` to be above `warmup_steps` = {warmup_steps}"
    require(end > warmup_steps, expected, end, advice="Leave it out to decay over the whole training.")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return float(rate ** ((step - warmup_steps) / (end - warmup_steps)))

    return factor


def _fit(estimated_steps: float, warmup_steps: int) -> tuple[float, int]:
    require(warmup_steps >= 0, "argument `warmup_steps` to be at least 0", warmup_steps)
    if estimated_steps < 0 or math.isinf(estimated_steps):  # Lightning gives -1 where nobody knows
        return math.inf, warmup_steps
    if warmup_steps >= estimated_steps:
        warmup_steps = int(estimated_steps) // 10
    # A run of zero batches (Trainer(limit_train_batches=0)) still asks for its optimizers.
    return max(1, int(estimated_steps)), warmup_steps
