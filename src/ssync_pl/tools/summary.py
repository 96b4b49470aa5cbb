"""`ValidationSummary`: a table of the last validation beside what needs no learning."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from ssync_pl.data.datamodule import ShardDataModule
from ssync_pl.data.files import write_bytes
from ssync_pl.data.patterns import find_shards, is_remote
from ssync_pl.errors import ConfigError
from ssync_pl.tools.baselines import BASELINES_VERSION, cached_baselines, format_table, score_baselines
from ssync_pl.tools.pictures import SSyncPictures

__all__ = ["ValidationSummary"]

_SCORED = ("this run", "untrained")


class ValidationSummary(L.Callback):
    """Print one table at the end of `fit`, `validate` or `test`, and write it to `<log_dir>/summary.json`.

    Rows: this run (the last validation), optionally the host before training, a grid of rectangles and k-means on
    RGB with as many parts as the host has slots. A score means something only beside these: slots that settle into
    stripes reach a fair FG-ARI as well. Below the table: where pictures and checkpoints are.

    Args:
        untrained: Score the whole validation set before training as well. It takes the place of Lightning's sanity
            check, which leaves random states and training as they are; checkpoints hold the row for resumed runs.
        baselines: Score the grid and k-means on RGB. Computed once a data set and kept in a JSON file beside the data,
            if the data module knows its folder. Runs of several processes use what is kept, but compute nothing.
        num_slots: Parts of the baselines. None: the host's hyperparameter `num_slots`; without one, no baselines.

    Raises:
        ConfigError: `num_slots` is below 1.

    Example:
        >>> ValidationSummary(baselines=False).rows
        {}
    """

    def __init__(self, untrained: bool = False, baselines: bool = True, num_slots: int | None = None) -> None:
        super().__init__()
        if num_slots is not None and num_slots < 1:
            raise ConfigError(f"Expected argument `num_slots` to be at least 1, but got {num_slots}.")
        self.untrained = untrained
        self.baselines = baselines
        self.num_slots = num_slots
        self.rows: dict[str, dict[str, float]] = {}
        self._sanity_steps: int | float | None = None
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the sanity check run over the whole validation set where the untrained row is wanted."""
        self.rows = {}
        if stage == "fit" and self.untrained and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._sanity_steps = trainer.num_sanity_val_steps
            trainer.num_sanity_val_steps = float("inf")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics of this validation."""
        scores = _scores(trainer.callback_metrics, "val/")
        if trainer.sanity_checking:
            if self.untrained and scores:
                self.rows["untrained"] = scores
            return
        if scores:
            self.rows["this run"] = scores
            self._step = trainer.global_step
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module, trainer.val_dataloaders, trainer.num_val_batches)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give Lightning its sanity check back."""
        self._restore_sanity_check(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give Lightning its sanity check back."""
        self._restore_sanity_check(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give Lightning its sanity check back, which a resumed run skips."""
        self._restore_sanity_check(trainer)

    def _restore_sanity_check(self, trainer: L.Trainer) -> None:
        if self._sanity_steps is not None:
            trainer.num_sanity_val_steps, self._sanity_steps = self._sanity_steps, None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot score again.

        Returns:
            The rows so far, and the step of the last validation.
        """
        return {"rows": {name: dict(self.rows[name]) for name in _SCORED if name in self.rows}, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the rows of the run that is resumed.

        Args:
            state: What `state_dict` returned.
        """
        self.rows.update({name: dict(scores) for name, scores in state["rows"].items() if name in _SCORED})
        self._step = int(state["step"])

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the test's metrics."""
        scores = _scores(trainer.callback_metrics, "test/")
        if scores:
            self.rows["this run"] = scores
            self._step = trainer.global_step
        self._report(trainer, pl_module, trainer.test_dataloaders, trainer.num_test_batches)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the last validation of the training."""
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            bar.teardown(trainer, pl_module, "fit")  # its live lines would be drawn over the table
        self._report(trainer, pl_module, trainer.val_dataloaders, trainer.num_val_batches)

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
            self._add_baselines(trainer, pl_module, loaders, limits)
        order = ("this run", "untrained", "grid", "k-means RGB")
        rows = {name: self.rows[name] for name in order if name in self.rows}
        places = _places(trainer)
        lines = ["", format_table(rows), *(f"{name + ':':<12}{place}" for name, place in places.items()), ""]
        sys.stdout.write("\n".join(lines))
        sys.stdout.flush()
        if log_dir is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            content = {"step": self._step, "rows": _finite(rows), **places}
            text = json.dumps(content, indent=2, allow_nan=False)
            write_bytes(Path(log_dir) / "summary.json", f"{text}\n".encode())

    def _add_baselines(self, trainer: L.Trainer, pl_module: L.LightningModule, loaders: Any, limits: Any) -> None:
        num_slots = self.num_slots or getattr(pl_module.hparams, "num_slots", None)
        if not isinstance(num_slots, int):
            rank_zero_info("No baselines in the summary: give `num_slots` to ValidationSummary.")
            return
        data = getattr(trainer, "datamodule", None)
        split = "test" if trainer.state.fn == "test" else "validation"
        limit = limits[0] if limits and math.isfinite(limits[0]) else None
        if limit is not None and limit >= _length(loaders):
            limit = None  # the whole set, however many batches that is
        has_background = bool(getattr(data, "has_background", True))
        overlaps = bool(getattr(data, "ignore_overlaps", False))

        def compute() -> dict[str, dict[str, float]]:
            if trainer.world_size > 1:
                raise ConfigError("Expected a run of one process, because each of several sees a part of the videos.")
            with isolate_rng():
                owner = pl_module if data is None else data
                return score_baselines(
                    _batches(loaders, limit, owner), num_slots, has_background, ignore_overlaps=overlaps
                )

        try:
            path, identity = _cache(data, split)
            if path is None:
                scores = compute()
            else:
                key = {**identity, "split": split, "num_slots": num_slots, "has_background": has_background}
                if limit is not None:
                    key.update(batches=limit, batch_size=getattr(data, "val_batch_size", None))
                scores = cached_baselines(path, {**key, "ignore_overlaps": overlaps}, compute)
        except Exception as error:  # a finished training must not fail for want of a comparison
            rank_zero_warn(f"No baselines in the summary: {error}")
            return
        self.rows.update(scores)


def _scores(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): float(value) for name, value in metrics.items() if name.startswith(prefix)}


def _finite(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    # JSON has no NaN
    return {
        row: {name: value if math.isfinite(value) else None for name, value in scores.items()}
        for row, scores in rows.items()
    }


def _places(trainer: L.Trainer) -> dict[str, str]:
    places = {}
    pictures = [callback.last_path for callback in trainer.callbacks if isinstance(callback, SSyncPictures)]  # type: ignore[attr-defined]
    if pictures and pictures[0] is not None:
        places["pictures"] = str(pictures[0].parent)
    checkpoint = trainer.checkpoint_callback
    path = getattr(checkpoint, "best_model_path", "") or getattr(checkpoint, "last_model_path", "")
    if path:
        places["checkpoint"] = str(path)
    elif trainer.ckpt_path:
        places["checkpoint"] = str(trainer.ckpt_path)
    return places


def _first(loaders: Any) -> Any:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return loaders[0] if isinstance(loaders, (list, tuple)) else loaders


def _length(loaders: Any) -> float:
    try:
        return len(_first(loaders))
    except TypeError:  # streams of unknown length
        return math.inf


def _batches(loaders: Any, limit: int | None, owner: Any) -> Iterator[Mapping[str, Any]]:
    for batch in islice(_first(loaders), limit):
        # these hooks turn what workers give into what hosts see
        batch = owner.on_after_batch_transfer(owner.on_before_batch_transfer(batch, 0), 0)
        if not isinstance(batch, Mapping):
            raise ConfigError(f"Expected batches to be dicts with `video` and `segmentations`, but got {type(batch)}.")
        yield batch


def _cache(data: Any, split: str) -> tuple[Path | None, dict[str, Any]]:
    pattern = data.patterns[split] if isinstance(data, ShardDataModule) else None
    shards = [] if pattern is None else find_shards(pattern, split)[0]
    if not shards or is_remote(shards[0]):
        return None, {}
    transform = data.transform
    identity = {
        "version": BASELINES_VERSION,
        "shards": [_fingerprint(Path(shard)) for shard in shards],
        "image_size": transform.image_size,
        "resize_mode": transform.resize_mode,
        "crop": transform.crop,
        "mean": list(data.mean),
        "std": list(data.std),
        "mask_format": data.mask_format,
    }
    return Path(shards[0]).parent / "baselines.json", identity


def _fingerprint(shard: Path) -> list[Any]:
    # Uncompressed shards of other content can have the same name and size.
    facts = shard.stat()
    return [shard.name, facts.st_size, facts.st_mtime_ns]
