"""Warm-ups that runs have in common, trained once.

Until SSync switches on, a run with it is the run without it, to the bit. The run without SSync therefore keeps a
checkpoint from just before the switch, and the runs with SSync start there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from ssync_pl.compare.configs import callback_name, callbacks_of, class_of, merge
from ssync_pl.compare.variants import Variant, ssync_defaults, ssync_options
from ssync_pl.plugin.schedule import steps_of

__all__ = ["KeepCheckpoints", "Share", "Switch", "plan_sharing"]

# Words for `ssync-pl fit` that may change callbacks or data in ways that are not looked into here.
_UNSURE = ("-c", "--config", "--trainer", "--ckpt_path", "--data", "--data.class_path", "--data.init_args.backend")
# A shared checkpoint may be taken this much earlier than needed, because a validation follows some steps.
_EARLIER_STEPS = 8


@dataclass(frozen=True)
class Switch:
    """When a run begins to differ from the one without SSync: `watch` steps before its warm-up ends."""

    ratio: float
    steps: int | None
    watch: int

    @property
    def name(self) -> str:
        """Name of the checkpoint, without its suffix."""
        return f"warmup_{f'{self.ratio:g}' if self.steps is None else f'{self.steps}_steps'}_{self.watch}"


@dataclass(frozen=True)
class Share:
    """What a variant shares: the variant it starts from and when, and the switches it keeps a checkpoint for."""

    source: str | None = None
    switch: Switch | None = None
    keeps: tuple[Switch, ...] = ()


def plan_sharing(variants: Sequence[Variant], config: Mapping[str, Any], extra: Sequence[str] = ()) -> dict[str, Share]:
    """Finds the variants that are the same training until SSync switches on.

    Nothing is shared where `extra` may change callbacks, nor where the data cannot resume exactly in the middle of an
    epoch. Variants without SSync also keep the checkpoint that the configuration itself would start from, so that a
    comparison that grows finds it.

    Args:
        variants: the variants.
        config: the configuration that they are laid over.
        extra: words for `ssync-pl fit`.

    Returns:
        What each variant shares, by name.
    """
    unsure = any("callbacks" in word or word.split("=")[0] in _UNSURE for word in extra)
    if unsure or not _resumes_exactly(config):
        return {variant.name: Share() for variant in variants}
    merged = {variant.name: merge(config, variant.overlay) for variant in variants}
    trunks = {name: _without_ssync(one) for name, one in merged.items()}
    switches = {name: _switch(one) for name, one in merged.items()}
    sources: dict[str, str] = {}
    for name, one in merged.items():
        if not ssync_options(one):
            sources.setdefault(trunks[name], name)
    plan = {}
    for name, trunk in trunks.items():
        source = sources.get(trunk)
        if source == name:
            own = _switch(config) if _without_ssync(config) == trunk else None
            found = [own, *(switches[other] for other in trunks if trunks[other] == trunk)]
            plan[name] = Share(keeps=tuple(dict.fromkeys(one for one in found if one is not None)))
        else:
            plan[name] = Share(source, switches[name]) if source and switches[name] else Share()
    return plan


def _resumes_exactly(config: Mapping[str, Any]) -> bool:
    data, options = class_of(config, "data")
    mapped = options.get("backend") != "webdataset" and "://" not in json.dumps(options, default=str)
    return data in ("SyntheticDataModule", "ShardDataModule") and mapped


def _switch(config: Mapping[str, Any]) -> Switch | None:
    callbacks = ssync_options(config)
    if len(callbacks) != 1:
        return None
    options = {**ssync_defaults(), **callbacks[0]}
    ratio, steps, watch = options["warmup_ratio"], options["warmup_steps"], options["guard_window"]
    if not isinstance(ratio, int | float) or not isinstance(watch, int) or not isinstance(steps, int | None):
        return None
    return Switch(float(ratio), steps, watch) if (steps or (steps is None and ratio > 0)) else None


def _without_ssync(config: Mapping[str, Any]) -> str:
    trainer = dict(config.get("trainer") or {})
    trainer["callbacks"] = [one for one in callbacks_of(config) if callback_name(one) != "SSyncCallback"]
    return json.dumps({**config, "trainer": trainer}, sort_keys=True, default=str)


class KeepCheckpoints(Checkpoint):
    """Saves `last.ckpt` at the end of the training, and one checkpoint for each switch that other runs start from.

    Such a checkpoint is taken after the last step before the switch that no validation follows, since a run that starts
    from it would skip that validation. The training ends when the process that started it is gone.

    Args:
        folder: folder of the checkpoints.
        switches: for each switch its `ratio`, `steps`, `watch` and `name`.
    """

    def __init__(self, folder: str, switches: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.switches = tuple(switches)
        self.last_model_path = ""
        self._latest: dict[str, int] = {}
        self._parent = os.getppid()

    @staticmethod
    def settings(folder: Path, switches: Sequence[Switch]) -> dict[str, Any]:
        """Returns the arguments as values of YAML."""
        return {"folder": str(folder), "switches": [{**asdict(switch), "name": switch.name} for switch in switches]}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        latest = {one["name"]: steps_of(one["ratio"], one["steps"], total) - one["watch"] for one in self.switches}
        self._latest = {name: step for name, step in latest.items() if step > 0}

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if os.getppid() != self._parent:
            raise SystemExit("The process that started this training is gone.")

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # no checkpoint holds gradients that are being gathered
        step = trainer.global_step
        due = [name for name, latest in self._latest.items() if latest - _EARLIER_STEPS < step <= latest]
        if due and not _validation_may_follow(trainer, batch_idx):
            for name in due:
                trainer.save_checkpoint(self.folder / f"{name}.ckpt")
                del self._latest[name]

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last_model_path = str(self.folder / "last.ckpt")
        trainer.save_checkpoint(self.last_model_path)


def _validation_may_follow(trainer: L.Trainer, batch_idx: int) -> bool:
    if trainer.is_last_batch or trainer.global_step >= trainer.estimated_stepping_batches:
        return True
    interval = trainer.val_check_batch
    if not isinstance(interval, int) or interval < 1:
        return False
    whole = trainer.check_val_every_n_epoch is None
    return ((trainer.fit_loop.total_batch_idx if whole else batch_idx) + 1) % interval == 0
