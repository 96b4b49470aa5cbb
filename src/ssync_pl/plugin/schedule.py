"""When SSync is off, watching or on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from ssync_pl.errors import ConfigError
from ssync_pl.plugin.config import SSyncConfig

__all__ = ["Phase", "Schedule", "steps_of"]


def steps_of(ratio: float, steps: int | None, total_steps: float, name: str = "warmup") -> int:
    """Settle a span that is given as a share of the training or as a number of steps.

    Args:
        ratio: Share of the training's optimizer steps, in [0, 1].
        steps: The same as a number of steps; takes the place of ``ratio``.
        total_steps: Optimizer steps of the whole training; infinity when unknown.
        name: Of the two arguments without ``_ratio`` and ``_steps``, for messages.

    Returns:
        Optimizer steps.

    Raises:
        ConfigError: The training has no known length and the span is a share of it.

    Example:
        >>> steps_of(0.3, None, 1000), steps_of(0.3, 7, 1000), steps_of(0.0, None, math.inf)
        (300, 7, 0)
    """
    if steps is not None:
        return steps
    if ratio == 0.0:
        return 0
    if not math.isfinite(total_steps) or total_steps < 0:
        raise ConfigError(
            f"Expected the training to have a known number of steps for `{name}_ratio`={ratio}, but the Trainer has "
            f"neither max_steps nor max_epochs. Pass `{name}_steps` instead."
        )
    return math.ceil(ratio * total_steps)


class Phase(Enum):
    """What a training step has to do.

    Example:
        >>> Phase.OFF.value
        'off'
    """

    OFF = "off"
    """Nothing is captured or computed."""
    WATCH = "watch"
    """The last steps of the warm-up: slots in use are counted, nothing is added to the loss."""
    WAIT = "wait"
    """The warm-up is over and the host is not mature: agreement and slots in use are counted, nothing is added."""
    ON = "on"
    """The losses are computed and added."""


@dataclass(frozen=True)
class Schedule:
    """Warm-up and ramp in optimizer steps.

    Args:
        start: First optimizer step with SSync on, at least 0.
        ramp_steps: Steps over which the weight grows to its full size, at least 0.
        watch_steps: Steps before ``start`` in which slots in use are counted, at least 0.

    Example:
        >>> schedule = Schedule(start=10, ramp_steps=4, watch_steps=2)
        >>> [schedule.phase(step).value for step in (0, 8, 10)]
        ['off', 'watch', 'on']
        >>> [schedule.weight(step) for step in (9, 10, 11, 13, 14)]
        [0.0, 0.25, 0.5, 1.0, 1.0]

    Source: SSync (arXiv 2606.15527): both terms are off while ``global_step < 0.3 * max_steps``.
    """

    start: int
    ramp_steps: int = 0
    watch_steps: int = 0

    @classmethod
    def resolve(cls, config: SSyncConfig, total_steps: float) -> Schedule:
        """Turn ratios into steps.

        Args:
            config: The settings.
            total_steps: Optimizer steps of the whole training; infinity when unknown.

        Returns:
            The schedule.

        Raises:
            ConfigError: The training has no known length and the warm-up is a share of it.

        Example:
            >>> Schedule.resolve(SSyncConfig(), total_steps=1000).start
            300
        """
        start = steps_of(config.warmup_ratio, config.warmup_steps, total_steps)
        return cls(start=start, ramp_steps=config.ramp_steps, watch_steps=config.guard_window)

    def phase(self, step: int) -> Phase:
        """What the training step at this optimizer step has to do.

        Args:
            step: Optimizer steps taken so far, at least 0.

        Returns:
            The phase.

        Example:
            >>> Schedule(start=1).phase(0)
            <Phase.OFF: 'off'>
        """
        if step >= self.start:
            return Phase.ON
        return Phase.WATCH if step >= self.start - self.watch_steps else Phase.OFF

    def weight(self, step: int) -> float:
        """Factor of the losses at this optimizer step.

        Args:
            step: Optimizer steps taken so far, at least 0.

        Returns:
            In [0, 1].

        Example:
            >>> Schedule(start=1).weight(1)
            1.0
        """
        if step < self.start:
            return 0.0
        return min(1.0, (step - self.start + 1) / self.ramp_steps) if self.ramp_steps else 1.0
