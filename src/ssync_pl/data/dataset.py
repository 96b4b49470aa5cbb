"""Sets of shards and their passes: who reads which clip when, and batches of clips that are read in place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ssync_pl.data.decode import MAX_MEMBER_BYTES
from ssync_pl.data.index import ShardEntry, load_shards, scan_shard
from ssync_pl.data.patterns import Patterns, find_shards, is_compressed, is_remote
from ssync_pl.data.remote import fetch_index
from ssync_pl.data.samples import Members, SampleRules, count_objects, eval_sample, train_sample
from ssync_pl.data.sampling import mixed_rows, permutation, rank_part, shares_by_weight
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ShardError, require, require_shard

if TYPE_CHECKING:
    from ssync_pl.data.features.store import FeatureStore

BAD_SAMPLES = "__bad_samples__"
"""Batch entry that carries skipped samples to the main process, as (place, message)."""

Backend = Literal["auto", "mmap", "webdataset"]
"""Who reads the shards; `auto` reads plain local tars in place and streams all else."""

_SET_SEED = 0x9E3779B97F4A7C15  # each mixed set has an order of its own, or equal sizes would go in step


@dataclass(frozen=True)
class ShardSource:
    """Opened shards of one split."""

    shards: list[str]
    entries: list[ShardEntry] | None  # in the same order; None when remote shards have no index
    mapped: bool = True  # whether they are read in place rather than streamed
    sizes: tuple[int, ...] = ()  # shards of each mixed set, in order
    weights: tuple[float, ...] = ()  # of the mixed sets; empty when nothing is mixed


def open_source(patterns: Patterns, argument: str, backend: Backend = "auto") -> ShardSource:
    """Finds the shards of a split and their index."""
    shards, sizes, weights = find_shards(patterns, argument)
    remote, packed = is_remote(shards[0]), any(map(is_compressed, shards))
    expected = f"argument `{argument}` to be plain local tars for backend='mmap'"
    advice = "Take backend='webdataset', or copy and unpack the shards."
    require(backend != "mmap" or not (remote or packed), expected, shards[0], advice=advice)
    entries: list[ShardEntry] | None
    if remote:
        entries = fetch_index(shards)
    elif packed:
        entries = [scan_shard(shard, packed=is_compressed(shard)) for shard in shards]
    else:
        entries = load_shards(shards)
    expected = f"`index.json` beside the remote shards of `{argument}` to mix them by weight"
    advice = "Put the one that ShardWriter wrote there, or download the shards."
    require_shard(entries is not None or not weights, expected, "none", advice=advice)
    filled = entries is None or any(entry.samples for entry in entries)
    require_shard(filled, f"at least one sample in the shards of `{argument}`", f"none in {shards[0]}")
    return ShardSource(shards, entries, not remote and not packed and backend != "webdataset", sizes, weights)


class ShardBatches(IterableDataset[dict[str, Any]]):
    """Batches of the clips, or in evaluation of the videos, of a source: each comes to one worker of one rank.

    All ranks emit equally many batches, and evaluation sees each video once, at any number of ranks and workers. What
    a pass holds is a function of (seed, pass). Without an index the length is unknown, and only one process may read.
    `skip_bad` puts a readable sample in place of one that is not, instead of raising.
    """

    together = False  # whether a rank reads the pass in one piece

    def __init__(
        self,
        source: ShardSource,
        rules: SampleRules,
        batch_size: int = 1,
        clips_per_video: int = 1,
        skip_bad: bool = False,
        max_bytes: int = MAX_MEMBER_BYTES,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.source, self.rules, self.batch_size = source, rules, batch_size
        self.repeats = clips_per_video if rules.training else 1
        self.skip_bad, self.max_bytes = skip_bad, max_bytes
        self.rank, self.world = rank, world
        self.samples = [(n, sample) for n, entry in enumerate(source.entries or ()) for sample in entry.samples]
        # Shared memory, so that workers that outlive a pass see the next one: pass, first batch.
        self._state = torch.zeros(2, dtype=torch.int64).share_memory_()
        ends = np.cumsum([0, *(len(entry.samples) for entry in source.entries or ())]).tolist()
        visits = len(self.samples) * np.arange(self.repeats)
        shards = [(np.arange(begin, end)[:, None] + visits).ravel() for begin, end in pairwise(ends)]
        # The clips of each shard of each mixed set
        self._sets = [shards[begin:end] for begin, end in pairwise(np.cumsum([0, *(source.sizes or (len(shards),))]))]
        self._sizes = [sum(map(len, clips)) for clips in self._sets]
        if rules.training and source.weights:
            shares = shares_by_weight(sum(self._sizes), source.weights)
            expected, advice = "every mixed set to give clips to each pass", "Raise its weight, or leave it out."
            require(min(*shares, *self._sizes) > 0, expected, f"{shares} of {self._sizes} clips", advice=advice)

    @property
    def epoch(self) -> int:
        """Number of the next pass."""
        return int(self._state[0])

    @property
    def clips(self) -> int | None:
        """Clips of a pass on all ranks together, or `None` without an index."""
        return None if self.source.entries is None else len(self.samples) * self.repeats

    def set_pass(self, epoch: int, start: int = 0) -> None:
        """Sets what the next iteration emits, for the workers that run and those to come."""
        self._state.copy_(torch.tensor([epoch, start]))

    def __len__(self) -> int:
        if self.clips is None:
            raise TypeError(
                "The length of remote shards is unknown without an index. Put `index.json` beside the shards, or set "
                "`max_steps` and `limit_train_batches`."
            )
        size = self.world * self.batch_size
        return self.clips // size if self.rules.training else -(-self.clips // size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        return self.emit(0, 1) if info is None else self.emit(info.id, info.num_workers)

    def emit(self, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        """Emits the batches of one of several workers; pass and start are those of this moment."""
        raise NotImplementedError

    def part(self, epoch: int) -> np.ndarray:
        """Returns the numbers of this rank's clips in their order; `sampling` says what they mean."""
        order = self._order(epoch) if self.rules.training else np.arange(len(self.samples))
        place = (self.rank, self.world, self.batch_size)
        return rank_part(order, *place, training=self.rules.training, together=self.together)

    def place(self, clip: int) -> tuple[int, int, int, bool]:
        """Returns the visit, repeat and video of a clip's number, and whether it counts rather than pads."""
        visit, rest = divmod(int(clip), len(self.samples) * self.repeats)
        repeat, video = divmod(rest, len(self.samples))
        return visit, repeat, video, self.rules.training or visit == 0

    def cut(self, members: Members, shard: str, key: str, visit: int, repeat: int) -> dict[str, Any]:
        """Cuts one clip, or takes the whole video in evaluation; draws hang on the shard's name and the key."""
        if self.rules.training:
            sample = train_sample(members, f"{shard}/{key}", self.rules, visit, repeat)
        else:
            sample = eval_sample(members, self.rules)
        return {**sample, "__key__": key}

    def _order(self, epoch: int) -> np.ndarray:
        seed, weights = self.rules.seed, self.source.weights
        if not weights:
            return self._shuffled(self._sets[0], seed, epoch) + epoch * len(self.samples) * self.repeats

        def visit_order(number: int, visit: int) -> np.ndarray:
            return self._shuffled(self._sets[number], seed + (number + 1) * _SET_SEED, visit)

        return self._blended(mixed_rows(self._sizes, weights, visit_order, epoch), epoch)

    def _shuffled(self, chunks: list[np.ndarray], seed: int, visit: int) -> np.ndarray:
        raise NotImplementedError

    def _blended(self, rows: list[np.ndarray], epoch: int) -> np.ndarray:
        raise NotImplementedError


class ShardDataset(ShardBatches):
    """Batches of clips or videos of plain local shards, read in place; they do not depend on the number of workers."""

    def __init__(
        self, source: ShardSource, rules: SampleRules, features: FeatureStore | None = None, **options: Any
    ) -> None:
        super().__init__(source, rules, **options)
        self.features = features
        self._reader = ShardReader()

    def emit(self, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        """Emits every `workers`-th batch."""
        epoch, start = self._state.tolist()
        part, size = self.part(epoch), self.batch_size
        begins = range((start + worker) * size, len(part), workers * size)
        return (collate([self.sample(clip) for clip in part[begin : begin + size]], self.rules) for begin in begins)

    def sample(self, clip: int) -> dict[str, Any]:
        """Reads one clip, or one video in evaluation, by its number."""
        visit, repeat, video, real = self.place(clip)
        bad: list[tuple[str, str]] = []
        for step in range(len(self.samples)):
            candidate = (video + step) % len(self.samples)
            try:
                sample = self._build(candidate, visit, repeat)
            except ShardError as error:
                if not self.skip_bad:
                    raise
                bad.append((self.members(candidate).where, str(error)))
                continue
            # A stand-in keeps the batch full but must not count as a video of its own.
            return {**sample, "real": real and not bad, BAD_SAMPLES: bad}
        raise ShardError(f"Expected at least one readable sample, but all {len(bad)} failed; the last: {bad[-1][1]}")

    def members(self, video: int) -> Members:
        """Returns the members of one video, each read when it is asked for."""
        number, sample = self.samples[video]
        entry = (self.source.entries or [])[number]
        return self._reader.sample(self.source.shards[number], entry, sample, self.max_bytes)

    def settle_masks(self, argument: str, mask_format: Literal["auto", "ids", "channels"]) -> None:
        """Finds out how the masks are stored and how many objects they hold, where the rules leave that open."""

        def most(stored: Literal["ids", "channels"]) -> int:
            found = 1
            for video in range(len(self.samples)):
                try:
                    found = max(found, count_objects(self.members(video), stored))
                except ShardError:
                    if not self.skip_bad:
                        raise
            return found

        if mask_format == "auto":
            mask_format = "channels" if most("channels") > 1 else "ids"
        limit = self.rules.max_objects or most(mask_format)
        expected = f"object ids of 255 at most in the masks of `{argument}`"
        advice = "Renumber them from 1 in each video: ids leave the workers as uint8."
        require_shard(mask_format == "channels" or limit <= 255, expected, limit, advice=advice)
        self.rules = replace(self.rules, mask_format=mask_format, max_objects=limit)

    def close(self) -> None:
        """Closes the shards in this process; reading opens them again."""
        self._reader.close()
        if self.features is not None:
            self.features.close()

    def _build(self, video: int, visit: int, repeat: int) -> dict[str, Any]:
        number, entry = self.samples[video]
        shard = self.source.shards[number]
        sample = self.cut(self.members(video), os.path.basename(shard), entry.key, visit, repeat)
        if self.features is not None:
            flip = self.rules.training and bool(sample["flip"])
            sample |= self.features.read(shard, entry.key, sample["cut"], flip)
        return sample

    def _shuffled(self, chunks: list[np.ndarray], seed: int, visit: int) -> np.ndarray:
        clips = np.sort(np.concatenate(chunks))
        return clips[permutation(len(clips), seed, visit)]

    def _blended(self, rows: list[np.ndarray], epoch: int) -> np.ndarray:
        clips = np.concatenate(rows)
        return clips[permutation(len(clips), self.rules.seed, epoch)]


def collate(samples: Sequence[dict[str, Any]], rules: SampleRules) -> dict[str, Any]:
    """Puts samples together: stacks them, pads frames and object channels, and notes what is padding."""
    lengths = [len(range(sample["cut"].start, sample["cut"].stop, sample["cut"].step)) for sample in samples]
    longest = max(lengths)
    batch: dict[str, Any] = {
        "crop": torch.stack([sample["crop"] for sample in samples]),
        "__key__": [sample["__key__"] for sample in samples],
        BAD_SAMPLES: [bad for sample in samples for bad in sample[BAD_SAMPLES]],
    }
    for name in ("video", "features"):
        if name in samples[0]:
            batch[name] = [_lengthen(sample[name], longest, repeat=True) for sample in samples]
    if rules.training:
        batch["flip"] = torch.stack([sample["flip"] for sample in samples])
    else:
        batch["batch_padding_mask"] = torch.tensor([sample["real"] for sample in samples])
        batch["frame_mask"] = torch.arange(longest) < torch.tensor(lengths)[:, None]
    if rules.masks:
        masks = [sample["segmentations"] for sample in samples]
        ids = rules.mask_format == "ids"
        channels = max(mask.shape[-1] for mask in masks)
        limit = rules.max_objects
        if limit is None:
            limit = max(int(mask.max()) for mask in masks) if ids else channels
        batch["mask_ids"], batch["max_objects"] = ids, limit
        masks = [torch.nn.functional.pad(mask, (0, channels - mask.shape[-1])) for mask in masks]
        batch["segmentations"] = [_lengthen(mask, longest) for mask in masks]
    tensors = [name for name in ("video", "segmentations", "features") if name in batch]
    # Videos of several sizes stay a list, and so do their masks.
    one_size = all(len({item.shape for item in batch[name]}) == 1 for name in tensors)
    for name in tensors if one_size else [name for name in tensors if name == "features"]:
        batch[name] = torch.stack(batch[name])
    return batch


def _lengthen(frames: Tensor, length: int, *, repeat: bool = False) -> Tensor:
    missing = length - len(frames)
    if missing == 0:
        return frames
    tail = frames[-1:].expand(missing, *frames.shape[1:]) if repeat else frames.new_zeros(missing, *frames.shape[1:])
    return torch.cat([frames, tail])
