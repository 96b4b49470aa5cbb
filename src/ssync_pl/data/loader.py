"""The loader that all sets go through: it knows its pass, can go on in the middle of one, and copies ahead to CUDA."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from ssync_pl.data.dataset import BAD_SAMPLES, ShardBatches
from ssync_pl.data.to_device import DevicePrefetcher
from ssync_pl.errors import require

_VERSION = 1
_logger = logging.getLogger(__name__)

# Lightning warns that lengths of iterable sets may be wrong with workers; those of `ShardBatches` are exact.
warnings.filterwarnings("ignore", r"Your `IterableDataset` has `__len__` defined", UserWarning)


@dataclass(frozen=True)
class TrainerClock:
    """What the trainer of a data module counts; everything is `None` without a trainer."""

    module: L.LightningDataModule

    def current_pass(self) -> int | None:
        """Returns the trainer's epoch."""
        trainer = self.module.trainer
        if trainer is None:
            return None
        # Overfitting means the same batches again and again.
        return 0 if getattr(trainer, "overfit_batches", 0) else int(trainer.current_epoch)

    def batches_done(self) -> int | None:
        """Returns the batches of the pass that were trained on, without what was fetched ahead."""
        trainer: Any = self.module.trainer
        return None if trainer is None else int(trainer.fit_loop.epoch_loop.batch_progress.current.processed)

    def pass_length(self) -> int | None:
        """Returns the batches after which the trainer ends a pass; `None` when it has no end."""
        trainer = self.module.trainer
        length = float("inf") if trainer is None else trainer.num_training_batches
        return None if length == float("inf") else int(length)

    def whole_steps(self, batches: int) -> int:
        """Returns the batches up to the last optimizer step: gradients of an accumulation are in no checkpoint."""
        return batches - batches % getattr(self.module.trainer, "accumulate_grad_batches", 1)

    def go_back(self, batch: int) -> None:
        """Lets a resumed trainer count the batches of an unfinished accumulation again."""
        trainer = self.module.trainer
        loop: Any = None if trainer is None else trainer.fit_loop.epoch_loop
        if trainer is None or not getattr(loop, "restarting", False):
            return
        surplus = loop.batch_progress.current.ready - batch
        if 0 < surplus < trainer.accumulate_grad_batches:
            loop.update_restart_stage()
            for counts in (loop.batch_progress.current, loop.batch_progress.total):
                for name in ("ready", "started", "processed", "completed"):
                    setattr(counts, name, getattr(counts, name) - surplus)
            # Lightning adds the step before, which the checkpoint has.
            loop._batches_that_stepped -= int(loop.restarted_on_train_batch_end)

    def note_epoch(self) -> None:
        """Counts the running epoch where Lightning left it out: when it resumed at the last batch of the one before."""
        trainer: Any = self.module.trainer
        if getattr(trainer, "training", False):
            progress = trainer.fit_loop.epoch_progress
            if progress.current.ready == progress.current.processed:
                progress.increment_ready()
                progress.increment_started()


class _Place(NamedTuple):
    epoch: int
    batch: int


class ShardLoader(DataLoader[dict[str, Any]]):
    """A `DataLoader` whose passes are numbered and can be gone on with in the middle.

    Batch k of pass e of mapped shards is a function of (seed, rank, world, e, k), so all that a checkpoint has to hold
    are two numbers; Lightning saves and restores them by `state_dict` and `load_state_dict`. Batches that were fetched
    ahead but never trained on are not counted. A stream goes on at the start of a shard. Without a trainer, each loop
    over the loader is another pass. `device` is where batches are copied to, one ahead of their use; `on_bad` is called
    with the bad samples of each batch; `leave_out` leaves out batches that hold nothing but stand-ins of bad samples,
    which only works where one process reads.
    """

    dataset: ShardBatches

    def __init__(
        self,
        dataset: ShardBatches,
        clock: TrainerClock | None = None,
        device: torch.device | None = None,
        on_bad: Callable[[list[tuple[str, str]]], None] | None = None,
        leave_out: bool = False,
        **options: Any,
    ) -> None:
        # Base seeds of workers are drawn from here, so that a loader leaves the run's own random numbers alone.
        options.setdefault("generator", torch.Generator())
        super().__init__(dataset, **{**options, "batch_size": None})
        self.clock = clock
        self.on_bad, self.leave_out = on_bad, leave_out
        self._prefetcher = None if device is None else DevicePrefetcher(device)  # one side stream for all passes
        self.device = device
        self._resumed: _Place | None = None
        self._loaded: dict[str, Any] | None = None
        self._place, self._ended = _Place(0, 0), False

    def __iter__(self) -> Any:
        place = self._next_place()
        self.dataset.set_pass(*place)
        if place.batch and self.clock is not None:
            self.clock.go_back(place.batch)
        if place.epoch != self._place.epoch or place.batch > self._place.batch:
            # A second iterator over the same pass does not turn the count back.
            self._place, self._ended = place, False
        if self.num_workers and self._iterator is None:  # workers are started now, and may be kept for the next pass
            # A forked worker that collects what PyAV left behind waits for decoding threads that it does not have.
            gc.collect()
        batches = self._without_bad(super().__iter__())
        return self._count(batches if self._prefetcher is None else self._prefetcher(batches), place)

    def state_dict(self) -> dict[str, Any]:
        """Returns how far the current pass has come: pass, batches trained on, and what the partition depends on."""
        done, length = self._place.batch, self._length()
        trained = None if self.clock is None else self.clock.batches_done()
        done = done if trained is None else min(done, trained)
        ended = self._ended and done == self._place.batch
        if self.clock is not None and not ended and done != self.clock.pass_length():
            done = self.clock.whole_steps(done)
        place = {"pass": self._place.epoch, "batches": done, "ended": ended}
        return {"version": _VERSION, **place, **self._partition(), "length": length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the next iteration go on where another loader stopped."""
        expected, advice = f"the state of a loader, version {_VERSION}", "Resume with the release that wrote it."
        require(state.get("version") == _VERSION, expected, dict(state), advice=advice)
        place, length = _Place(int(state["pass"]), int(state["batches"])), state["length"]
        if state["ended"] or (length is not None and place.batch >= int(length)):
            place = _Place(place.epoch + 1, 0)
        now = self._partition()
        changed = [f"{name} was {state.get(name)}, is {now[name]}" for name in now if state.get(name) != now[name]]
        # The data module and Lightning both hand over the same state.
        told, self._loaded = self._loaded == dict(state), dict(state)
        if place.batch and changed and not told:
            _logger.warning(
                "The checkpoint lies in the middle of pass %d, and the data are shared out otherwise now (%s): in the "
                "rest of this pass some videos come twice and others not at all. The next pass is exact again.",
                place.epoch,
                "; ".join(changed),
            )
        self._resumed = place

    def _next_place(self) -> _Place:
        if self._resumed is not None:
            place, self._resumed = self._resumed, None
            return place
        epoch = None if self.clock is None else self.clock.current_pass()
        if epoch is None:
            epoch = self._place.epoch + bool(self._place.batch)
        return _Place(epoch, 0)

    def _length(self) -> int | None:
        length = None if self.clock is None else self.clock.pass_length()
        return len(self) if length is None and self.dataset.clips is not None else length

    def _partition(self) -> dict[str, Any]:
        """What the order of batches depends on."""
        data = self.dataset
        mix = list(data.source.weights) or None
        return {"seed": data.rules.seed, "world": data.world, "size": data.batch_size, "items": data.clips, "mix": mix}

    def _without_bad(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            bad = batch.pop(BAD_SAMPLES, [])
            if bad and self.on_bad is not None:
                self.on_bad(bad)
            if not (bad and self.leave_out and not batch["batch_padding_mask"].any()):
                yield batch

    def _count(self, batches: Iterator[dict[str, Any]], place: _Place) -> Iterator[dict[str, Any]]:
        done = place.batch
        for batch in batches:
            done += 1
            if place.epoch == self._place.epoch:
                self._place = _Place(place.epoch, max(done, self._place.batch))
            yield batch
        self._ended = place.epoch == self._place.epoch and done == self._place.batch
