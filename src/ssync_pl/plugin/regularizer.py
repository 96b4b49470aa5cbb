"""`SSyncRegularizer`: SSync for authors of LightningModules, who hand the maps over themselves."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ssync_pl.adapters.checks import check_first
from ssync_pl.errors import SSyncError, require
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.plugin.engine import SSyncEngine, handle_verdict, tell_end
from ssync_pl.plugin.schedule import Phase
from ssync_pl.plugin.wrapped_step import LogSteps

_CHECKPOINT_KEY = "ssync_regularizer"


class SSyncRegularizer:
    """Mixin that gives a LightningModule one method: ``self.ssync(loss, maps)``.

    Schedule, weights, logs and collapse guard are those of `SSyncCallback`. The settings are saved among the module's
    hyper-parameters as ``ssync``.

    Args:
        *args: Passed on to the next class.
        ssync: The settings; a dict of them works too, as it comes from a file. None takes the published ones.
        **kwargs: Passed on to the next class.

    Examples:
        >>> import lightning.pytorch as L
        >>> class MyModel(SSyncRegularizer, L.LightningModule):
        ...     def __init__(self, ssync=None):
        ...         super().__init__(ssync=ssync)
        ...     def training_step(self, batch, batch_idx):
        ...         loss, dots, alpha = self.forward(batch)
        ...         return self.ssync(loss, SSyncMaps(attention_logits=dots, mask_logits=alpha, grid=(24, 24)))
        >>> MyModel(ssync={"merge_threshold": 0.6}).hparams.ssync["merge_threshold"]
        0.6
    """

    def __init__(self, *args: Any, ssync: SSyncConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ssync = {} if ssync is None else ssync
        known = isinstance(ssync, (SSyncConfig, Mapping))
        require(known, "argument `ssync` to be an SSyncConfig or a dict", repr(ssync))
        self.ssync_config = ssync if isinstance(ssync, SSyncConfig) else SSyncConfig.from_options(**ssync)
        self._ssync_engine = SSyncEngine(self.ssync_config)
        self._ssync_log_steps = LogSteps()
        self._ssync_checked = False
        save: Callable[..., None] = self.save_hyperparameters  # type: ignore[attr-defined]
        save({"ssync": asdict(self.ssync_config)})

    def ssync(self, loss: Tensor, maps: SSyncMaps | Callable[[], SSyncMaps]) -> Tensor:
        """Adds what this step calls for to the loss, and logs it; call it in ``training_step``.

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
        """
        trainer = getattr(self, "_trainer", None)
        if trainer is None:
            raise SSyncError(
                f"Expected {type(self).__name__} to run in a Trainer, but it is in none. "
                "In a loop of your own use ssync_loss(maps)."
            )
        if not trainer.training:
            return loss
        engine = self._ssync_engine
        phase = engine.phase_in(trainer)
        if phase is Phase.OFF and self._ssync_checked:
            return loss
        maps = maps if isinstance(maps, SSyncMaps) else maps()
        if not self._ssync_checked:
            # Also during the warm-up: maps that cannot be used are refused in the first step.
            weights = self.ssync_config.boundary_weight, self.ssync_config.interior_weight
            check_first(maps, type(self).__name__, *weights)
            self._ssync_checked = True
        due = phase is Phase.ON and self._ssync_log_steps.due(trainer)
        log = functools.partial(self.log, batch_size=maps.shape[0]) if due else None  # type: ignore[attr-defined]
        term, verdict = engine.term(loss, maps, trainer.global_step, log)
        handle_verdict(verdict, trainer)
        return loss if term is None else loss + term

    def setup(self, stage: str) -> None:
        """Forgets an earlier training; a checkpoint is loaded after this."""
        super().setup(stage)  # type: ignore[misc]
        # One that goes on in the same Trainer keeps its state.
        if stage == "fit" and self.trainer.global_step == 0:  # type: ignore[attr-defined]
            self._ssync_engine = SSyncEngine(self.ssync_config)
            self._ssync_log_steps = LogSteps()
            self._ssync_checked = False

    def on_train_end(self) -> None:
        """Says from which step SSync ran, or why it never did."""
        super().on_train_end()  # type: ignore[misc]
        tell_end(self._ssync_engine, self.trainer.global_step)  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps running averages and the guard's state."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint[_CHECKPOINT_KEY] = self._ssync_engine.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continues from a saved state, where there is one."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if _CHECKPOINT_KEY in checkpoint:
            self._ssync_engine.load_state_dict(checkpoint[_CHECKPOINT_KEY])
