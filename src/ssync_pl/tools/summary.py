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


class ValidationSummary(L.Callback):
    """Prints one table at the end of `fit`, `validate` or `test`, and writes it to `<log_dir>/summary.json`.

    Rows: this run (the last validation), a grid of rectangles, and k-means with as many parts as the host has slots
    (its hyperparameter `num_slots`; without one, no baselines), on RGB and, where the data has cached features, on
    these and the places of the patches. A score means something only beside these: slots that settle into stripes
    reach a fair FG-ARI as well. Below the table: where pictures and checkpoints are.

    Args:
        baselines: score the grid and k-means, which reads the validation set once more.
    """

    def __init__(self, baselines: bool = True) -> None:
        super().__init__()
        self.baselines = baselines
        self.rows: Rows = {}
        self._step = 0

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.rows = {}

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._keep(trainer, "val/")
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module, trainer.val_dataloaders, trainer.num_val_batches)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep(trainer, "test/")
        self._report(trainer, pl_module, trainer.test_dataloaders, trainer.num_test_batches)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            bar.teardown(trainer, pl_module, "fit")  # its live lines would be drawn over the table
        self._report(trainer, pl_module, trainer.val_dataloaders, trainer.num_val_batches)

    def _keep(self, trainer: L.Trainer, prefix: str) -> None:
        logged = trainer.callback_metrics.items()
        scores = {name.removeprefix(prefix): float(value) for name, value in logged if name.startswith(prefix)}
        if scores:
            self.rows["this run"] = scores
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
        places = _places(trainer)
        where = "".join(f"{name + ':':<12}{place}\n" for name, place in places.items())
        sys.stdout.write(f"\n{format_table(self.rows)}\n{where}")
        sys.stdout.flush()
        if log_dir is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rows = {
                row: {name: value if math.isfinite(value) else None for name, value in scores.items()}
                for row, scores in self.rows.items()
            }
            try:
                write_owned_json(Path(log_dir) / "summary.json", {"step": self._step, "rows": rows, **places})
            except (ConfigError, OSError) as error:
                rank_zero_warn(f"The summary is not written: {error}")

    def _baselines(self, trainer: L.Trainer, pl_module: L.LightningModule, loaders: Any, limits: Any) -> Rows:
        """Scores of all processes together; a finished training must not fail for want of a comparison."""
        data = getattr(trainer, "datamodule", None)
        owner = pl_module if data is None else data
        metrics = {}
        try:
            num_slots: Any = getattr(pl_module.hparams, "num_slots", None)
            require(isinstance(num_slots, int), "the host to have the hyperparameter `num_slots`", num_slots)
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
    for row, scores in rows.items():
        cells.append([row, *(f"{scores[n]:.{METRICS[n].digits}f}" if n in scores else "-" for n in names)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _places(trainer: L.Trainer) -> dict[str, str]:
    kept = trainer.checkpoint_callback
    path = getattr(kept, "best_model_path", "") or getattr(kept, "last_model_path", "") or trainer.ckpt_path
    found = {"checkpoint": str(path)} if path else {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SSyncPictures) and callback.last_path is not None:
            found["pictures"] = str(callback.last_path.parent)
    return found
