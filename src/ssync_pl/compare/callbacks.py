"""The callbacks of every compared run: `RunRecorder` scores the trained host, `KeepCheckpoints` saves it."""

import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from ssync_pl.data.files import refuse_foreign, write_owned_json
from ssync_pl.errors import ConfigError, require
from ssync_pl.hosts.evaluation import Evaluated, SlotEvaluation
from ssync_pl.hosts.training import SlotHost
from ssync_pl.metrics import METRICS
from ssync_pl.plugin.schedule import steps_of, training_length

# A shared checkpoint may be taken this much earlier than needed, because a validation follows some steps.
_EARLIER_STEPS = 8


class RunRecorder(L.Callback):
    """Scores the host before and after the training more closely than its validation does, on the whole validation set.

    Writes `evaluation.json` into the `log_dir`, its last file: `scores` of the decoder's map and, with a prefix of
    `ssync_pl.metrics.MAPS`, of the other maps; those of the `untrained` host, where the run starts at step 0; length,
    time and place of the training. Weights, random states and checkpoints of the run are the same to the bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self._start = (0.0, 0.0)
        self._found: dict[str, Any] = {"scores": {}}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        known = isinstance(pl_module, SlotHost)
        require(known, "a host that derives from ssync_pl.hosts.training.SlotHost", type(pl_module).__name__)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, log_dir = trainer.global_step, trainer.log_dir
        if log_dir is not None:
            refuse_foreign(Path(log_dir) / "evaluation.json", '"ssync_pl evaluation"')  # before work begins
        self._found |= {"first_step": step, "untrained": _scores(trainer, pl_module) if step == 0 else {}}
        self._start = (time.monotonic(), time.process_time())

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        wall, cpu = self._start
        device = trainer.strategy.root_device
        self._found |= {
            "step": trainer.global_step,
            "wall_seconds": round(time.monotonic() - wall, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
            "torch": str(torch.__version__),
            "date": date.today().isoformat(),
            "scores": _scores(trainer, pl_module),
        }

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        log_dir = trainer.log_dir  # collective, so asked on each rank
        if trainer.is_global_zero and log_dir is not None:
            for logger in trainer.loggers:
                logger.save()
            write_owned_json(Path(log_dir) / "evaluation.json", "evaluation", self._found)


class KeepCheckpoints(Checkpoint):
    """Saves `last.ckpt`, and a checkpoint before each switch that other runs start from.

    No validation follows the step of such a checkpoint, since a run that starts from it would skip that validation.
    """

    def __init__(self, folder: str, switches: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.switches = tuple(switches)
        self.last_model_path = ""
        self._latest: dict[str, int] = {}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = training_length(trainer)
        self._latest = {
            one["name"]: steps_of(one["ratio"], one["steps"], total) - one["watch"] for one in self.switches
        }

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *outcome: Any) -> None:
        _, _, batch_idx = outcome
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # no checkpoint holds gradients that are being gathered
        step = trainer.global_step
        due = [name for name, latest in self._latest.items() if max(0, latest - _EARLIER_STEPS) < step <= latest]
        if due and not _validation_may_follow(trainer, batch_idx):
            for name in due:
                trainer.save_checkpoint(self.folder / f"{name}.ckpt")
                del self._latest[name]

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last_model_path = str(self.folder / "last.ckpt")
        trainer.save_checkpoint(self.last_model_path)


def _validation_may_follow(trainer: L.Trainer, batch_idx: int) -> bool:
    if trainer.is_last_batch or trainer.global_step >= trainer.estimated_stepping_batches:
        return True
    interval = trainer.val_check_batch
    if not isinstance(interval, int) or interval < 1:
        return False
    whole = trainer.check_val_every_n_epoch is None
    return ((trainer.fit_loop.total_batch_idx if whole else batch_idx) + 1) % interval == 0


def _scores(trainer: L.Trainer, host: L.LightningModule) -> dict[str, float]:
    """Scores of the first validation loader, as far as `limit_val_batches` lets it be read; none without one."""
    assert isinstance(host, SlotHost)  # `setup` refuses others
    if trainer.val_dataloaders is None and trainer.enable_validation:
        # No validation was due so far: the loaders were never asked for.
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True
    if trainer.val_dataloaders is None:
        rank_zero_warn("RunRecorder scores nothing: there is no validation set.")
        return {}
    limit = trainer.num_val_batches[0]
    data = getattr(trainer, "datamodule", None) or host
    truth = (host.evaluation.has_background, host.evaluation.ignore_overlaps)
    evaluation = SlotEvaluation("", *truth, scores=tuple(METRICS)).to(trainer.strategy.root_device)
    with isolate_rng(), torch.no_grad(), _evaluating(host):
        torch.manual_seed(0)  # hosts may draw their first slots: the same ones whatever the training drew before
        loader = CombinedLoader(trainer.val_dataloaders).flattened[0]
        for raw in islice(loader, int(limit) if math.isfinite(limit) else None):
            moved = data.on_before_batch_transfer(trainer.precision_plugin.convert_input(raw), 0)
            batch = trainer.strategy.batch_to_device(moved, dataloader_idx=0)
            if not isinstance(batch, Mapping) or not isinstance(batch.get("segmentations"), Tensor):
                got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
                raise ConfigError(f"Expected key `segmentations` in validation batches, but got {got}.")
            with trainer.precision_plugin.val_step_context():
                found = Evaluated(*host.evaluate(batch))
            evaluation.update(found, batch)
    scores = {name: float(value) for name, value in evaluation.compute().items()}
    return {name: value for name, value in scores.items() if name != "loss" and math.isfinite(value)}


@contextmanager
def _evaluating(host: SlotHost) -> Iterator[None]:
    training = [part for part in host.modules() if part.training]  # `train()` would wake frozen backbones
    host.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
