"""`ValidationSummary`: a table of the last validation beside partitions without any learning, scored as a model is."""

import math
import sys
import warnings
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from ssync_pl.data.files import write_owned_json
from ssync_pl.errors import ConfigError, require, require_shape
from ssync_pl.hosts.evaluation import frame_validity
from ssync_pl.metrics import MAPS, METRICS, SegmentationMetrics, metric_names
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
            of = max(
                (of for of in MAPS if name.startswith(of) and name.removeprefix(of) in METRICS), key=len, default=""
            )
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
    """Fills the metrics of the grid and k-means, by row of the table, with as many parts as a model has slots.

    Batches hold `video` `(B, T, 3, H, W)`, `segmentations` bool `(B, T, C, H, W)` and, where there are any, cached
    `features` `(B, T, N, D)`, `batch_padding_mask` `(B,)` and `frame_mask` `(B, T)`, True = real.
    """
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


def kmeans(
    points: Tensor, grid: tuple[int, int], num_clusters: int, valid: Tensor, place_weight: float = 0.0, seed: int = 0
) -> Tensor:
    """Clusters the points `(B, T, N, D)` of a grid `(h, w)`, each video by itself; int64 labels `(B, T, h, w)`.

    Places in the grid span 1 along its longer side and count `place_weight` times the typical length of a point. Frames
    that `valid` `(B, T)` marks False do not shape the clusters.
    """
    from sklearn.cluster import KMeans  # takes a second to import
    from threadpoolctl import threadpool_limits

    fits = points.ndim == 4 and points.shape[2] == grid[0] * grid[1]
    require_shape(fits, f"features (B, T, N, D) of a grid of {grid[0]} x {grid[1]}", points)
    points = points.float()
    if place_weight:
        axes = [torch.arange(size, device=points.device) / max(max(grid) - 1, 1) for size in grid]
        places = place_weight * points.square().sum(-1).mean().sqrt() * torch.cartesian_prod(*axes)
        points = torch.cat([points, places.expand(*points.shape[:2], -1, -1)], dim=-1)
    found = torch.zeros(points.shape[:3], dtype=torch.int64)
    with threadpool_limits(1), warnings.catch_warnings():  # threads would add up in another order each time
        warnings.simplefilter("ignore")  # fewer colours than clusters leave clusters empty
        for index, (video, real) in enumerate(zip(points.double().cpu(), valid.cpu(), strict=True)):
            if real.any():  # not padding from end to end
                seen = video[real].flatten(0, 1)
                require_shape(len(seen) >= num_clusters, f"at least {num_clusters} points per video", (len(seen),))
                model = KMeans(num_clusters, n_init=1, random_state=seed).fit(seen.numpy())
                labels = torch.from_numpy(model.predict(video.flatten(0, 1).numpy()))
                found[index] = labels.view(found.shape[1:])
    return found.unflatten(2, grid)


def grid_partition(num_cells: int, size: tuple[int, int]) -> Tensor:
    """Cuts a frame `(H, W)` into rectangles that are as close to squares as can be; int64 labels, row by row.

    Rows hold unequal numbers of cells (11: 4, 4 and 3) where equal ones give cells over twice as long as wide.
    """
    height, width = size

    def elongation(rows: list[int]) -> float:
        """Mean over the cells of |log(height / width)|, 0 for squares."""
        return sum(n * abs(math.log(height * n * n / (num_cells * width))) for n in rows) / num_cells

    counts = range(1, num_cells + 1)
    layouts = [[num_cells // rows + (row < num_cells % rows) for row in range(rows)] for rows in counts]
    layout = min((rows for rows in layouts if rows[0] == rows[-1]), key=elongation)
    if elongation(layout) > math.log(2) + 1e-9:
        layout = min(layouts, key=elongation)
    labels, first = torch.zeros(size, dtype=torch.long), 0
    for columns in layout:
        top, bottom = (round(height * cells / num_cells) for cells in (first, first + columns))
        labels[top:bottom] = first + torch.arange(width) * columns // width
        first += columns
    require_shape(labels.unique().numel() == num_cells, f"a frame with room for {num_cells} cells", size)
    return labels
