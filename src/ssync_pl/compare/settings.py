"""What every run of a comparison gets beside its variant: logger, callbacks, and another number of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssync_pl.compare.merging import callback_name, callbacks_of

__all__ = ["run_settings", "step_words"]

KEEPER = "ssync_pl.compare.keeping.KeepRun"
_VALIDATIONS = (4, 3, 5, 2)


def run_settings(
    folder: Path,
    config: Mapping[str, Any],
    recorder: str,
    keep_steps: int | None = None,
    switches: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Settings of a run that do not change its training.

    Args:
        folder: Folder of the run.
        config: The merged configuration with the variant.
        recorder: Class path of the callback that writes `evaluation.json`.
        keep_steps: Steps between checkpoints; None goes by the time alone.
        switches: When other runs go on from this one.

    Returns:
        A configuration to lay over, with `callbacks+`, which appends.

    Example:
        >>> settings = run_settings(Path("out"), {}, "a.Recorder")
        >>> [callback_name(callback) for callback in settings["trainer"]["callbacks+"]]
        ['ValidationSummary', 'Recorder', 'KeepRun']
    """
    callbacks: list[dict[str, Any]] = []
    if not any(callback_name(callback) == "ValidationSummary" for callback in callbacks_of(config)):
        callbacks.append({"class_path": "ssync_pl.tools.summary.ValidationSummary", "init_args": {"untrained": True}})
    callbacks.append({"class_path": recorder})
    keeps: dict[str, Any] = {"folder": str(folder)}
    if keep_steps is not None:
        keeps["every_n_steps"] = keep_steps
    if switches:
        keeps["switches"] = [dict(switch) for switch in switches]
    callbacks.append({"class_path": KEEPER, "init_args": keeps})
    # A version of "" puts metrics.csv into the folder itself.
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": ""}}
    return {"trainer": {"logger": logger, "enable_checkpointing": True, "callbacks+": callbacks}}


def step_words(steps: int | None, config: Mapping[str, Any]) -> list[str]:
    """Words that train for another number of steps, with a validation at the end.

    Args:
        steps: Optimizer steps; None changes nothing.
        config: The merged configuration.

    Returns:
        Words for `ssync-pl fit`.

    Example:
        >>> step_words(200, {})[-1]
        '--trainer.val_check_interval=50'
    """
    if steps is None:
        return []
    trainer = config.get("trainer") or {}
    # The interval counts batches, several of which make a step when gradients are accumulated.
    batches = steps * int(trainer.get("accumulate_grad_batches") or 1)
    parts = next((parts for parts in _VALIDATIONS if batches % parts == 0), 1)
    return [
        f"--trainer.max_steps={steps}",
        "--trainer.max_epochs=-1",
        "--trainer.check_val_every_n_epoch=null",
        f"--trainer.val_check_interval={batches // parts}",
    ]
