"""`SSyncRegularizer`: SSync for authors of LightningModules, who hand the maps over themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor

from ssync_pl.errors import ConfigError, SSyncError
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.plugin.engine import SSyncEngine, check_first, heed, tell_never_started
from ssync_pl.plugin.schedule import Phase
from ssync_pl.plugin.wrapped_step import LogSteps

__all__ = ["SSyncRegularizer"]

_CHECKPOINT_KEY = "ssync_regularizer"


class SSyncRegularizer:
    """Mixin that gives a LightningModule one method: ``self.ssync(loss, maps)``.

    Schedule, weights, logs and collapse guard are those of `SSyncCallback`. The settings are saved among the module's
    hyper-parameters as ``ssync``.

    Args:
        *args: Passed on to the next class.
        ssync: The settings; a dict of them works too, as it comes from a file. None takes the published ones.
        **kwargs: Passed on to the next class.

    Example:
        >>> import lightning.pytorch as L
        >>> class MyModel(SSyncRegularizer, L.LightningModule):
        ...     def __init__(self, ssync=None):
        ...         super().__init__(ssync=ssync)
        ...     def training_step(self, batch, batch_idx):
        ...         loss, dots, alpha = self.forward(batch)
        ...         return self.ssync(loss, SSyncMaps(attention_logits=dots, mask_logits=alpha, grid=(24, 24)))
        >>> MyModel(ssync={"merge_threshold": 0.6}).hparams.ssync["merge_threshold"]
        0.6

    Source: SSync (arXiv 2606.15527).
    """

    def __init__(self, *args: Any, ssync: SSyncConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(ssync, SSyncConfig):
            known = [field.name for field in fields(SSyncConfig)]
            unknown = sorted(set(ssync or {}) - set(known))
            if unknown:
                raise ConfigError(f"Expected settings among {', '.join(known)}, but got {', '.join(unknown)}.")
            ssync = SSyncConfig(**(ssync or {}))
        self.ssync_config = ssync
        self._ssync_engine = SSyncEngine(ssync)
        self._ssync_log_steps = LogSteps()
        self._ssync_checked = False
        save: Callable[..., None] = self.save_hyperparameters  # type: ignore[attr-defined]
        save({"ssync": asdict(ssync)})

    def ssync(self, loss: Tensor, maps: SSyncMaps | Callable[[], SSyncMaps]) -> Tensor:
        """Add what this step calls for to the loss, and log it; call it in ``training_step``.

        Args:
            loss: 0-dim loss of the host.
            maps: The maps of this step, or a function that makes them; while SSync is off it is called
                in the first step only, to check them.

        Returns:
            The loss to train on; the given one during the warm-up and outside of training.

        Raises:
            SSyncError: The module is in no Trainer.
            HostError: In the first step: a map carries no gradient.
            ShapeError: In the first step: a map holds NaN, or probabilities do not sum to 1.

        Example:
            >>> import lightning.pytorch as L
            >>> class MyModel(SSyncRegularizer, L.LightningModule): ...
            >>> MyModel().ssync(None, None)
            Traceback (most recent call last):
                ...
            ssync_pl.errors.SSyncError: Expected MyModel to run in a Trainer, but it is in none. In a loop of your own \
use ssync_loss(maps).
        """
        trainer = getattr(self, "_trainer", None)
        if trainer is None:
            raise SSyncError(
                f"Expected {type(self).__name__} to run in a Trainer, but it is in none. "
                "In a loop of your own use ssync_loss(maps)."
            )
        if not trainer.training:
            return loss
        if self._ssync_engine.schedule is None:
            self._ssync_engine.start_in(trainer)
        if not self._ssync_checked:
            # Also during the warm-up: maps that cannot be used are refused in the first step.
            maps = maps if isinstance(maps, SSyncMaps) else maps()
            check_first(maps, type(self).__name__, self.ssync_config)
            self._ssync_checked = True
        counts = self._ssync_engine.phase(trainer.global_step) in (Phase.ON, Phase.WAIT)
        log = self._log_ssync if counts and self._ssync_log_steps.due(trainer) else None
        total, verdict = self._ssync_engine.apply(loss, maps, trainer.global_step, log)
        heed(verdict, trainer)
        return total

    def setup(self, stage: str) -> None:
        """Forget what the guard saw in an earlier training; a checkpoint is loaded after this.

        Args:
            stage: Only ``"fit"`` does anything.
        """
        super().setup(stage)  # type: ignore[misc]
        if stage == "fit":
            self._ssync_engine = SSyncEngine(self.ssync_config)
            self._ssync_log_steps = LogSteps()
            self._ssync_checked = False

    def on_fit_start(self) -> None:
        """Forget the length of an earlier training, so that the warm-up follows this one."""
        super().on_fit_start()  # type: ignore[misc]
        self._ssync_engine.schedule = None

    def on_train_end(self) -> None:
        """Say so where the host never became mature."""
        super().on_train_end()  # type: ignore[misc]
        tell_never_started(self._ssync_engine, self.trainer)  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep running averages and the guard's state.

        Args:
            checkpoint: Written to.
        """
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint[_CHECKPOINT_KEY] = self._ssync_engine.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue from a saved state, where there is one.

        Args:
            checkpoint: Read from.
        """
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if _CHECKPOINT_KEY in checkpoint:
            self._ssync_engine.load_state_dict(checkpoint[_CHECKPOINT_KEY])

    def _log_ssync(self, name: str, value: Tensor | float, *, prog_bar: bool = False) -> None:
        log: Callable[..., None] = self.log  # type: ignore[attr-defined]
        log(name, value, prog_bar=prog_bar)
