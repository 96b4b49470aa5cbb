"""When SSync is off, watching or on, in optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ssync_pl.errors import ConfigError
from ssync_pl.plugin.config import SSyncConfig

__all__ = ["Phase", "Schedule", "steps_of", "training_length"]


def training_length(trainer: Any) -> float:
    """Computes how many optimizer steps a Trainer will take, also where callbacks change the accumulation by epoch.

    Args:
        trainer: A Lightning Trainer.

    Returns:
        Optimizer steps of the whole training; infinity when unknown.
    """
    steps = trainer.estimated_stepping_batches
    if not 0 <= steps < math.inf:  # Lightning gives -1 for a loader without a length
        return math.inf
    accumulation = next((c for c in getattr(trainer, "callbacks", ()) if _accumulates(c)), None)
    if accumulation is None or trainer.max_epochs in (None, -1) or not math.isfinite(trainer.num_training_batches):
        return steps
    batches = trainer.num_training_batches
    epochs = range(trainer.max_epochs)
    steps = sum(math.ceil(batches / accumulation.get_accumulate_grad_batches(epoch)) for epoch in epochs)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def _accumulates(callback: Any) -> bool:
    # Lightning's GradientAccumulationScheduler, of either namespace.
    return hasattr(callback, "get_accumulate_grad_batches")


def steps_of(ratio: float, steps: int | None, total_steps: float, name: str = "warmup") -> int:
    """Settles a span that is given as a share of the training or as a number of steps.

    Args:
        ratio: Share of the training's optimizer steps, in [0, 1].
        steps: Number of optimizer steps; takes the place of ``ratio``.
        total_steps: Optimizer steps of the whole training; infinity when unknown.
        name: Name of the two arguments without ``_ratio`` and ``_steps``, for messages.

    Returns:
        Optimizer steps.

    Raises:
        ConfigError: The training has no known length and the span is a share of it.
    """
    if steps is not None:
        return steps
    if ratio == 0.0:
        return 0
    if not math.isfinite(total_steps) or total_steps < 0:
        raise ConfigError(
            f"Expected a training of known length for `{name}_ratio`={ratio}, but its number of optimizer steps is "
            f"unknown. Pass `{name}_steps` or max_steps; or set max_epochs, with limit_train_batches where the data "
            "loader has no length."
        )
    return math.ceil(ratio * total_steps)


class Phase(Enum):
    """What a training step has to do."""

    OFF = "off"
    """Nothing is captured or computed."""
    WATCH = "watch"
    """The last steps of the warm-up: slots in use are counted, nothing is added to the loss."""
    ON = "on"
    """The losses are computed and added."""


@dataclass(frozen=True)
class Schedule:
    """Warm-up and ramp in optimizer steps.

    Args:
        start: First optimizer step with SSync on, at least 0.
        ramp_steps: Steps over which the weight grows to its full size, at least 0.
        watch_steps: Steps before ``start`` in which slots in use are counted, at least 0.

    Source: SSync (arXiv 2606.15527): both terms are off while ``global_step < 0.3 * max_steps``.
    """

    start: int
    ramp_steps: int = 0
    watch_steps: int = 0

    @classmethod
    def resolve(cls, config: SSyncConfig, total_steps: float) -> Schedule:
        """Turns ratios into steps; raises `ConfigError` where the warm-up is a share of an unknown length."""
        start = steps_of(config.warmup_ratio, config.warmup_steps, total_steps)
        return cls(start=start, ramp_steps=config.ramp_steps, watch_steps=config.guard_window)

    def phase(self, step: int) -> Phase:
        """Returns what a training step has to do after ``step`` optimizer steps."""
        if step >= self.start:
            return Phase.ON
        return Phase.WATCH if step >= self.start - self.watch_steps else Phase.OFF

    def weight(self, step: int) -> float:
        """Returns the factor of the losses after ``step`` optimizer steps, in [0, 1]."""
        if step < self.start:
            return 0.0
        return min(1.0, (step - self.start + 1) / self.ramp_steps) if self.ramp_steps else 1.0
