"""Samplers and the loader that all sets go through: it knows its pass and can go on in the middle of one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from ssync_pl.data.dataset import BAD_SAMPLES
from ssync_pl.data.sampling import eval_share, mixed_pass, permutation, require_rank, train_share
from ssync_pl.data.stream import ShardStream
from ssync_pl.data.to_device import DevicePrefetcher
from ssync_pl.errors import ConfigError

__all__ = ["EvalSampler", "ShardLoader", "TrainSampler", "TrainerClock"]

_VERSION = 1
_logger = logging.getLogger(__name__)


class TrainSampler(DistributedSampler[int]):
    """Yield this rank's shuffled clips; the pass travels inside the index."""

    def __init__(
        self, clips: int, seed: int = 0, rank: int = 0, world: int = 1, mix: Sequence[tuple[np.ndarray, float]] = ()
    ) -> None:
        require_rank(rank, world)
        super().__init__(range(clips), num_replicas=world, rank=rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.clips = clips
        self.mix = list(mix)
        self.start = 0
        self.on_named: Callable[[], None] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set the pass; Lightning does so before each epoch."""
        super().set_epoch(epoch)
        if self.on_named is not None:
            self.on_named()

    def __iter__(self) -> Iterator[int]:
        if self.mix:
            order = mixed_pass(self.clips, self.mix, self.seed, self.epoch)
        else:
            order = permutation(self.clips, self.seed, self.epoch) + self.epoch * self.clips
        # A resumed run has had the first items already.
        return iter(train_share(order, self.rank, self.num_replicas)[self.start :].tolist())

    def __len__(self) -> int:
        return self.clips // self.num_replicas


class EvalSampler(DistributedSampler[int]):
    """Yield this rank's videos for evaluation; indices from `videos` on are repeats that only pad."""

    def __init__(self, videos: int, rank: int = 0, world: int = 1) -> None:
        require_rank(rank, world)
        super().__init__(range(videos), num_replicas=world, rank=rank, shuffle=False, drop_last=False)  # type: ignore[arg-type]
        self.videos = videos

    def __iter__(self) -> Iterator[int]:
        items, real = eval_share(self.videos, self.rank, self.num_replicas)
        return iter(np.where(real, items, items + self.videos).tolist())

    def __len__(self) -> int:
        return -(-self.videos // self.num_replicas)


@dataclass(frozen=True)
class TrainerClock:
    """What the trainer of a data module counts; everything is `None` without a trainer."""

    module: L.LightningDataModule

    def current_pass(self) -> int | None:
        """Return the trainer's epoch."""
        trainer = self.module.trainer
        if trainer is None:
            return None
        # Overfitting means the same batches again and again.
        return 0 if getattr(trainer, "overfit_batches", 0) else int(trainer.current_epoch)

    def batches_done(self) -> int | None:
        """Return the batches of the pass that were trained on, without what was fetched ahead."""
        trainer = self.module.trainer
        if trainer is None:
            return None
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.processed)

    def pass_length(self) -> int | None:
        """Return the batches after which the trainer ends a pass; `None` when it has no end."""
        trainer = self.module.trainer
        length = float("inf") if trainer is None else trainer.num_training_batches
        return None if length == float("inf") else int(length)

    def whole_steps(self, batches: int) -> int:
        """Return the batches up to the last optimizer step: gradients of an accumulation are in no checkpoint."""
        trainer = self.module.trainer
        return batches - batches % getattr(trainer, "accumulate_grad_batches", 1)

    def go_back(self, batch: int) -> None:
        """Let a resumed trainer count the batches of an unfinished accumulation again."""
        trainer = self.module.trainer
        loop: Any = None if trainer is None else trainer.fit_loop.epoch_loop
        if trainer is None or not getattr(loop, "restarting", False):
            return
        surplus = loop.batch_progress.current.ready - batch
        if 0 < surplus < trainer.accumulate_grad_batches:
            for counts in (loop.batch_progress.current, loop.batch_progress.total):
                for name in ("ready", "started", "processed", "completed"):
                    setattr(counts, name, getattr(counts, name) - surplus)
            # Lightning adds the step before, which the checkpoint has.
            loop._batches_that_stepped -= int(loop.restarted_on_train_batch_end)

    def note_epoch(self) -> None:
        """Count the running epoch where Lightning left it out: when it resumed at the last batch of the one before."""
        trainer = self.module.trainer
        if getattr(trainer, "training", False):
            progress: Any = trainer.fit_loop.epoch_progress  # type: ignore[union-attr]
            if progress.current.ready == progress.current.processed:
                progress.increment_ready()
                progress.increment_started()


@dataclass(frozen=True)
class _Place:
    epoch: int
    batch: int


class ShardLoader(DataLoader[dict[str, Any]]):
    """A `DataLoader` whose passes are numbered and can be gone on with in the middle.

    Batch k of pass e of mapped shards is a function of (seed, rank, world, e, k), so all that a checkpoint has to hold
    are two numbers; Lightning saves and restores them by `state_dict` and `load_state_dict`. Batches that were fetched
    ahead but never trained on are not counted. A stream goes on at the start of a shard.

    Args:
        dataset: A map-style set, or a `ShardStream`, which emits whole batches.
        clock: Who counts passes and batches; `None` lets the loader count by itself.
        device: Where batches are copied to, one ahead of their use; `None` leaves that to the caller.
        on_bad: Called with the bad samples of each batch, as (place, message).
        leave_out: Leave out batches that hold nothing but stand-ins of bad samples: only where one process reads.
        **options: Options of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        clock: TrainerClock | None = None,
        device: torch.device | None = None,
        on_bad: Callable[[list[tuple[str, str]]], None] | None = None,
        leave_out: bool = False,
        **options: Any,
    ) -> None:
        # Base seeds of workers are drawn from here, so that a loader leaves the run's own random numbers alone.
        options.setdefault("generator", torch.Generator())
        super().__init__(dataset, **options)
        self.clock = clock
        self.device = device
        self.on_bad, self.leave_out = on_bad, leave_out
        self._resumed: _Place | None = None
        self._loaded: dict[str, Any] | None = None
        self._prefetcher: DevicePrefetcher | None = None
        self._ended = False
        self._place = _Place(0, 0)

    def __iter__(self) -> Any:
        place = self._next_place()
        source = self._source()
        if isinstance(source, ShardStream):
            source.set_pass(place.epoch, place.batch)
        elif source is not None:
            source.on_named = None
            source.set_epoch(place.epoch)
            source.start = place.batch * (self.batch_size or 1)
            # Without a reference to the loader: a cycle would keep its workers until the garbage is collected.
            source.on_named = None if self.clock is None else partial(self.clock.go_back, place.batch)
        if place.epoch != self._place.epoch or place.batch > self._place.batch:
            # A second iterator over the same pass does not turn the count back.
            self._place, self._ended = place, False
        batches: Any = super().__iter__()
        if self.num_workers == 0 and isinstance(source, TrainSampler) and hasattr(batches, "_sampler_iter"):
            # The order is drawn now: a sampler that is set to another pass before the first batch must not change it.
            batches._sampler_iter = iter(list(self.batch_sampler or ()))
        batches = self._without_bad(batches)
        if self.device is not None:
            if self._prefetcher is None:
                self._prefetcher = DevicePrefetcher(self.device)  # one side stream for all passes
            batches = self._prefetcher(batches)
        return self._count(batches, place)

    def state_dict(self) -> dict[str, Any]:
        """Return how far the current pass has come: pass, batches trained on, and what the partition depends on."""
        done = self._place.batch
        trained = None if self.clock is None else self.clock.batches_done()
        if trained is not None:
            done = min(done, trained)
        ended = self._ended and done == self._place.batch
        length = None if self.clock is None else self.clock.pass_length()
        if self.clock is not None and not ended and done != length:
            done = self.clock.whole_steps(done)
        place = {"pass": self._place.epoch, "batches": done, "ended": ended}
        return {"version": _VERSION, **place, **self._partition()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on where another loader stopped."""
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
        changed = [
            f"{name} was {state.get(name)}, is {now[name]}"
            for name in ("seed", "world", "size", "items", "mix")
            if state.get(name) != now[name]
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
                epoch += 1  # only this loader tells a stream its pass
        return _Place(int(epoch), 0)

    def _source(self) -> TrainSampler | ShardStream | None:
        if isinstance(self.dataset, ShardStream):
            return self.dataset
        return self.sampler if isinstance(self.sampler, TrainSampler) else None

    def _partition(self) -> dict[str, Any]:
        length = None if self.clock is None else self.clock.pass_length()
        source = self._source()
        size = source.batch_size if isinstance(source, ShardStream) else self.batch_size
        facts: dict[str, Any] = dict.fromkeys(("seed", "world", "items", "mix"))
        if isinstance(source, ShardStream):
            mix = [[size, weight] for size, weight in source.mix] or None
            facts = {"seed": source.rules.seed, "world": source.world, "items": source.clips, "mix": mix}
        elif source is not None:
            mix = [[len(members), weight] for members, weight in source.mix] or None
            facts = {"seed": source.seed, "world": source.num_replicas, "items": source.clips, "mix": mix}
        if length is None:
            try:
                length = len(self)
            except TypeError:  # a stream without an index
                length = None
        return {**facts, "size": size, "length": length}

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
        source = self._source()
        if isinstance(source, TrainSampler) and (self.clock is None or self.clock.current_pass() is None):
            # A plain loop over the loader gets another pass each time, unless it names one by `set_epoch`.
            source.set_epoch(place.epoch + 1)
