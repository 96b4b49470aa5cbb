"""`ValidationSummary`: a table of the last validation beside what needs no learning."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from ssync_pl.data.datamodule import ShardDataModule
from ssync_pl.data.patterns import find_shards, is_remote
from ssync_pl.errors import ConfigError
from ssync_pl.metrics.table import METRICS, metric_names
from ssync_pl.tools.baselines import BASELINES_VERSION, Rows, cached_baselines, score_baselines
from ssync_pl.tools.owned import write_owned_json
from ssync_pl.tools.pictures import SSyncPictures

__all__ = ["ValidationSummary", "format_table"]

_SCORED = ("this run", "untrained")
_ORDER = (*_SCORED, "grid", "k-means RGB")


class ValidationSummary(L.Callback):
    """Prints one table at the end of `fit`, `validate` or `test`, and writes it to `<log_dir>/summary.json`.

    Rows: this run (the last validation), optionally the host before training, a grid of rectangles and k-means on
    RGB with as many parts as the host has slots. A score means something only beside these: slots that settle into
    stripes reach a fair FG-ARI as well. Below the table: where pictures and checkpoints are.

    Args:
        untrained: score the whole validation set before training as well. It takes the place of Lightning's sanity
            check, which leaves random states and training as they are; checkpoints hold the row for resumed runs.
        baselines: score the grid and k-means on RGB. Computed once per data set and kept in `baselines.json` beside
            the shards. Runs of several processes use what is kept, but compute nothing.
        num_slots: parts of the baselines. None: the host's hyperparameter `num_slots`; without one, no baselines.

    Raises:
        ConfigError: `num_slots` is below 1.
    """

    def __init__(self, untrained: bool = False, baselines: bool = True, num_slots: int | None = None) -> None:
        super().__init__()
        if num_slots is not None and num_slots < 1:
            raise ConfigError(f"Expected argument `num_slots` to be at least 1, but got {num_slots}.")
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
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            if self.untrained:
                self._keep(trainer, "untrained", "val/")
            return
        self._keep(trainer, "this run", "val/")
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
    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_sanity_check(trainer)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_sanity_check(trainer)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore_sanity_check(trainer)  # a resumed run skips the check and its end

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rows": {name: dict(self.rows[name]) for name in _SCORED if name in self.rows}, "step": self._step}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.update({name: dict(scores) for name, scores in state["rows"].items() if name in _SCORED})
        self._step = int(state["step"])

    def _restore_sanity_check(self, trainer: L.Trainer) -> None:
        if self._sanity_steps is not None:
            trainer.num_sanity_val_steps, self._sanity_steps = self._sanity_steps, None

    def _keep(self, trainer: L.Trainer, row: str, prefix: str) -> None:
        logged = trainer.callback_metrics.items()
        scores = {name.removeprefix(prefix): float(value) for name, value in logged if name.startswith(prefix)}
        if scores:
            self.rows[row] = scores
            self._step = trainer.global_step

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule, loaders: Any, limits: Any) -> None:
        log_dir = trainer.log_dir  # collective, so asked on each rank
        if not trainer.is_global_zero:
            return
        if "this run" not in self.rows:
            rank_zero_info(
                "No summary: no validation ran in this training. Lower check_val_every_n_epoch (now "
                f"{trainer.check_val_every_n_epoch}) or val_check_interval, so that one falls on its end."
            )
            return
        if self.baselines:
            try:
                self.rows.update(self._baselines(trainer, pl_module, loaders, limits))
            except Exception as error:  # a finished training must not fail for want of a comparison
                rank_zero_warn(f"No baselines in the summary: {error}")
        rows = {name: self.rows[name] for name in _ORDER if name in self.rows}
        places = _places(trainer)
        lines = ["", format_table(rows), *(f"{name + ':':<12}{place}" for name, place in places.items()), ""]
        sys.stdout.write("\n".join(lines))
        sys.stdout.flush()
        if log_dir is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # JSON has no NaN.
            finite = {
                row: {name: value if math.isfinite(value) else None for name, value in scores.items()}
                for row, scores in rows.items()
            }
            try:
                write_owned_json(Path(log_dir) / "summary.json", {"step": self._step, "rows": finite, **places})
            except ConfigError as error:
                rank_zero_warn(f"The summary is not written: {error}")

    def _baselines(self, trainer: L.Trainer, pl_module: L.LightningModule, loaders: Any, limits: Any) -> Rows:
        num_slots = self.num_slots or getattr(pl_module.hparams, "num_slots", None)
        if not isinstance(num_slots, int):
            raise ConfigError("Expected a number of slots. Give `num_slots` to ValidationSummary.")
        data = getattr(trainer, "datamodule", None)
        loader = CombinedLoader(loaders, "sequential").flattened[0]
        limit = limits[0] if limits and math.isfinite(limits[0]) else None
        has_background = bool(getattr(data, "has_background", True))
        ignore_overlaps = bool(getattr(data, "ignore_overlaps", False))

        def compute() -> Rows:
            if trainer.world_size > 1:
                raise ConfigError("Expected a run of one process, because each of several sees a part of the videos.")
            with isolate_rng():
                batches = _batches(loader, limit, pl_module if data is None else data)
                return score_baselines(batches, num_slots, has_background, ignore_overlaps)

        split = "test" if trainer.state.fn == "test" else "validation"
        path, key = _cache(data, split)
        if path is None:
            return compute()
        key |= {"split": split, "batches": limit, "batch_size": getattr(data, "val_batch_size", None)}
        key |= {"num_slots": num_slots, "has_background": has_background, "ignore_overlaps": ignore_overlaps}
        return cached_baselines(path, key, compute)


def format_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Returns scores as an aligned Markdown table with the metrics that tables show, as far as they are there.

    Args:
        rows: name of a row to its scores by name, as in `ssync_pl.metrics.METRICS`.
    """
    there = {name for scores in rows.values() for name in scores}
    names = [name for name in metric_names(None, "headline", "table") if name in there]
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
    pictures = [callback.last_path for callback in trainer.callbacks if isinstance(callback, SSyncPictures)]  # type: ignore[attr-defined]
    if pictures and pictures[0] is not None:
        places["pictures"] = str(pictures[0].parent)
    kept = trainer.checkpoint_callback
    path = getattr(kept, "best_model_path", "") or getattr(kept, "last_model_path", "") or trainer.ckpt_path
    if path:
        places["checkpoint"] = str(path)
    return places


def _batches(loader: Any, limit: int | None, owner: Any) -> Iterator[Mapping[str, Any]]:
    for batch in islice(loader, limit):
        # These hooks turn what workers give into what hosts see.
        batch = owner.on_after_batch_transfer(owner.on_before_batch_transfer(batch, 0), 0)
        if not isinstance(batch, Mapping):
            raise ConfigError(f"Expected batches to be dicts with `video` and `segmentations`, but got {type(batch)}.")
        yield batch


def _cache(data: Any, split: str) -> tuple[Path | None, dict[str, Any]]:
    """Where baselines are kept, and what they depend on: uncompressed shards can differ in their dates alone."""
    pattern = data.patterns[split] if isinstance(data, ShardDataModule) else None
    shards = [] if pattern is None else find_shards(pattern, split)[0]
    if not shards or is_remote(shards[0]):
        return None, {}
    facts = [(Path(shard), Path(shard).stat()) for shard in shards]
    key = {
        "version": BASELINES_VERSION,
        "shards": [[shard.name, stat.st_size, stat.st_mtime_ns] for shard, stat in facts],
        "image_size": data.transform.image_size,
        "resize_mode": data.transform.resize_mode,
        "crop": data.transform.crop,
        "mean": list(data.mean),
        "std": list(data.std),
        "mask_format": data.mask_format,
    }
    return facts[0][0].parent / "baselines.json", key
