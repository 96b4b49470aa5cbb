"""`ValidationSummary`: a table of the last validation beside what needs no learning."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from ssync_pl.errors import ConfigError, require
from ssync_pl.metrics.table import METRICS, metric_names
from ssync_pl.tools.baselines import score_baselines
from ssync_pl.tools.owned import write_owned_json
from ssync_pl.tools.pictures import SSyncPictures

__all__ = ["ValidationSummary", "format_table"]

Rows = dict[str, dict[str, float]]

_SCORED = ("this run", "untrained")
_ORDER = (*_SCORED, "grid", "k-means RGB", "k-means features")


class ValidationSummary(L.Callback):
    """Prints one table at the end of `fit`, `validate` or `test`, and writes it to `<log_dir>/summary.json`.

    Rows: this run (the last validation), optionally the host before training, a grid of rectangles, and k-means with
    as many parts as the host has slots, on RGB and, where the data has cached features, on these and the places of
    the patches. A score means something only beside these: slots that settle into stripes reach a fair FG-ARI as well.
    Below the table: where pictures and checkpoints are.

    Args:
        untrained: score the whole validation set before training as well. It takes the place of Lightning's sanity
            check, which leaves random states and training as they are; checkpoints hold the row for resumed runs.
        baselines: score the grid and k-means, which reads the validation set once more.
        num_slots: parts of the baselines. None: the host's hyperparameter `num_slots`; without one, no baselines.

    Raises:
        ConfigError: `num_slots` is below 1.
    """

    def __init__(self, untrained: bool = False, baselines: bool = True, num_slots: int | None = None) -> None:
        super().__init__()
        require(num_slots is None or num_slots >= 1, "argument `num_slots` to be at least 1", num_slots)
        self.untrained = untrained
        self.baselines = baselines
        self.num_slots = num_slots
        self.rows: Rows = {}
        self._sanity_steps: int | float | None = None
        self._step = 0

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.rows = {}
        if stage == "fit" and self.untrained and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._sanity_steps = trainer.num_sanity_val_steps
            trainer.num_sanity_val_steps = float("inf")

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._sanity_steps is not None:
            trainer.num_sanity_val_steps, self._sanity_steps = self._sanity_steps, None

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._keep(trainer, "this run", "val/")
        elif self.untrained:
            self._keep(trainer, "untrained", "val/")
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module, trainer.val_dataloaders, trainer.num_val_batches)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep(trainer, "this run", "test/")
        self._report(trainer, pl_module, trainer.test_dataloaders, trainer.num_test_batches)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            bar.teardown(trainer, pl_module, "fit")  # its live lines would be drawn over the table
        self._report(trainer, pl_module, trainer.val_dataloaders, trainer.num_val_batches)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rows": {name: self.rows[name] for name in _SCORED if name in self.rows}, "step": self._step}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.update({name: dict(scores) for name, scores in state["rows"].items() if name in _SCORED})
        self._step = int(state["step"])

    def _keep(self, trainer: L.Trainer, row: str, prefix: str) -> None:
        logged = trainer.callback_metrics.items()
        scores = {name.removeprefix(prefix): float(value) for name, value in logged if name.startswith(prefix)}
        if scores:
            self.rows[row] = scores
            self._step = trainer.global_step

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule, loaders: Any, limits: Any) -> None:
        log_dir = trainer.log_dir  # collective, as the baselines are
        if not trainer.strategy.broadcast("this run" in self.rows):
            rank_zero_info(
                "No summary: no validation ran in this training. Lower check_val_every_n_epoch (now "
                f"{trainer.check_val_every_n_epoch}) or val_check_interval, so that one falls on its end."
            )
            return
        if self.baselines:
            self.rows.update(self._baselines(trainer, pl_module, loaders, limits))
        if not trainer.is_global_zero:
            return
        rows = {name: self.rows[name] for name in _ORDER if name in self.rows}
        places = _places(trainer)
        where = "".join(f"{name + ':':<12}{place}\n" for name, place in places.items())
        sys.stdout.write(f"\n{format_table(rows)}\n{where}")
        sys.stdout.flush()
        if log_dir is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            finite = {row: {k: v if math.isfinite(v) else None for k, v in one.items()} for row, one in rows.items()}
            try:
                write_owned_json(Path(log_dir) / "summary.json", {"step": self._step, "rows": finite, **places})
            except (ConfigError, OSError) as error:
                rank_zero_warn(f"The summary is not written: {error}")

    def _baselines(self, trainer: L.Trainer, pl_module: L.LightningModule, loaders: Any, limits: Any) -> Rows:
        """Scores of all processes together; a finished training must not fail for want of a comparison."""
        data = getattr(trainer, "datamodule", None)
        owner = pl_module if data is None else data
        metrics = {}
        try:
            num_slots: Any = self.num_slots or getattr(pl_module.hparams, "num_slots", None)
            advice = "Give it to the callback."
            require(isinstance(num_slots, int), "the host to have `num_slots`", num_slots, advice=advice)
            loader = CombinedLoader(loaders, "sequential").flattened[0]
            limit = limits[0] if limits and math.isfinite(limits[0]) else None
            flags = (bool(getattr(data, "has_background", True)), bool(getattr(data, "ignore_overlaps", False)))
            with isolate_rng():
                raw = islice(loader, limit)
                # These hooks turn what workers give into what hosts see.
                batches = (owner.on_after_batch_transfer(owner.on_before_batch_transfer(one, 0), 0) for one in raw)
                metrics = score_baselines(batches, num_slots, *flags)
        except Exception as error:
            rank_zero_warn(f"No baselines in the summary: {error}")
        if not trainer.strategy.reduce_boolean_decision(bool(metrics), all=True):
            return {}
        on_device = {row: metric.to(trainer.strategy.root_device) for row, metric in metrics.items()}
        return {row: {k: float(v) for k, v in metric.compute().items()} for row, metric in on_device.items()}


def format_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Returns scores, by row and by name, as an aligned Markdown table with the metrics that tables show."""
    shown = metric_names(None, "headline", "table")
    names = [name for name in shown if any(name in scores for scores in rows.values())]
    cells = [["", *(METRICS[name].title for name in names)]]
    cells += [
        [row, *(f"{scores[name]:.{METRICS[name].digits}f}" if name in scores else "-" for name in names)]
        for row, scores in rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _places(trainer: L.Trainer) -> dict[str, str]:
    places = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SSyncPictures) and callback.last_path is not None:
            places["pictures"] = str(callback.last_path.parent)
    kept = trainer.checkpoint_callback
    path = getattr(kept, "best_model_path", "") or getattr(kept, "last_model_path", "") or trainer.ckpt_path
    if path:
        places["checkpoint"] = str(path)
    return places
