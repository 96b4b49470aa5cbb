"""Trainer, optimizer and callbacks of public configurations."""

from __future__ import annotations

import inspect
from typing import Any

from ssync_pl.tools.official.sections import Section

__all__ = ["published_ssync", "translate_optimizer", "translate_trainer"]

_THRESHOLDS = {"movi_c": 0.7, "movi_e": 0.65, "ytvis": 0.6, "coco": 0.9}
# Set by the official script itself, whatever the file says
_OWN = ("max_epochs", "check_val_every_n_epoch")
_REMOVED = {
    "find_unused_parameters": "name a strategy, for example ddp_find_unused_parameters_true",
    "replace_sampler_ddp": "the data module shares out videos itself",
}


def translate_trainer(trainer: Section, half_precision: bool) -> dict[str, Any]:
    """Translate the trainer section, with the official script's own defaults.

    Args:
        trainer: The section.
        half_precision: Whether the script of this code base trains in mixed half precision, whatever the file says.

    Returns:
        Arguments of Lightning's Trainer.

    Raises:
        ConfigError: A number is none.

    Example:
        >>> from ssync_pl.tools.official.sections import Findings
        >>> section = Section({"max_steps": 7, "gradient_clip_val": 0.05}, "trainer", Findings())
        >>> translate_trainer(section, False)["val_check_interval"]
        5000
    """
    options: dict[str, Any] = {
        "max_steps": trainer.integer("max_steps", 100_000),
        "max_epochs": -1,
        "val_check_interval": trainer.take("val_check_interval", 5_000),
        "check_val_every_n_epoch": None,
        "log_every_n_steps": trainer.integer("log_every_n_steps", 100),
    }
    trainer.leave("training ends by steps, as in the official script", *_OWN)
    for name, advice in _REMOVED.items():
        trainer.leave(advice, name)
    if half_precision and trainer.values.get("precision") is None:
        options["precision"] = "16-mixed"
    import lightning.pytorch as L

    known = inspect.signature(L.Trainer.__init__).parameters
    for name in trainer.values:
        if name in known and name not in options and name not in _OWN:
            options[name] = trainer.take(name, None)
    return options


def translate_optimizer(optimizer: Section, max_steps: int) -> dict[str, Any]:
    """Translate the optimizer section.

    Args:
        optimizer: The section.
        max_steps: Optimizer steps of the training.

    Returns:
        Arguments of a host: learning rate, warm-up and decay.

    Raises:
        ConfigError: Another optimizer or schedule, or groups of parameters.

    Example:
        >>> from ssync_pl.tools.official.sections import Findings
        >>> translate_optimizer(Section({"name": "Adam", "lr": 4e-4}, "optimizer", Findings()), 1000)
        {'learning_rate': 0.0004, 'warmup_steps': 0, 'decay_rate': 1.0}
    """
    optimizer.need("name", "Adam", "adam", why="Hosts of this package train with Adam.")
    options: dict[str, Any] = {"learning_rate": optimizer.number("lr")}
    why = "Hosts of this package have one learning rate."
    optimizer.need("param_groups", None, default=None, why=why)
    schedule = optimizer.section("lr_scheduler")
    if not schedule.present:
        return {**options, "warmup_steps": 0, "decay_rate": 1.0}
    schedule.need("name", "exp_decay_with_warmup", why="Hosts of this family warm up and decay exponentially.")
    options["warmup_steps"] = schedule.integer("warmup_steps", 1_000)
    steps = schedule.integer("decay_steps", 100_000)
    # Tied to the length of the training in the public files, so that it follows when a user changes that.
    options["decay_steps"] = None if steps == max_steps else steps
    options["decay_rate"] = schedule.number("decay_rate", 0.5)
    return options


def published_ssync(experiment: str) -> dict[str, Any] | None:
    """Settings of SSync that were published for a data set.

    Args:
        experiment: Name of the experiment or of the shards, for example `movi_e`.

    Returns:
        Arguments of `SSyncCallback`; `None` for a set that was not published on.

    Example:
        >>> published_ssync("2gpu_movi_e")
        {'merge_threshold': 0.65, 'warmup_ratio': 0.3}
        >>> published_ssync("mine") is None
        True
    """
    found = (value for name, value in _THRESHOLDS.items() if name in experiment.lower())
    threshold = next(found, None)
    return None if threshold is None else {"merge_threshold": threshold, "warmup_ratio": 0.3}
