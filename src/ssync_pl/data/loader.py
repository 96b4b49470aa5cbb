"""The loader that all sets go through: it knows its pass, can go on in the middle of one, and copies ahead to CUDA."""

import functools
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from ssync_pl.data.dataset import BAD_SAMPLES, ShardBatches
from ssync_pl.errors import require

_VERSION = 1
_logger = logging.getLogger(__name__)

# Lightning warns that lengths of iterable sets may be wrong with workers; those of `ShardBatches` are exact.
warnings.filterwarnings("ignore", r"Your `IterableDataset` has `__len__` defined", UserWarning)


class ShardLoader(DataLoader[dict[str, Any]]):
    """A `DataLoader` whose passes (the epochs of `trainer`) are numbered and can be gone on with in the middle.

    A checkpoint holds two numbers, as batch k of pass e is a function of (seed, rank, world, e, k); what was fetched
    ahead but never trained on does not count. Batches are copied to `device` one ahead. `on_bad` takes (place, message)
    of bad samples; `leave_out` leaves out batches of stand-ins only, which is right where one process reads.
    """

    dataset: ShardBatches

    def __init__(
        self,
        dataset: ShardBatches,
        trainer: Any = None,
        device: torch.device | None = None,
        on_bad: Callable[[list[tuple[str, str]]], None] | None = None,
        leave_out: bool = False,
        **options: Any,
    ) -> None:
        # Base seeds of workers are drawn from here, so that a loader leaves the run's own random numbers alone.
        options.setdefault("generator", torch.Generator())
        super().__init__(dataset, **{**options, "batch_size": None})
        self.trainer, self.device, self.on_bad, self.leave_out = trainer, device, on_bad, leave_out
        self._resumed: tuple[int, int] | None = None
        self._pass, self._batches, self._ended = 0, 0, False

    def __iter__(self) -> Any:
        place = (self._pass + bool(self._batches), 0)
        if self._resumed is not None:
            place, self._resumed = self._resumed, None
        elif self.trainer is not None:
            # Overfitting means the same batches again and again.
            place = (0 if getattr(self.trainer, "overfit_batches", 0) else int(self.trainer.current_epoch), 0)
        self.dataset.set_pass(*place)
        if place[1] and self.trainer is not None:
            _go_back(self.trainer, place[1])
        if place[0] != self._pass or place[1] > self._batches:
            # A second iterator over the same pass does not turn the count back.
            (self._pass, self._batches), self._ended = place, False
        if self.num_workers and self._iterator is None:  # workers are started now, and may be kept for the next pass
            # A forked worker that collects what PyAV left behind waits for decoding threads that it does not have.
            gc.collect()
        batches = super().__iter__()
        return self._count(batches if self.device is None else copied_ahead(batches, self.device), *place)

    def state_dict(self) -> dict[str, Any]:
        """Returns how far the current pass has come: pass, batches trained on, and what the partition depends on."""
        done, length = self._batches, self._length()
        if self.trainer is not None:
            done = min(done, int(self.trainer.fit_loop.epoch_loop.batch_progress.current.processed))
        ended = self._ended and done == self._batches
        if self.trainer is not None and not ended and done != length:
            # Gradients of an unfinished accumulation are in no checkpoint.
            done -= done % accumulated_batches(self.trainer, self.trainer.current_epoch)
        place = {"pass": self._pass, "batches": done, "ended": ended}
        return {"version": _VERSION, **place, **self._partition(), "length": length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the next iteration go on where another loader stopped."""
        expected, advice = f"the state of a loader, version {_VERSION}", "Resume with the release that wrote it."
        require(state.get("version") == _VERSION, expected, dict(state), advice=advice)
        epoch, batch, length = int(state["pass"]), int(state["batches"]), state["length"]
        if state["ended"] or (length is not None and batch >= int(length)):
            epoch, batch = epoch + 1, 0
        now = self._partition()
        changed = [f"{name} was {state.get(name)}, is {now[name]}" for name in now if state.get(name) != now[name]]
        if batch and changed:
            _logger.warning(
                "The checkpoint lies in the middle of pass %d, and the data are shared out otherwise now (%s): in the "
                "rest of this pass some videos come twice and others not at all. The next pass is exact again.",
                epoch,
                "; ".join(changed),
            )
        self._resumed = (epoch, batch)

    def _length(self) -> int | None:
        """Batches after which a pass ends: those of the trainer where it says them."""
        length = float("inf") if self.trainer is None else self.trainer.num_training_batches
        if length == float("inf"):
            return len(self) if self.dataset.clips is not None else None
        return int(length)

    def _partition(self) -> dict[str, Any]:
        """What the order of batches depends on."""
        data = self.dataset
        return {"seed": data.rules.seed, "world": data.world, "size": data.batch_size, "items": data.clips}

    def _count(self, batches: Iterator[dict[str, Any]], epoch: int, done: int) -> Iterator[dict[str, Any]]:
        for batch in batches:
            bad = batch.pop(BAD_SAMPLES, [])
            if bad and self.on_bad is not None:
                self.on_bad(bad)
            if bad and self.leave_out and not batch["batch_padding_mask"].any():
                continue
            done += 1
            if epoch == self._pass:
                self._batches = max(done, self._batches)
            yield batch
        self._ended = epoch == self._pass and done == self._batches


def accumulated_batches(trainer: Any, epoch: int) -> int:
    """Returns the batches that a Trainer accumulates into an optimizer step in this epoch."""
    # Lightning's GradientAccumulationScheduler, of either namespace.
    found = [c for c in getattr(trainer, "callbacks", ()) if hasattr(c, "get_accumulate_grad_batches")]
    return found[0].get_accumulate_grad_batches(epoch) if found else getattr(trainer, "accumulate_grad_batches", 1)


def mend_restart(trainer: Any) -> None:
    """Keeps a training by max_steps that resumes at the end of an epoch from ending that epoch twice."""
    loop = trainer.fit_loop
    if getattr(loop, "restarted_on_epoch_end", False):
        loop.epoch_progress.increment_completed()
        loop.reset_restart_stage()
        loop._restarting = loop.epoch_loop.restarting = False


def mend_resume(trainer: Any) -> None:
    """Sets right, before a training batch, what a resumed Lightning leaves out: the epoch's count and accumulation."""
    if getattr(trainer, "training", False):
        progress = trainer.fit_loop.epoch_progress
        # Resumed at the last batch of the epoch before; the next resume would train one epoch too many.
        if progress.current.ready == progress.current.processed:
            progress.increment_ready()
            progress.increment_started()
        trainer.accumulate_grad_batches = accumulated_batches(trainer, trainer.current_epoch)


def _go_back(trainer: Any, batch: int) -> None:
    """Lets a resumed trainer count the batches of an unfinished accumulation again."""
    loop = trainer.fit_loop.epoch_loop
    surplus = loop.batch_progress.current.ready - batch if getattr(loop, "restarting", False) else 0
    if 0 < surplus < accumulated_batches(trainer, trainer.current_epoch):
        loop.update_restart_stage()
        for counts in (loop.batch_progress.current, loop.batch_progress.total):
            for name in ("ready", "started", "processed", "completed"):
                setattr(counts, name, getattr(counts, name) - surplus)
        # Lightning adds the step before, which the checkpoint has.
        loop._batches_that_stepped -= int(loop.restarted_on_train_batch_end)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all passes: memory is kept per stream


def copied_ahead(batches: Iterator[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Brings batches to a CUDA device one ahead of their use, so that copies from page-locked memory overlap with work.

    They have a stream of their own, for which the computing stream waits by an event, never the host.
    """
    side, ahead = _side_stream(device), None
    for batch in batches:
        with torch.cuda.stream(side):
            following = move_data_to_device(batch, device), side.record_event()
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = following
    if ahead is not None:
        yield _arrived(*ahead, device)


def _arrived(batch: dict[str, Any], copied: torch.cuda.Event, device: torch.device) -> dict[str, Any]:
    computing = torch.cuda.current_stream(device)
    computing.wait_event(copied)
    # The allocator must not hand the memory out again before the computing stream is done with it.
    apply_to_collection(batch, Tensor, Tensor.record_stream, computing)
    return batch
