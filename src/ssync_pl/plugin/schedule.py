"""When SSync is off, watching or on, in optimizer steps."""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ssync_pl.errors import ConfigError
from ssync_pl.plugin.config import SSyncConfig


def training_length(trainer: Any) -> float:
    """Computes the optimizer steps of a training, also where the accumulation changes; infinity when unknown."""
    from ssync_pl.data.loader import accumulated_batches  # brings Lightning, which `attach` can do without

    steps = trainer.estimated_stepping_batches
    if not 0 <= steps < math.inf:  # Lightning gives -1 for a loader without a length
        return math.inf
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is None or epochs < 0 or not math.isfinite(batches):
        return steps  # max_steps
    # From the last change of the accumulation on, epochs are alike.
    last = max((epoch for c in trainer.callbacks for epoch in getattr(c, "scheduling", ())), default=0)
    paces = [math.ceil(batches / accumulated_batches(trainer, epoch)) for epoch in range(min(last + 1, epochs) or 1)]
    steps = sum(paces) + paces[-1] * max(epochs - len(paces), 0)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def steps_of(ratio: float, steps: int | None, total_steps: float, name: str = "warmup") -> int:
    """Settles a span given as a share of the training or as a number of steps; ``name`` is for messages.

    Raises:
        ConfigError: The training has no known length and the span is a share of it.
    """
    if steps is not None or ratio == 0.0:
        return steps or 0
    if not math.isfinite(total_steps) or total_steps < 0:
        raise ConfigError(
            f"Expected a training of known length for `{name}_ratio`={ratio}, but its number of optimizer steps is "
            f"unknown. Pass `{name}_steps` or max_steps; or max_epochs, with limit_train_batches for a stream."
        )
    return math.ceil(ratio * total_steps)


class Phase(Enum):
    """What a training step has to do."""

    OFF = "off"  # nothing is captured or computed
    WATCH = "watch"  # the end of the warm-up: slots in use are counted, nothing is added to the loss
    ON = "on"  # the losses are computed and added


@dataclass(frozen=True)
class Schedule:
    """Warm-up and ramp in optimizer steps: ``watch_steps`` before ``start``, slots in use are counted.

    Source: SSync (arXiv 2606.15527): both terms are off while ``global_step < 0.3 * max_steps``.
    """

    start: int
    ramp_steps: int = 0
    watch_steps: int = 0

    @classmethod
    def resolve(cls, config: SSyncConfig, total_steps: float) -> "Schedule":
        """Turns ratios into steps; raises `ConfigError` where the warm-up is a share of an unknown length."""
        start = steps_of(config.warmup_ratio or 0.0, config.warmup_steps, total_steps)
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
