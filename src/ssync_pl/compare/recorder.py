"""`RunRecorder`: what came out of one training, in files that runs are compared by."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from ssync_pl.compare.evaluation import FinalPass, final_pass
from ssync_pl.compare.pictures import PictureBox
from ssync_pl.compare.videos import flat_loaders, refuse_shared_videos
from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ConfigError
from ssync_pl.hosts.training import SlotHost
from ssync_pl.tools.probe import join_samples, probe_slots

__all__ = ["RunRecorder"]


class RunRecorder(L.Callback):
    """Scores the trained host once more and more closely than its validation does, and keeps a few pictures.

    Writes into the run's `log_dir`, at the end of `fit`:

    * `evaluation.json`: `scores` of the decoder's map and, with `encoder_` before them, of slot attention's; `probe`
      (what a linear map reads off a slot); `first_step` and `steps`, `num_videos`, `device` and `torch`. What is not
      known is null or left out.
    * `pictures.json`: frames, truth, slots and SSync's regions of the first validation videos, as PNG in base64.

    The whole validation set of the Trainer is read once (as far as `limit_val_batches` lets it), with a seed of its
    own. Nothing else of the run changes: its weights, random numbers and checkpoints are the same to the bit. A
    validation set that shares videos with the training set is refused.

    Args:
        videos: videos in `pictures.json`; 0 for no such file.
        frames: frames of each, evenly spaced, at least 1.
        probe: fit the linear probe; runs of several processes leave it out, because each sees a part of the videos.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(self, videos: int = 6, frames: int = 4, probe: bool = True) -> None:
        super().__init__()
        for name, value, least in (("videos", videos, 0), ("frames", frames, 1)):
            if value < least:
                raise ConfigError(f"Expected argument `{name}` to be at least {least}, but got {value}.")
        self.videos = videos
        self.frames = frames
        self.probe = probe
        self._first_step = 0

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(pl_module, SlotHost):
            raise ConfigError(
                f"Expected a host with `evaluate` (a subclass of SlotHost), but got {type(pl_module).__name__}. Leave "
                "RunRecorder out, or derive the host from ssync_pl.hosts.training.SlotHost."
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        refuse_shared_videos(trainer.train_dataloader, trainer.val_dataloaders)
        self._first_step = trainer.global_step

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        log_dir = trainer.log_dir  # collective, so asked on each rank
        if trainer.fast_dev_run or not isinstance(pl_module, SlotHost):  # type: ignore[attr-defined]
            return
        if log_dir is None:
            rank_zero_warn("RunRecorder writes nothing: the logger has no folder. Use CSVLogger.")
            return
        loader, limit = _validation_loader(trainer)
        data = getattr(trainer, "datamodule", None)
        normalised = (getattr(data, "mean", None), getattr(data, "std", None))
        videos = self.videos if trainer.is_global_zero else 0
        box = PictureBox(videos, self.frames, pl_module.evaluation.has_background, *normalised)
        found = FinalPass({}, [], [])
        if loader is None:
            rank_zero_warn("RunRecorder scores nothing: there is no validation set.")
        else:
            refuse_shared_videos(trainer.train_dataloader, loader)
            found = final_pass(trainer, pl_module, loader, limit, box, self.probe and trainer.world_size == 1)
        keys = _gathered(found.keys, trainer.world_size)
        if not trainer.is_global_zero:
            return
        content = {
            "scores": _finite(found.scores),
            "probe": _finite(probe_slots(join_samples(found.samples)) if found.samples else {}),
            "first_step": self._first_step,
            "steps": trainer.global_step,
            "num_videos": len(keys),
            "device": _device_name(trainer.strategy.root_device),
            "torch": str(torch.__version__),
        }
        if box.drawn:
            write_bytes(Path(log_dir) / "pictures.json", json.dumps(box.drawn).encode())
        # Last: whoever finds it finds the pictures as well.
        text = json.dumps(content, indent=2, allow_nan=False)
        write_bytes(Path(log_dir) / "evaluation.json", f"{text}\n".encode())


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


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
