"""Learning-rate schedules: linear warm-up, then decay."""

from __future__ import annotations

import math
from typing import Literal

from ssync_pl.errors import ConfigError

__all__ = ["WarmupDecay", "WarmupExponential", "exponential_for", "schedule_for"]


class WarmupDecay:
    """Factor on the learning rate at a step, for `torch.optim.lr_scheduler.LambdaLR`.

    The warm-up rises linearly to 1 and multiplies the decay, which runs over all steps: `"cosine"` falls to 0,
    `"exponential"` halves `halvings` times in all, `"constant"` stays at 1.

    Args:
        total_steps: optimizer steps of the whole training; may be infinite for `"constant"` only.
        warmup_steps: steps of the warm-up; 0 for none.
        decay: shape of the decay.
        halvings: how often `"exponential"` halves the rate.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> factor = WarmupDecay(total_steps=1000, warmup_steps=100, decay="exponential", halvings=3)
        >>> round(factor(49), 3), factor(1000)
        (0.447, 0.125)
    """

    def __init__(
        self,
        total_steps: float,
        warmup_steps: int = 0,
        decay: Literal["cosine", "exponential", "constant"] = "cosine",
        halvings: float = 3.0,
    ) -> None:
        if decay not in ("cosine", "exponential", "constant"):
            raise ConfigError(
                f"Expected argument `decay` to be 'cosine', 'exponential' or 'constant', but got {decay!r}. Choose one."
            )
        if warmup_steps < 0:
            raise ConfigError(f"Expected argument `warmup_steps` to be at least 0, but got {warmup_steps}. Use 0.")
        if total_steps < 1 or (math.isinf(total_steps) and decay != "constant"):
            raise ConfigError(
                f"Expected argument `total_steps` to be a finite number of at least 1 for decay {decay!r}, "
                f"but got {total_steps}. Give the Trainer `max_steps` or `max_epochs`, or use decay 'constant'."
            )
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.halvings = halvings

    def __call__(self, step: int) -> float:
        """Return the factor at a step.

        Args:
            step: optimizer steps taken so far.

        Returns:
            Factor in [0, 1].
        """
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        progress = min(1.0, step / self.total_steps)
        if self.decay == "cosine":
            return warmup * 0.5 * (1.0 + math.cos(math.pi * progress))
        if self.decay == "exponential":
            return warmup * float(0.5 ** (self.halvings * progress))
        return warmup


def schedule_for(
    estimated_steps: float,
    warmup_steps: int,
    decay: Literal["cosine", "exponential", "constant"] = "cosine",
    halvings: float = 3.0,
) -> WarmupDecay:
    """Build the schedule of a training run, with the warm-up cut to a tenth of a run that is too short for it.

    Args:
        estimated_steps: `trainer.estimated_stepping_batches`.
        warmup_steps: wanted warm-up.
        decay: shape of the decay.
        halvings: how often `"exponential"` halves the rate.

    Returns:
        The schedule.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> schedule_for(1000, warmup_steps=2500).warmup_steps
        100
    """
    if estimated_steps < 0:  # Lightning's way to say that nobody knows
        estimated_steps = math.inf
    if math.isfinite(estimated_steps):
        if warmup_steps >= estimated_steps:
            warmup_steps = int(estimated_steps) // 10
        # A run of zero batches (Trainer(limit_train_batches=0)) still asks for its optimizers.
        estimated_steps = max(1, int(estimated_steps))
    return WarmupDecay(estimated_steps, warmup_steps, decay, halvings)


class WarmupExponential:
    """Factor of the VideoSAUR family: linear from 0 to 1, then `rate ** (steps since / (decay_steps - warmup_steps))`.

    The first step has factor 0. The decay goes on after `decay_steps`, where the factor is `rate`.

    Args:
        warmup_steps: steps of the warm-up; 0 for none.
        decay_steps: step at which the factor is `rate`; must be above `warmup_steps`.
        rate: in (0, 1]; 1 does not decay.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> factor = WarmupExponential(warmup_steps=100, decay_steps=300, rate=0.5)
        >>> [round(factor(step), 3) for step in (0, 50, 100, 200, 300, 500)]
        [0.0, 0.5, 1.0, 0.707, 0.5, 0.25]

    Source: schedule of the public VideoSAUR code and its forks.
    """

    def __init__(self, warmup_steps: int, decay_steps: float, rate: float = 0.5) -> None:
        if warmup_steps < 0 or not 0 < rate <= 1:
            raise ConfigError(
                "Expected argument `warmup_steps` to be at least 0 and `decay_rate` to be in (0, 1], but got "
                f"{warmup_steps} and {rate}. Use 2500 and 0.5."
            )
        if decay_steps <= warmup_steps:
            raise ConfigError(
                f"Expected argument `decay_steps` to be above `warmup_steps` = {warmup_steps}, but got {decay_steps}. "
                "Leave `decay_steps` out to decay over the whole training."
            )
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps
        self.rate = rate

    def __call__(self, step: int) -> float:
        """Return the factor at a step.

        Args:
            step: optimizer steps taken so far.

        Returns:
            Factor in [0, 1].
        """
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return float(self.rate ** ((step - self.warmup_steps) / (self.decay_steps - self.warmup_steps)))


def exponential_for(
    estimated_steps: float, warmup_steps: int, decay_steps: int | None = None, rate: float = 0.5
) -> WarmupExponential:
    """Build the VideoSAUR family's schedule for a training run; a run too short for its warm-up gets a tenth as one.

    Args:
        estimated_steps: `trainer.estimated_stepping_batches`.
        warmup_steps: wanted warm-up.
        decay_steps: step at which the rate is `rate` times its peak; None takes the end of the training.
        rate: see `WarmupExponential`.

    Returns:
        The schedule.

    Raises:
        ConfigError: a value is out of range, or the training has no end and the decay needs one.

    Example:
        >>> exponential_for(1000, warmup_steps=2500).warmup_steps, exponential_for(1000, 10).decay_steps
        (100, 1000)
    """
    if estimated_steps < 0:  # Lightning's way to say that nobody knows
        estimated_steps = math.inf
    if math.isfinite(estimated_steps):
        # A run of zero batches (Trainer(limit_train_batches=0)) still asks for its optimizers.
        estimated_steps = max(1, int(estimated_steps))
        if warmup_steps >= estimated_steps:
            warmup_steps = int(estimated_steps) // 10
    elif decay_steps is None and rate != 1:
        raise ConfigError(
            "Expected a training with an end, or argument `decay_steps`, for a rate that decays, but got neither. Give "
            "the Trainer `max_steps` or `max_epochs`, set `decay_steps`, or use decay_rate=1."
        )
    return WarmupExponential(warmup_steps, estimated_steps if decay_steps is None else decay_steps, rate)
