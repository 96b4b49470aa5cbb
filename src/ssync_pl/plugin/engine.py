"""SSync in a training step: schedule, losses, weights, logs and guard, for the callback, the mixin and `attach`."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssync_pl.adapters.checks import kappa
from ssync_pl.adapters.gradients import GradientMeter, running_average
from ssync_pl.errors import ConfigError, require
from ssync_pl.method.loss import SSyncOutput, describe_backend, mean_over_ranks, ssync_loss
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.plugin.guard import CollapseGuard, GuardVerdict, existing_slots, used_slots
from ssync_pl.plugin.schedule import Phase, Schedule, training_length

# Below Lightning's own logger: it shows INFO in a Trainer, and users silence both at once.
_LOG = logging.getLogger("lightning.pytorch.ssync_pl")

LogFunction = Callable[..., None]
"""Writes one number of a training step: called as ``log(name, value, prog_bar=...)``."""

# Of the Brier score: below this, relative weights stop growing while the term goes to zero.
_RELATIVE_FLOOR = 1e-2
# Before the first gradients are measured.
_FIRST_WEIGHT = 1e-5
# Slots in use on average, below which a map is nearly one slot for everything.
_LEAST_SLOTS = 1.5
# Share of the host's loss that is added where gradients cannot be compared.
_INSTEAD = 0.05


class SSyncEngine:
    """Schedule, losses, weights and guard of one training."""

    def __init__(self, config: SSyncConfig) -> None:
        self.config = config
        guard: Any = (config.on_collapse, config.collapse_threshold, config.guard_window)  # no longer None
        self.guard = CollapseGuard(*guard)
        self.schedule: Schedule | None = None
        self.first_step: int | None = None  # at which SSync was first added to the loss
        self._told = self._looked = False
        self._relative = config.relative_weight
        self._epoch: int | None = None
        self._host_average: Tensor | None = None
        self._term_average: Tensor | None = None
        self._agreement: Tensor | None = None
        self._agreeing: bool | None = None
        self._meter = None if config.gradient_share is None else GradientMeter()

    def start(self, total_steps: float) -> None:
        """Fixes the warm-up for a training of this many optimizer steps, infinity when unknown."""
        self.schedule = Schedule.resolve(self.config, total_steps)
        self._stay_on()

    def phase_in(self, trainer: Any) -> Phase:
        """Returns what a Trainer's training step has to do; each epoch asks for the length again, which may change."""
        if self.schedule is None or (self.first_step is None and trainer.current_epoch != self._epoch):
            known = self.config.warmup_steps is not None or self.config.warmup_ratio == 0.0
            self.start(0 if known else training_length(trainer))
        self._epoch = trainer.current_epoch
        return self.phase(trainer.global_step)

    def phase(self, step: int) -> Phase:
        """Returns what the training step after ``step`` optimizer steps has to do."""
        return self.schedule.phase(step)  # type: ignore[union-attr]

    def term(
        self, host_loss: Tensor | None, maps: SSyncMaps, step: int, log: LogFunction | None = None
    ) -> tuple[Tensor | None, GuardVerdict | None]:
        """Computes what is added to the host's loss, a weighted 0-dim tensor, None while SSync is off.

        ``host_loss`` is needed for relative weights; ``log`` receives numbers; a verdict comes where a window ended.
        """
        phase = self.phase(step)
        if phase is Phase.WATCH:
            self.guard.watch(used_slots(maps), existing_slots(maps))
        if phase is not Phase.ON:
            return None, None
        meter = self._meter
        maps = maps if meter is None else meter.branch(maps)
        output = ssync_loss(maps, **self.config.loss_options())
        used = torch.stack([output.used_encoder_slots.mean(), output.used_decoder_slots.mean()])
        if not self._agree(output, maps, step):
            self.guard.watch(used, existing_slots(maps))
            if log is not None:
                _write(log, output, used, 0.0, self._agreement)
            return None, None
        if self.first_step is None:
            self.first_step = step
        if not self._told:
            self._told = True
            options = {name: getattr(self.config, name) for name in ("temperature", "loss", "backend", "merge_by")}
            backend = describe_backend(maps, **options)
            slots, agreed = torch.stack([output.used_decoder_slots.mean(), 100 * output.agreement]).tolist()
            text = "%.1f of %d slots in use, both maps agree on %.0f %% of the patches. Backend '%s': %s."
            _tell(f"SSync is on from optimizer step {step}: {text}", slots, maps.shape[2], agreed, *backend)
        factor = self.schedule.weight(step) * self.guard.factor  # type: ignore[union-attr]
        if meter is None:
            weight = self._weight(host_loss, output.loss, factor)
            term = weight * output.loss
        else:
            weights = self._gradient_weights(meter.ratio, host_loss, output, factor)
            # One slot for everything is a fixed point, towards which nothing may push.
            interior, weight = weights = weights * (used.min() >= _LEAST_SLOTS)
            term = interior * output.interior_loss + weight * output.boundary_loss
            meter.listen(term, weights)
        if log is not None:
            _write(log, output, used, weight, self._agreement)
            if meter is not None:
                log("ssync/interior_weight", interior)
            if host_loss is not None:  # what the host logs as its loss leaves SSync out
                log("ssync/total_loss", (host_loss + term).detach())
        verdict = self.guard.step(used, existing_slots(maps))
        if verdict is not None and meter is not None and not self._looked:
            self._look_for_gradients(meter, host_loss)
        return term, verdict

    def summary(self, step: int) -> str:
        """Returns a sentence on when SSync ran, or why it never did, in a training that ends after ``step`` steps."""
        if self.first_step is not None:
            text = f"SSync ran from optimizer step {self.first_step} to the end at step {step}."
            return text if self._agreeing is not False else f"{text} It added nothing in the end: {self._why()}."
        if self.schedule is None:
            return "SSync never ran: no training step came to it. An SSyncRegularizer must call self.ssync(loss, maps)."
        if step <= self.schedule.start:
            setting = "warmup_ratio" if self.config.warmup_steps is None else "warmup_steps"
            return (
                f"SSync never ran: its warm-up lasts {self.schedule.start} optimizer steps "
                f"(`{setting}`={getattr(self.config, setting)}), and the training ended at step {step}. Train longer, "
                f"or lower `{setting}`."
            )
        if self._agreeing is False:
            return f"SSync never ran: {self._why()}."
        return "SSync never ran: no training step gave a loss after the warm-up."

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as plain numbers."""
        averages = {
            "host_average": self._host_average,
            "term_average": self._term_average,
            "agreement": self._agreement,
        }
        return {
            "guard": self.guard.state_dict(),
            "first_step": self.first_step,
            "gradients": self._meter and self._meter.state_dict(),
            "agreeing": self._agreeing,
            "relative": None if self.config.gradient_share is None else self._relative,
            **{name: None if value is None else float(value) for name, value in averages.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned; raises `ConfigError` for something else."""
        try:
            names = ("first_step", "agreement", "agreeing")  # which older checkpoints lack
            first, agreement, agreeing = (state.get(name) for name in names)
            first = None if first is None else int(first)
            agreeing = {None: None, False: False, True: True}[agreeing]
            averages = (state["host_average"], state["term_average"], agreement)
            host, term, agreement = (
                None if value is None else torch.tensor(float(value), dtype=torch.float32) for value in averages
            )
            relative = None if state.get("relative") is None else float(state["relative"])
            meter = None if self.config.gradient_share is None or relative is not None else GradientMeter()
            if state.get("gradients") is not None:
                (meter or GradientMeter()).load_state_dict(state["gradients"])
            self.guard.load_state_dict(state["guard"])
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RuntimeError) as error:
            text = f"Expected what `state_dict` of SSync returned, but got another ({error!r}). Load what was saved."
            raise ConfigError(text) from error
        self.first_step, self._host_average, self._term_average = first, host, term
        if self.config.least_agreement:
            self._agreement, self._agreeing = agreement, agreeing
        if self.config.gradient_share is not None:
            self._meter, self._relative, self._looked = meter, relative, False
        self._epoch = None  # a search for a learning rate asked for its own length
        self._stay_on()

    def _stay_on(self) -> None:
        # A share of a training that is made longer on resuming must not switch SSync off again.
        if self.schedule is None or self.first_step is None or self.first_step >= self.schedule.start:
            return
        if self.config.warmup_steps is None:
            self.schedule = replace(self.schedule, start=self.first_step)
        else:  # the longer warm-up was asked for
            self.first_step = None

    def _agree(self, output: SSyncOutput, maps: SSyncMaps, step: int) -> bool:
        """Whether the maps know the same slots; looked at once in a window, since that waits for the device."""
        if not self.config.least_agreement:
            return True
        labels = output.raw_encoder_labels.flatten(2), output.raw_decoder_labels.flatten(2)
        now = mean_over_ranks(kappa(*labels, maps.shape[2], maps.patch_valid))
        self._agreement = running_average(self._agreement, now)
        if self._agreeing is None or step % self.config.guard_window == 0:
            before, self._agreeing = self._agreeing is not False, float(self._agreement) >= self.config.least_agreement
            if before is not self._agreeing:
                done = "adds to the loss" if self._agreeing else "adds nothing"
                _tell(f"SSync {done} from optimizer step {step} on: {self._why()}.")
        return self._agreeing

    def _why(self) -> str:
        kappa_now, least = float(self._agreement), self.config.least_agreement  # type: ignore[arg-type]
        return f"kappa of the host's two maps is {kappa_now:.2f}, `least_agreement` {least}"

    def _weight(self, host_loss: Tensor | None, term: Tensor, factor: float) -> Tensor | float:
        if self._relative is None:
            return factor
        require(host_loss is not None, "the host's loss", None, advice="Call ssync.add(loss).")
        # Each rank's own averages would weight ranks differently, and undo sync_counts.
        now = torch.stack([host_loss.detach().abs().float(), term.detach().float()])  # type: ignore[union-attr]
        now = mean_over_ranks(now)
        self._host_average = running_average(self._host_average, now[0])
        self._term_average = running_average(self._term_average, now[1])
        floor = _RELATIVE_FLOOR * (self.config.boundary_weight + self.config.interior_weight) / 2
        return factor * self._relative * self._host_average / self._term_average.clamp_min(max(floor, 1e-12))

    def _gradient_weights(self, ratio: Tensor, host_loss: Tensor | None, output: SSyncOutput, factor: float) -> Tensor:
        """(2,) weights of the interior and the boundary loss, which have their gradients at attention and at masks."""
        weights = torch.where(ratio > 0, self.config.gradient_share * ratio, _FIRST_WEIGHT)  # type: ignore[operator]
        if host_loss is not None:  # SSync's part that comes back through earlier frames would count as the host's
            added = (output.boundary_loss + output.interior_loss).detach()
            weights = torch.minimum(weights, host_loss.detach().abs() / added.clamp_min(_RELATIVE_FLOOR))
        interior, boundary = factor * weights
        return torch.stack([interior * self.config.interior_weight, boundary * self.config.boundary_weight])

    def _look_for_gradients(self, meter: GradientMeter, host_loss: Tensor | None) -> None:
        """Turns to the losses where the host has no gradient at its maps; NaN is not known yet."""
        norms = meter.host_norms()
        self._looked = any(norm > 0 for norm in norms)
        if 0.0 in norms and not self._looked:
            text = "`gradient_share` finds no gradient of the host at its maps (are these compiled, or pooled?)"
            if host_loss is not None:
                text += f": SSync adds {_INSTEAD} of the host's loss instead"
                self._meter, self._relative = None, _INSTEAD
            if _is_first_rank():
                warnings.warn(f"{text}. Give `relative_weight` to choose a share yourself.", stacklevel=4)


def handle_verdict(verdict: GuardVerdict | None, trainer: Any) -> None:
    """Tells the user of a Trainer what the guard found, and stops the training if it says so."""
    if verdict is None:
        return
    if verdict.message and trainer.is_global_zero:
        warnings.warn(verdict.message, stacklevel=2)
    if verdict.stop:
        trainer.should_stop = True


def tell_end(engine: SSyncEngine, step: int) -> None:
    """Says at the end of a training from which step SSync ran, or warns that it never did."""
    if engine.first_step is not None:
        _tell(engine.summary(step))
    elif _is_first_rank():
        warnings.warn(engine.summary(step), stacklevel=2)


def _tell(message: str, *args: object) -> None:
    if _is_first_rank():
        _LOG.info(message, *args)


def _is_first_rank() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _write(
    log: LogFunction, output: SSyncOutput, used: Tensor, weight: Tensor | float, agreement: Tensor | None
) -> None:
    for name in ("boundary_loss", "interior_loss"):
        log(f"ssync/{name}", getattr(output, name).detach(), prog_bar=True)
    for name in ("boundary_fraction", "interior_fraction", "overlap_fraction", "agreement"):
        log(f"ssync/{name}", getattr(output, name))
    log("ssync/merged_slots", output.merged_slots.float().mean())
    log("ssync/used_slots", used[1])
    log("ssync/used_encoder_slots", used[0])
    log("ssync/weight", weight)
    if agreement is not None:
        log("ssync/kappa", agreement)
