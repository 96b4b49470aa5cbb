"""The regulariser in a training step; one implementation for the callback and the mixin."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ssync_pl.errors import ConfigError, HostError, SSyncError
from ssync_pl.method.loss import SSyncOutput, mean_over_ranks, ssync_loss
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.plugin.guard import CollapseGuard, GuardVerdict
from ssync_pl.plugin.maturity import Maturity, watched
from ssync_pl.plugin.schedule import Phase, Schedule

__all__ = ["LogFunction", "SSyncEngine", "check_first", "heed", "tell_never_started"]

_RUNNING_DECAY = 0.98
# Of the Brier score: below this, relative weights stop growing while the term goes to zero.
_RELATIVE_FLOOR = 1e-2


class LogFunction(Protocol):
    """Writes one number of a training step to the host's log.

    Example:
        >>> def log(name: str, value: Tensor | float, *, prog_bar: bool = False) -> None: ...
    """

    def __call__(self, name: str, value: Tensor | float, *, prog_bar: bool = False) -> None:
        """Write one number.

        Args:
            name: Such as ``ssync/boundary_loss``.
            value: 0-dim tensor or number.
            prog_bar: Also show it in the progress bar.
        """


class SSyncEngine:
    """Schedule, losses, weights, logs and guard of one training run.

    Args:
        config: The settings.

    Example:
        >>> engine = SSyncEngine(SSyncConfig(warmup_steps=0))
        >>> engine.start(total_steps=10)
        >>> d = torch.randn(1, 1, 2, 4, requires_grad=True)
        >>> maps = SSyncMaps(attention_logits=d, mask_logits=d, grid=(2, 2))
        >>> total, verdict = engine.apply(torch.tensor(1.0), maps, step=0)
        >>> bool(total >= 1.0), verdict
        (True, None)
    """

    def __init__(self, config: SSyncConfig) -> None:
        self.config = config
        self.guard = CollapseGuard(config.on_collapse, config.collapse_threshold, config.guard_window)
        self.maturity = Maturity(config.mature_agreement, config.guard_window) if config.start == "mature" else None
        self.schedule: Schedule | None = None
        self._host_average: Tensor | None = None
        self._term_average: Tensor | None = None

    def start(self, total_steps: float) -> None:
        """Fix the warm-up for a training of this length.

        Args:
            total_steps: Optimizer steps of the whole training; infinity when unknown.

        Raises:
            ConfigError: The warm-up is a share of an unknown length.

        Example:
            >>> engine = SSyncEngine(SSyncConfig())
            >>> engine.start(100)
            >>> engine.schedule.start
            30
        """
        self.schedule = Schedule.resolve(self.config, total_steps)

    def start_in(self, trainer: Any) -> None:
        """Fix the warm-up for the length of a Trainer's training.

        Args:
            trainer: A Lightning Trainer; its length is asked for only when the warm-up is a share of it.

        Raises:
            ConfigError: The warm-up is a share of an unknown length.

        Example:
            >>> engine = SSyncEngine(SSyncConfig(warmup_steps=5))
            >>> engine.start_in(trainer=None)
            >>> engine.schedule.start
            5
        """
        known = self.config.warmup_steps is not None or self.config.warmup_ratio == 0.0
        steps = 0 if known else trainer.estimated_stepping_batches
        self.start(steps if steps >= 0 else math.inf)  # Lightning gives -1 for a length that nobody knows

    def phase(self, step: int) -> Phase:
        """What the training step has to do.

        Args:
            step: Optimizer steps taken so far.

        Returns:
            The phase.

        Raises:
            SSyncError: `start` was not called.

        Example:
            >>> engine = SSyncEngine(SSyncConfig(guard_window=10))
            >>> engine.start(100)
            >>> engine.phase(0)
            <Phase.OFF: 'off'>
        """
        if self.schedule is None:
            raise SSyncError("Expected `start(total_steps)` to be called before the first step, but it was not.")
        phase = self.schedule.phase(step)
        if phase is not Phase.ON or self.maturity is None:
            return phase
        opened = self.maturity.opened
        return Phase.ON if opened is not None and step >= opened else Phase.WAIT

    def watch(self, maps: SSyncMaps, step: int = 0, log: LogFunction | None = None) -> None:
        """Count slots in use near the end of the warm-up, and look whether the host is mature.

        Args:
            maps: The host's maps.
            step: Optimizer steps taken so far.
            log: Receives the numbers of the step.

        Example:
            >>> d = torch.zeros(1, 1, 2, 4)
            >>> SSyncEngine(SSyncConfig()).watch(SSyncMaps(attention_logits=d, mask_logits=d, grid=(2, 2)))
        """
        values = watched(maps)
        self.guard.watch(values[1:], _existing_slots(maps))
        if log is not None:
            log("ssync/agreement", values[0])
            log("ssync/used_encoder_slots", values[1])
            log("ssync/used_slots", values[2])
            log("ssync/weight", 0.0)
        waiting = self.maturity is not None and self.maturity.opened is None
        if waiting and self.maturity.add(values, step) is False:  # type: ignore[union-attr]
            self.guard.forget()

    def apply(
        self,
        host_loss: Tensor,
        maps: SSyncMaps | Callable[[], SSyncMaps],
        step: int,
        log: LogFunction | None = None,
    ) -> tuple[Tensor, GuardVerdict | None]:
        """Add what this step calls for to the host's loss.

        Args:
            host_loss: 0-dim loss of the host.
            maps: The host's maps, or a function that makes them; it is not called while SSync is off.
            step: Optimizer steps taken so far.
            log: Receives the numbers of the step.

        Returns:
            The loss to train on, and the guard's verdict where a window ended.

        Example:
            >>> engine = SSyncEngine(SSyncConfig(guard_window=10))
            >>> engine.start(100)
            >>> loss = torch.tensor(1.0)
            >>> engine.apply(loss, lambda: 1 / 0, step=0)[0] is loss
            True
        """
        term, verdict = self.term(host_loss, maps, step, log)
        return (host_loss if term is None else host_loss + term), verdict

    def term(
        self,
        host_loss: Tensor | None,
        maps: SSyncMaps | Callable[[], SSyncMaps],
        step: int,
        log: LogFunction | None = None,
    ) -> tuple[Tensor | None, GuardVerdict | None]:
        """What this step calls for, weighted, by itself.

        Args:
            host_loss: 0-dim loss of the host; only ``relative_weight`` needs it.
            maps: The host's maps, or a function that makes them; it is not called while SSync is off.
            step: Optimizer steps taken so far.
            log: Receives the numbers of the step.

        Returns:
            A 0-dim loss, None while SSync is off, and the guard's verdict where a window ended.

        Raises:
            ConfigError: The weight is relative to the host's loss, which is not given.

        Example:
            >>> engine = SSyncEngine(SSyncConfig(guard_window=10))
            >>> engine.start(100)
            >>> engine.term(None, lambda: 1 / 0, step=0)
            (None, None)
        """
        phase = self.phase(step)
        if phase is Phase.OFF:
            return None, None
        if not isinstance(maps, SSyncMaps):
            maps = maps()
        if phase is not Phase.ON:
            self.watch(maps, step, log if phase is Phase.WAIT else None)
            return None, None
        output = ssync_loss(maps, **self.config.loss_options())
        weight = self._weight(host_loss, output.loss, step)
        used = torch.stack([output.used_encoder_slots.mean(), output.used_decoder_slots.mean()])
        if log is not None:
            _write(log, output, used, weight)
        return weight * output.loss, self.guard.step(used, _existing_slots(maps))

    def _weight(self, host_loss: Tensor | None, term: Tensor, step: int) -> Tensor | float:
        factor = self._ramp(step) * self.guard.factor
        share = self.config.relative_weight
        if share is None:
            return factor
        if host_loss is None:
            raise ConfigError("Expected the host's loss beside `relative_weight`, but got None. Pass it along.")
        # Each rank's own averages would weight ranks differently, and undo sync_counts.
        now = mean_over_ranks(torch.stack([host_loss.detach().abs().float(), term.detach().float()]))
        self._host_average = _running(self._host_average, now[0])
        self._term_average = _running(self._term_average, now[1])
        floor = _RELATIVE_FLOOR * (self.config.boundary_weight + self.config.interior_weight) / 2
        return factor * share * self._host_average / self._term_average.clamp_min(max(floor, 1e-12))

    def _ramp(self, step: int) -> float:
        schedule: Schedule = self.schedule  # type: ignore[assignment]
        opened = None if self.maturity is None else self.maturity.opened
        return schedule.weight(step if opened is None else step - max(0, opened - schedule.start))

    def never_started(self, step: int) -> str:
        """What to tell the user at the end of a training in which SSync waited for the host in vain.

        Args:
            step: Optimizer steps taken.

        Returns:
            A message; empty where SSync was on, or is not due yet.

        Example:
            >>> engine = SSyncEngine(SSyncConfig(start="mature", warmup_steps=5))
            >>> engine.start(10)
            >>> engine.never_started(4), engine.never_started(10)[:30]
            ('', 'SSync was never switched on: t')
        """
        if self.schedule is None or step <= self.schedule.start:
            return ""
        if self.maturity is None or self.maturity.opened is not None:
            return ""
        latest = self.maturity.latest
        seen = "no window of `guard_window` steps has ended"
        if latest is not None:
            seen = f"encoder and decoder agree on {latest[0]:.0%} of the patches, {min(latest[1:]):.1f} slots in use"
        return (
            f"SSync was never switched on: the host is not mature ({seen}, `mature_agreement` "
            f"{self.maturity.threshold:.0%}). Train longer, lower `mature_agreement`, or use start='schedule'."
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs.

        Returns:
            Plain numbers.

        Example:
            >>> sorted(SSyncEngine(SSyncConfig()).state_dict())
            ['guard', 'host_average', 'term_average']
        """
        averages = {"host_average": self._host_average, "term_average": self._term_average}
        return {
            "guard": self.guard.state_dict(),
            **{name: None if value is None else float(value) for name, value in averages.items()},
            **({} if self.maturity is None else {"maturity": self.maturity.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state: What `state_dict` returned.

        Example:
            >>> engine = SSyncEngine(SSyncConfig())
            >>> engine.load_state_dict(SSyncEngine(SSyncConfig()).state_dict())
        """
        self.guard.load_state_dict(state["guard"])
        # A run without maturity may be taken up with it.
        if self.maturity is not None and state.get("maturity") is not None:
            self.maturity.load_state_dict(state["maturity"])
        host, term = state["host_average"], state["term_average"]
        self._host_average = None if host is None else torch.tensor(host)
        self._term_average = None if term is None else torch.tensor(term)


def check_first(maps: SSyncMaps, host: str, config: SSyncConfig) -> None:
    """Look at the first maps once: values, sums and gradients. This is the only place that waits for the device.

    Args:
        maps: Of the first training step.
        host: Name of the host, for messages.
        config: A side without weight needs no gradient.

    Raises:
        HostError: A map that is to be trained carries no gradient.
        ShapeError: A map holds NaN, or probabilities do not sum to 1.

    Example:
        >>> d = torch.zeros(1, 1, 2, 4)
        >>> check_first(SSyncMaps(attention_logits=d, mask_logits=d, grid=(2, 2)), "MyHost", SSyncConfig())
        Traceback (most recent call last):
            ...
        ssync_pl.errors.HostError: Expected the decoder masks of MyHost to carry gradient, but it does not. It was \
detached, computed under no_grad, or captured inside reentrant activation checkpointing (use \
checkpoint(..., use_reentrant=False)).
    """
    sides = (
        ("decoder masks", maps.masks, config.boundary_weight),
        ("slot attention", maps.attention, config.interior_weight),
    )
    if torch.is_grad_enabled():
        for name, value, weight in sides:
            if weight > 0 and not value.requires_grad:
                raise HostError(
                    f"Expected the {name} of {host} to carry gradient, but it does not. It was "
                    "detached, computed under no_grad, or captured inside reentrant activation checkpointing "
                    "(use checkpoint(..., use_reentrant=False))."
                )
    maps.check_values()


def heed(verdict: GuardVerdict | None, trainer: Any) -> None:
    """Tell the user what the guard found, and stop the training if it says so.

    Args:
        verdict: Of the guard; None while a window is open.
        trainer: A Lightning Trainer.

    Example:
        >>> heed(None, trainer=None)
    """
    if verdict is None:
        return
    if verdict.message and trainer.is_global_zero:
        warnings.warn(verdict.message, stacklevel=2)
    if verdict.stop:
        trainer.should_stop = True


def tell_never_started(engine: SSyncEngine, trainer: Any) -> None:
    """Warn at the end of a training in which SSync waited for the host in vain.

    Args:
        engine: Of the training.
        trainer: A Lightning Trainer.

    Example:
        >>> import types
        >>> tell_never_started(SSyncEngine(SSyncConfig()), types.SimpleNamespace(global_step=9, is_global_zero=True))
    """
    message = engine.never_started(trainer.global_step)
    if message and trainer.is_global_zero:
        warnings.warn(message, stacklevel=2)


def _existing_slots(maps: SSyncMaps) -> Tensor | float:
    """Mean number of slots that exist in a video; a plain number where all of them do."""
    return float(maps.shape[2]) if maps.slot_valid is None else maps.slot_valid.sum(1).float().mean()


def _running(average: Tensor | None, value: Tensor) -> Tensor:
    # A step with an overflow must not poison the average for good; NaN stands for no finite value so far.
    value = torch.where(value.isfinite(), value, torch.nan)
    if average is None:
        return value
    average = average.to(value.device)
    moved = average.lerp(value, 1 - _RUNNING_DECAY)
    return torch.where(average.isnan(), value, torch.where(value.isnan(), average, moved))


def _write(log: LogFunction, output: SSyncOutput, used: Tensor, weight: Tensor | float) -> None:
    log("ssync/boundary_loss", output.boundary_loss.detach(), prog_bar=True)
    log("ssync/interior_loss", output.interior_loss.detach(), prog_bar=True)
    log("ssync/boundary_fraction", output.boundary_fraction)
    log("ssync/interior_fraction", output.interior_fraction)
    log("ssync/overlap_fraction", output.overlap_fraction)
    log("ssync/merged_slots", output.merged_slots.float().mean())
    log("ssync/used_slots", used[1])
    log("ssync/used_encoder_slots", used[0])
    log("ssync/agreement", output.agreement)
    log("ssync/weight", weight)
