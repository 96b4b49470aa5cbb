"""The loader that all sets go through: it knows its pass, can go on in the middle of one, and feeds the device."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from ssync_pl.data.prefetch import DevicePrefetcher
from ssync_pl.data.sampling import TrainSampler
from ssync_pl.data.stream import ShardStream
from ssync_pl.errors import ConfigError

__all__ = ["ShardLoader", "TrainerClock"]

_VERSION = 1
_logger = logging.getLogger(__name__)


class TrainerClock:
    """The clock of a data module's trainer; without a trainer nobody counts.

    Args:
        module: The data module, whose `trainer` Lightning sets.

    Example:
        >>> TrainerClock(L.LightningDataModule()).current_pass() is None
        True
    """

    def __init__(self, module: L.LightningDataModule) -> None:
        self._module = module

    def current_pass(self) -> int | None:
        """Number of the pass.

        Returns:
            The trainer's epoch.
        """
        trainer = self._module.trainer
        if trainer is None:
            return None
        # Overfitting means the same batches again and again.
        return 0 if getattr(trainer, "overfit_batches", 0) else int(trainer.current_epoch)

    def batches_done(self) -> int | None:
        """Batches of the pass that were trained on.

        Returns:
            The trainer's count, which leaves out what was fetched ahead.
        """
        trainer = self._module.trainer
        if trainer is None:
            return None
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.processed)

    def pass_length(self) -> int | None:
        """Batches after which the trainer ends a pass.

        Returns:
            Number of batches; `None` when it has no end.
        """
        trainer = self._module.trainer
        length = float("inf") if trainer is None else trainer.num_training_batches
        return None if length == float("inf") else int(length)


@dataclass(frozen=True)
class _Place:
    epoch: int
    batch: int


class ShardLoader(DataLoader[dict[str, Any]]):
    """A `DataLoader` whose passes are numbered and can be gone on with in the middle.

    Batch k of pass e is a function of (seed, rank, world, e, k), so all that a checkpoint has to hold are two numbers;
    Lightning saves and restores them by `state_dict` and `load_state_dict`. Batches that were fetched ahead but never
    trained on are not counted. The number of workers may change in between.

    Args:
        dataset: A map-style set with a `TrainSampler` (or any sampler, then without resuming), or a `ShardStream`.
        clock: Who counts passes and batches; `None` lets the loader count by itself.
        device: Where batches are copied to, one ahead of their use; `None` leaves that to the caller.
        **options: Options of `torch.utils.data.DataLoader`.

    Example:
        >>> from ssync_pl.data.samples import SampleRules
        >>> stream = ShardStream([], [], SampleRules(clip_length=2), batch_size=2)
        >>> loader = ShardLoader(stream, batch_size=2)
        >>> list(loader), loader.state_dict()["batches"]
        ([], 0)
    """

    def __init__(
        self, dataset: Any, clock: TrainerClock | None = None, device: torch.device | None = None, **options: Any
    ) -> None:
        # Base seeds of workers are drawn from here, so that a loader leaves the run's own random numbers alone.
        options.setdefault("generator", torch.Generator())
        super().__init__(dataset, **options)
        self.clock = clock
        self.device = device
        self._lanes: int | None = None
        self._resumed: _Place | None = None
        self._loaded: dict[str, Any] | None = None
        self._prefetcher: DevicePrefetcher | None = None
        self._ended = False
        self._place = _Place(0, 0)

    def __iter__(self) -> Any:
        place = self._next_place()
        source = self._source()
        if isinstance(source, ShardStream):
            source.set_pass(place.epoch, place.batch, self._lanes)
        elif source is not None:
            source.set_epoch(place.epoch)
            source.set_start(place.batch * (self.batch_size or 1))
        if place.epoch != self._place.epoch or place.batch > self._place.batch:
            # Somebody who only peeks into the pass does not turn it back.
            self._place, self._ended = place, False
        batches: Any = super().__iter__()
        if self.num_workers == 0 and isinstance(source, TrainSampler) and hasattr(batches, "_sampler_iter"):
            # The order is drawn now: a sampler that is set to another pass before the first batch must not change it.
            batches._sampler_iter = iter(list(self.batch_sampler or ()))
        if self.device is not None:
            if self._prefetcher is None:
                self._prefetcher = DevicePrefetcher(self.device)  # one side stream for all passes
            batches = self._prefetcher(batches)
        return self._count(batches, place)

    def state_dict(self) -> dict[str, Any]:
        """Say how far the current pass has come.

        Returns:
            Pass, batches trained on, and what the partition depends on.
        """
        done = self._place.batch
        trained = None if self.clock is None else self.clock.batches_done()
        if trained is not None:
            done = min(done, trained)
        ended = self._ended and done == self._place.batch
        place = {"pass": self._place.epoch, "batches": done, "ended": ended}
        return {"version": _VERSION, **place, **self._partition()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on where another loader stopped.

        In the middle of a pass the batches to come are those of the interrupted run if the data, the seed, the batch
        size and the number of processes are the same. If not, a warning says so; the next pass is exact again. To
        change the number of processes or the batch size, resume from a checkpoint that was written at the end of an
        epoch: Lightning counts batches, and cuts a pass of another length short.

        Args:
            state: What `state_dict` gave.

        Raises:
            ConfigError: The state is of another version or no such state.
        """
        if state.get("version") != _VERSION:
            raise ConfigError(
                f"Expected the state of a loader, version {_VERSION}, but got {dict(state)}. Resume with the release "
                "that wrote the checkpoint."
            )
        place = _Place(int(state["pass"]), int(state["batches"]))
        length = state["length"]
        if state["ended"] or (length is not None and place.batch >= int(length)):
            place = _Place(place.epoch + 1, 0)
        now = self._partition()
        if now["lanes"] is not None and state["lanes"] is not None and isinstance(self.dataset, ShardStream):
            # A stream keeps its lanes for the rest of the run: its batches depend on them, not on the workers.
            self._lanes = now["lanes"] = int(state["lanes"])
        changed = [
            f"{name} was {state[name]}, is {now[name]}"
            for name in ("seed", "world", "size", "items", "lanes", "buffer", "mix")
            if state[name] != now[name]
        ]
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
            source = self._source()
            epoch = 0 if source is None else source.epoch
            if isinstance(source, ShardStream) and epoch == self._place.epoch and self._place.batch:
                epoch += 1  # nobody but this loader tells a stream its pass
        return _Place(int(epoch), 0)

    def _source(self) -> TrainSampler | ShardStream | None:
        if isinstance(self.dataset, ShardStream):
            return self.dataset
        return self.sampler if isinstance(self.sampler, TrainSampler) else None

    def _partition(self) -> dict[str, Any]:
        length = None if self.clock is None else self.clock.pass_length()
        source = self._source()
        facts: dict[str, Any] = dict.fromkeys(("seed", "world", "items", "lanes", "buffer", "mix"))
        if isinstance(source, ShardStream):
            facts |= {
                "seed": source.rules.seed,
                "world": source.world,
                "items": source.clips,
                "lanes": self._lanes or source.lanes,
                "buffer": source.shuffle_buffer,
                "mix": None if source.takes is None else zlib.crc32(repr([*map(tuple, source.takes(0))]).encode()),
            }
        elif source is not None:
            facts |= {"seed": source.seed, "world": source.num_replicas, "items": source.clips}
            facts["mix"] = [[len(members), weight] for members, weight in source.mix] or None
        if length is None:
            try:
                length = len(self)
            except TypeError:  # a stream without an index
                length = None
        return {**facts, "size": self.batch_size, "length": length}

    def _count(self, batches: Iterator[dict[str, Any]], place: _Place) -> Iterator[dict[str, Any]]:
        done = place.batch
        for batch in batches:
            done += 1
            if place.epoch == self._place.epoch:
                self._place = _Place(place.epoch, max(done, self._place.batch))
            yield batch
        self._ended = place.epoch == self._place.epoch and done == self._place.batch
        source = self._source()
        if isinstance(source, TrainSampler) and (self.clock is None or self.clock.current_pass() is None):
            # A plain loop over the loader gets another pass each time, unless it names one by `set_epoch`.
            source.set_epoch(place.epoch + 1)
