"""Learning-rate schedule: linear warm-up, then decay to the end of training."""

from __future__ import annotations

import math
from typing import Literal

from ssync_pl.errors import ConfigError

__all__ = ["WarmupDecay", "schedule_for"]


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
