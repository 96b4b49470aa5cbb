"""`KeepRun`: what a run of a comparison writes so that it can be watched, killed and continued."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from ssync_pl.compare.curves import join_curves, read_curve, write_curve
from ssync_pl.compare.processes import PIPE_VARIABLE
from ssync_pl.compare.sharing import refuse_late
from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ConfigError
from ssync_pl.plugin.callback import SSyncCallback
from ssync_pl.plugin.schedule import steps_of

__all__ = ["KeepRun", "die_with_parent"]

_REPORT_SECONDS = 1.0
# A checkpoint for other runs may be taken this much earlier, because some steps have a validation behind them.
_EARLIER_STEPS = 8


class KeepRun(Checkpoint):
    """Keep a training that can be killed at any moment, with its learning curve whole.

    Now and then it saves `checkpoints/last.ckpt`, and writes `progress.json`, by which `ssync-pl compare` follows the
    run. At the end the trained state is in `checkpoints/final.ckpt`.

    A checkpoint becomes valid one step after it was taken, when the metrics of its step are on disk as well: a run
    that continues from it repeats no row and misses none. None is taken at steps after which a validation follows, so
    that no validation is skipped.

    Args:
        folder: Folder of the run.
        every_seconds: Seconds between checkpoints, above 0: about what a kill costs at most.
        every_n_steps: Also after each that many steps; None goes by the time alone.
        switches: When other runs begin to differ from this one, as `Switch.to_settings` says it: for each a checkpoint
            from just before is kept beside, from which they go on, with its curve and a `.json` that says at which
            step it is.

    Raises:
        ConfigError: An interval is not above 0.

    Example:
        >>> KeepRun("runs/x").last_model_path
        ''
    """

    def __init__(
        self,
        folder: str,
        every_seconds: float = 45.0,
        every_n_steps: int | None = None,
        switches: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__()
        if every_seconds <= 0 or (every_n_steps is not None and every_n_steps < 1):
            raise ConfigError(
                "Expected arguments `every_seconds` and `every_n_steps` to be above 0, but got "
                f"{every_seconds} and {every_n_steps}."
            )
        self.folder = Path(folder)
        self.every_seconds = every_seconds
        self.every_n_steps = every_n_steps
        self.switches = tuple(switches)
        self.last_model_path = ""
        self._pending: Path | None = None
        self._for_others: dict[str, int] = {}  # the latest step of each checkpoint that is still to be taken
        self._taken: tuple[list[str], int] = ([], 0)
        self._made_with: dict[str, Any] = {}
        self._from: dict[str, Any] | None = None
        self._total: int | None = None
        self._before = {"wall": 0.0, "cpu": 0.0}
        self._started = time.monotonic()
        self._saved = self._reported = -float("inf")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """End with the process that started this one."""
        die_with_parent()
        self._started = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the seconds from here to the first checkpoint."""
        total = trainer.estimated_stepping_batches
        self._total = total if isinstance(total, int) else None
        self._saved = time.monotonic()
        self._made_with = self._facts(trainer)
        self._refuse_another_warmup(trainer)
        self._for_others = self._latest_steps()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Make the checkpoint of the step before valid."""
        self._commit(trainer)
        if time.monotonic() - self._reported >= _REPORT_SECONDS:
            self._report(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, and nothing but the next step follows."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # gradients that are gathered are in no checkpoint
        step = trainer.global_step
        due = time.monotonic() - self._saved >= self.every_seconds
        due = due or (self.every_n_steps is not None and step % self.every_n_steps == 0)
        names = [name for name, latest in self._for_others.items() if latest - _EARLIER_STEPS < step <= latest]
        due = due or bool(names)
        if trainer.world_size > 1:  # saving waits for all processes, whose clocks differ
            due = trainer.strategy.reduce_boolean_decision(due, all=False)
        if not due or _validation_may_follow(trainer, batch_idx, self._total):
            return
        pending = self.folder / "checkpoints" / "pending.ckpt"
        trainer.save_checkpoint(pending)
        self._pending, self._saved = pending, time.monotonic()
        self._taken = (names, step)
        for name in names:
            del self._for_others[name]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the trained state, under another name than the one that runs continue from."""
        self._pending = None
        path = self.folder / "checkpoints" / "final.ckpt"
        trainer.save_checkpoint(path)
        self.last_model_path = str(path.with_name("last.ckpt"))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what the run was made with."""
        self._report(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Seconds so far, so that those of a continued run are all counted, and what the run is made with.

        Returns:
            Plain values.
        """
        return {**self._seconds(), "folder": str(self.folder), **self._made_with}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the seconds of the run that is continued.

        Args:
            state: What `state_dict` returned.
        """
        self._before = {name: float(state[name]) for name in ("wall", "cpu")}
        self._from = dict(state)

    def _seconds(self) -> dict[str, float]:
        wall = self._before["wall"] + time.monotonic() - self._started
        return {"wall": wall, "cpu": self._before["cpu"] + time.process_time()}

    def _commit(self, trainer: L.Trainer) -> None:
        if self._pending is None or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        for name in self._taken[0]:
            self._keep_for_others(self._pending.with_name(f"{name}.ckpt"), self._taken[1])
        os.replace(self._pending, self._pending.with_name("last.ckpt"))
        self._pending = None

    def _keep_for_others(self, path: Path, step: int) -> None:
        rows = join_curves(read_curve(self.folder / "metrics_before.csv"), read_curve(self.folder / "metrics.csv"))
        write_curve(path.with_suffix(".csv"), [row for row in rows if int(row["step"]) < step])
        write_bytes(path.with_suffix(".json"), json.dumps({"step": step, "total": self._total}).encode())
        temporary = path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(self._pending, temporary)  # type: ignore[arg-type]
        except OSError:  # a file system without links
            shutil.copyfile(self._pending, temporary)  # type: ignore[arg-type]
        os.replace(temporary, path)

    def _refuse_another_warmup(self, trainer: L.Trainer) -> None:
        if self._from is None or self._from.get("folder") in (None, str(self.folder)):
            return
        starts = [
            callback.engine.schedule.start - callback.engine.schedule.watch_steps
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, SSyncCallback) and callback.engine.schedule is not None
        ]
        if starts:
            refuse_late(min(starts), trainer.global_step, self._facts(trainer), self._from)

    def _facts(self, trainer: L.Trainer) -> dict[str, Any]:
        device = trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
        return {"total": self._total, "device": name, "torch": str(torch.__version__), "processes": trainer.world_size}

    def _latest_steps(self) -> dict[str, int]:
        if self._total is None:
            return {}
        found = {}
        for switch in self.switches:
            latest = steps_of(switch["ratio"], switch["steps"], self._total) - switch["watch"]
            if latest > 0 and not (self.folder / "checkpoints" / f"{switch['name']}.ckpt").is_file():
                found[switch["name"]] = latest
        return found

    def _report(self, trainer: L.Trainer) -> None:
        self._reported = time.monotonic()
        if not trainer.is_global_zero:
            return
        facts = {"step": trainer.global_step, **self._facts(trainer), "before": self._before}
        write_bytes(self.folder / "progress.json", json.dumps(facts).encode())


def _validation_may_follow(trainer: L.Trainer, batch_idx: int, total: int | None) -> bool:
    if trainer.is_last_batch or (total is not None and trainer.global_step >= total):
        return True
    interval = trainer.val_check_batch
    if not isinstance(interval, int) or interval < 1:
        return False
    loop = trainer.fit_loop
    batches = loop.total_batch_idx + 1 if trainer.check_val_every_n_epoch is None else batch_idx + 1
    return batches % interval == 0


_watching = threading.Event()


def die_with_parent() -> None:
    """End this process and those that it started when the one that started it ends, however that happens.

    The one that started it holds the other end of standard input, which the operating system closes with it.

    Example:
        >>> die_with_parent()  # without the variable by which `ssync-pl compare` asks for it, nothing
    """
    if PIPE_VARIABLE not in os.environ or _watching.is_set():
        return
    _watching.set()
    os.environ.pop(PIPE_VARIABLE)  # processes that this one starts have another standard input
    threading.Thread(target=_watch, name="parent", daemon=True).start()


def _watch() -> None:
    # Not through sys.stdin, whose lock a thread that waits would hold at the end of the process.
    while os.read(0, 1):
        pass
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
