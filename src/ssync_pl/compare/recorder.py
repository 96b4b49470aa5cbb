"""`RunRecorder`: what one training cost and what came out of it, in files that runs are compared by."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn

from ssync_pl.compare.final import FinalPass, final_pass
from ssync_pl.compare.keepsakes import PictureBox
from ssync_pl.compare.timing import StepClock, process_peak_mib
from ssync_pl.compare.videos import flat_loaders, hash_keys, refuse_shared_videos
from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ConfigError
from ssync_pl.hosts.training import SlotHost
from ssync_pl.tools.probe import join_samples, probe_slots

__all__ = ["RunRecorder"]


class RunRecorder(L.Callback):
    """Measure a training, score the trained host once more and more closely, and keep a few pictures.

    Writes into the run's `log_dir`, at the end of `fit`:

    * `evaluation.json`: `scores` (those of validation, and `boundary_f`, `slots_per_object`, `unused_slots`,
      `used_slots`, `identity`), `probe` (`position_r2`, `color_r2`, `shape_accuracy`: what a linear map reads off a
      slot), `step_ms` (median of the later half of the training steps), `peak_mib` (CUDA: what training allocated;
      else the largest memory of the process), `steps`, `val_keys_hash` and `num_videos`. What there is not is null or
      left out.
    * `pictures.npz`: frames, truth, slots and SSync's regions of the first validation videos.

    The whole validation set of the Trainer is read once (as far as `limit_val_batches` lets it), with a seed of its
    own. Nothing else of the run changes: its weights, random numbers and checkpoints are the same to the bit. A
    validation set that shares videos with the training set is refused.

    Args:
        videos: Videos in `pictures.npz`; 0 for no such file.
        frames: Frames of each, evenly spaced, at least 1.
        probe: Fit the linear probe. Runs of several processes leave it out, because each sees a part of the videos.

    Raises:
        ConfigError: A setting is out of range.

    Example:
        >>> RunRecorder(videos=2).clock.steps
        0
    """

    def __init__(self, videos: int = 6, frames: int = 4, probe: bool = True) -> None:
        super().__init__()
        for name, value, least in (("videos", videos, 0), ("frames", frames, 1)):
            if value < least:
                raise ConfigError(f"Expected argument `{name}` to be at least {least}, but got {value}.")
        self.videos = videos
        self.frames = frames
        self.probe = probe
        self.clock = StepClock()
        self._timed_from = 0
        self.peak_mib: float | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse hosts that cannot be scored, before they are trained."""
        if stage == "fit" and not isinstance(pl_module, SlotHost):
            raise ConfigError(
                f"Expected a host with `evaluate` (a subclass of SlotHost), but got {type(pl_module).__name__}. Leave "
                "RunRecorder out, or derive the host from ssync_pl.hosts.training.SlotHost."
            )
        self.clock = StepClock()
        self.peak_mib = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a validation set that is trained on, as soon as both are known."""
        refuse_shared_videos(trainer.train_dataloader, trainer.val_dataloaders)
        self._forget_peak(trainer)
        # A run that shared its warm-up has only the later steps, and one with SSync is to be timed with it.
        total = trainer.estimated_stepping_batches
        self._timed_from = int(total) // 2 if math.isfinite(total) and total > 0 else 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A step begins."""
        if trainer.global_step >= self._timed_from:
            self.clock.start(trainer.strategy.root_device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step ends."""
        self.clock.stop()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the memory of training before validation adds its own."""
        self._read_peak(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave validation's memory out."""
        self._forget_peak(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the memory of training."""
        self._read_peak(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the host and write both files."""
        log_dir = trainer.log_dir  # collective, so asked on each rank
        if trainer.fast_dev_run or not isinstance(pl_module, SlotHost):  # type: ignore[attr-defined]
            return
        if log_dir is None:
            rank_zero_warn("RunRecorder writes nothing: the logger has no folder. Use CSVLogger.")
            return
        loader, limit = _validation_loader(trainer)
        data = getattr(trainer, "datamodule", None)
        wanted = self.videos if trainer.is_global_zero else 0
        box = PictureBox(
            wanted,
            self.frames,
            pl_module.evaluation.has_background,
            getattr(data, "mean", None),
            getattr(data, "std", None),
        )
        found = FinalPass()
        if loader is None:
            rank_zero_warn("RunRecorder scores nothing: there is no validation set.")
        else:
            refuse_shared_videos(trainer.train_dataloader, loader)
            probe = self.probe and trainer.world_size == 1
            found = final_pass(trainer, pl_module, loader, limit, box, probe)
        keys = _gathered(found.keys, trainer.world_size)
        if not trainer.is_global_zero:
            return
        content = {
            "scores": _finite(found.scores),
            "probe": _finite(probe_slots(join_samples(found.samples)) if found.samples else {}),
            "step_ms": self.clock.median_ms(),
            "peak_mib": self.peak_mib,
            "steps": trainer.global_step,
            "val_keys_hash": hash_keys(loader, keys),
            "num_videos": len(keys),
        }
        pictures = box.content()
        if pictures is not None:
            write_bytes(Path(log_dir) / "pictures.npz", pictures)
        # Last: whoever finds it finds the pictures as well.
        text = json.dumps(content, indent=2, allow_nan=False)
        write_bytes(Path(log_dir) / "evaluation.json", f"{text}\n".encode())

    def _read_peak(self, trainer: L.Trainer) -> None:
        if trainer.sanity_checking:
            return
        device = trainer.strategy.root_device
        peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else process_peak_mib()
        known = [value for value in (self.peak_mib, peak) if value is not None]
        self.peak_mib = max(known, default=None)

    def _forget_peak(self, trainer: L.Trainer) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)


def _validation_loader(trainer: L.Trainer) -> tuple[Any, int | None]:
    """The first validation loader, and how many batches of it the Trainer reads."""
    if trainer.val_dataloaders is None and trainer.enable_validation:
        # No validation was due, or there was nothing left to train: the loaders were never asked for.
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True
    loader = next(iter(flat_loaders(trainer.val_dataloaders)), None)
    limits = trainer.num_val_batches
    return loader, int(limits[0]) if limits and math.isfinite(limits[0]) else None


def _gathered(keys: list[str], world: int) -> list[str]:
    if world == 1 or not dist.is_initialized():
        return keys
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, keys)
    return [key for part in parts for key in part]


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    # JSON has no NaN
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
