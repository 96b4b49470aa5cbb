"""`ValidationSummary`: a table of the last validation beside partitions without any learning, scored as a model is."""

import math
import sys
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch.nn.functional as F
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from ssync_pl.data.files import write_owned_json
from ssync_pl.errors import ConfigError, require
from ssync_pl.hosts.evaluation import frame_validity
from ssync_pl.metrics import MAPS, METRICS, SegmentationMetrics, metric_names
from ssync_pl.metrics.partitions import grid_partition, kmeans
from ssync_pl.tools.pictures import SSyncPictures

_LONGER_SIDE = 128  # larger frames are averaged down for k-means, to bound time and memory

Rows = dict[str, dict[str, float]]


class ValidationSummary(L.Callback):
    """Prints one table at the end of `fit`, `validate` or `test`, and writes it to `<log_dir>/summary.json`.

    Rows: this run (the last validation: the decoder's map, and where the host scores them slot attention's and both
    with redundant slots merged), a grid of rectangles, and k-means with as many parts as the host has slots
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
        for name, value in scores.items():
            of = next((of for of in reversed(MAPS) if name.startswith(of) and name.removeprefix(of) in METRICS), "")
            self.rows.setdefault(MAPS[of], {})[name.removeprefix(of)] = value
        if scores:
            self._step = trainer.global_step

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule, loaders: Any, limits: Any) -> None:
        log_dir = trainer.log_dir  # collective, as the baselines are
        if not trainer.strategy.broadcast("this run" in self.rows):
            rank_zero_info("No summary: no validation ran. Lower check_val_every_n_epoch or val_check_interval.")
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
            finite = {
                row: {k: v if math.isfinite(v) else None for k, v in one.items()} for row, one in self.rows.items()
            }
            content = {"step": self._step, "rows": finite, **places}
            try:
                write_owned_json(Path(log_dir) / "summary.json", "summary", content)
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


def score_baselines(
    batches: Iterable[Any], num_slots: int, has_background: bool = True, ignore_overlaps: bool = False
) -> dict[str, SegmentationMetrics]:
    """Fills the metrics of the grid and k-means, by row, with as many parts as a model has slots."""
    metrics: dict[str, SegmentationMetrics] = {}
    for batch in batches:
        entries = batch if isinstance(batch, Mapping) else {}
        require({"video", "segmentations"} <= {*entries}, "batches with `video` and `segmentations`", sorted(entries))
        true, video, features = entries["segmentations"], entries["video"], entries.get("features")
        size, valid = (true.shape[-2], true.shape[-1]), frame_validity(batch)
        scale = min(1.0, _LONGER_SIDE / max(video.shape[-2:]))
        small = (max(1, round(scale * video.shape[-2])), max(1, round(scale * video.shape[-1])))
        pixels = F.interpolate(video.flatten(0, 1).float(), size=small, mode="area").flatten(2).transpose(1, 2)
        parts = {
            "grid": grid_partition(num_slots, size).expand(*true.shape[:2], -1, -1),
            "k-means RGB": kmeans(pixels.unflatten(0, video.shape[:2]), small, num_slots, valid),
        }
        if features is not None:
            rows = max(1, round(math.sqrt(features.shape[2] * size[0] / size[1])))
            labels = kmeans(features, (rows, features.shape[2] // rows), num_slots, valid, 1.0).float()
            parts["k-means features"] = F.interpolate(labels, size=size, mode="nearest").long()
        for row, labels in parts.items():
            if row not in metrics:
                metrics[row] = SegmentationMetrics("", has_background, ignore_overlaps).to(true.device)
            metrics[row].update(labels.to(true.device), true, valid)
    return metrics
