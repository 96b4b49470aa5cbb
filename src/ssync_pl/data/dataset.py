"""Sets of shards and their passes: who reads which clip when, and batches of clips that are read in place."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ssync_pl.data.decode import MAX_MEMBER_BYTES
from ssync_pl.data.index import ShardEntry, load_shards, scan_shard, warn_ignored
from ssync_pl.data.patterns import Patterns, expand_shards, is_compressed, is_remote
from ssync_pl.data.remote import fetch_index
from ssync_pl.data.samples import Members, SampleRules, count_objects, eval_sample, train_sample
from ssync_pl.data.sampling import clips_of_pass, rank_part
from ssync_pl.data.shards import sample_members
from ssync_pl.errors import ShardError, require, require_shard

if TYPE_CHECKING:
    from ssync_pl.data.features.store import FeatureStore

BAD_SAMPLES = "__bad_samples__"  # batch entry that carries skipped samples to the main process, as (place, message)
Backend = Literal["auto", "mmap", "webdataset"]  # `auto` reads plain local tars in place and streams all else


@dataclass(frozen=True)
class ShardSource:
    """Opened shards of one split."""

    shards: list[str]
    entries: list[ShardEntry] | None  # in the same order; None when remote shards have no index
    mapped: bool = True  # whether they are read in place rather than streamed


def open_source(patterns: Patterns, argument: str, backend: Backend = "auto") -> ShardSource:
    """Finds the shards of a split and their index."""
    shards = expand_shards(patterns, argument)
    remote, packed = is_remote(shards[0]), any(map(is_compressed, shards))
    expected = f"argument `{argument}` to be plain local tars for backend='mmap'"
    advice = "Take backend='webdataset', or copy and unpack the shards."
    require(backend != "mmap" or not (remote or packed), expected, shards[0], advice=advice)
    entries: list[ShardEntry] | None
    if remote:
        entries = fetch_index(shards)
    elif packed:
        entries = [scan_shard(shard, packed=is_compressed(shard)) for shard in shards]
        for shard, entry in zip(shards, entries, strict=True):
            warn_ignored(shard, entry.ignored)
    else:
        entries = load_shards(shards)
    filled = entries is None or any(entry.samples for entry in entries)
    require_shard(filled, f"at least one sample in the shards of `{argument}`", f"none in {shards[0]}")
    return ShardSource(shards, entries, not remote and not packed and backend != "webdataset")


class ShardBatches(IterableDataset[dict[str, Any]]):
    """Batches of the clips, or in evaluation of the videos, of a source: each comes to one worker of one rank.

    All ranks emit equally many batches, and evaluation sees each video once, at any number of ranks and workers. What
    a pass holds is a function of (seed, pass). Without an index the length is unknown, and only one process may read.
    `skip_bad` puts a readable sample in place of one that is not, instead of raising.
    """

    by_shard = False  # whether shards are read from start to end, and the pass of a rank in one piece

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
        self.clips_per_video = clips_per_video if rules.training else 1
        self.skip_bad, self.max_bytes = skip_bad, max_bytes
        self.rank, self.world = rank, world
        self.samples = [(n, sample) for n, entry in enumerate(source.entries or ()) for sample in entry.samples]
        self._shards = np.array([number for number, _ in self.samples], np.int64)
        self._clips = len(self.samples) * self.clips_per_video
        # Shared memory, so that workers that outlive a pass see the next one: pass, first batch.
        self._state = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def clips(self) -> int | None:
        """Clips of a pass on all ranks together, or `None` without an index."""
        return None if self.source.entries is None else self._clips

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
        order = np.arange(len(self.samples))
        if self.rules.training:
            order = clips_of_pass(self._shards, self.clips_per_video, self.rules.seed, epoch, by_shard=self.by_shard)
            order += epoch * self._clips
        place = (self.rank, self.world, self.batch_size)
        return rank_part(order, *place, training=self.rules.training, together=self.by_shard)

    def place(self, clip: int) -> tuple[int, int, int, bool]:
        """Returns the visit, repeat and video of a clip's number, and whether it counts rather than pads."""
        visit, rest = divmod(int(clip), self._clips)
        repeat, video = divmod(rest, len(self.samples))
        return visit, repeat, video, self.rules.training or visit == 0

    def cut(self, members: Members, shard: str, key: str, visit: int, repeat: int) -> dict[str, Any]:
        """Cuts one clip, or takes the whole video in evaluation; draws hang on the shard's name and the key."""
        if self.rules.training:
            sample = train_sample(members, f"{shard}/{key}", self.rules, visit, repeat)
        else:
            sample = eval_sample(members, self.rules)
        return {**sample, "__key__": key}


class ShardDataset(ShardBatches):
    """Batches of clips or videos of plain local shards, read in place; they do not depend on the number of workers."""

    def __init__(
        self, source: ShardSource, rules: SampleRules, features: "FeatureStore | None" = None, **options: Any
    ) -> None:
        super().__init__(source, rules, **options)
        self.features = features

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
            number, entry = self.samples[candidate]
            shard, members = self.source.shards[number], self.members(candidate)
            try:
                sample = self.cut(members, os.path.basename(shard), entry.key, visit, repeat)
                if self.features is not None:
                    flip = self.rules.training and bool(sample["flip"])
                    sample |= self.features.read(shard, entry.key, sample["cut"], flip)
            except ShardError as error:
                if not self.skip_bad:
                    raise
                bad.append((members.where, str(error)))
                continue
            # A stand-in keeps the batch full but must not count as a video of its own.
            return {**sample, "real": real and not bad, BAD_SAMPLES: bad}
        raise ShardError(f"Expected at least one readable sample, but all {len(bad)} failed; the last: {bad[-1][1]}")

    def members(self, video: int) -> Members:
        """Returns the members of one video, each read when it is asked for."""
        number, sample = self.samples[video]
        entry = (self.source.entries or [])[number]
        return sample_members(self.source.shards[number], entry, sample, self.max_bytes)

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
            frames = [(sample[name], len(sample[name])) for sample in samples]
            places = torch.arange(longest)  # the last frame is repeated
            batch[name] = [one if count == longest else one[places.clamp(max=count - 1)] for one, count in frames]
    if rules.training:
        batch["flip"] = torch.stack([sample["flip"] for sample in samples])
    else:
        batch["batch_padding_mask"] = torch.tensor([sample["real"] for sample in samples])
        batch["frame_mask"] = torch.arange(longest) < torch.tensor(lengths)[:, None]
    if rules.masks:
        masks = [sample["segmentations"] for sample in samples]
        ids, channels = rules.mask_format == "ids", max(mask.shape[-1] for mask in masks)
        most = max(int(mask.max()) for mask in masks) if ids and rules.max_objects is None else channels
        batch["mask_ids"], batch["max_objects"] = ids, rules.max_objects or most
        sides = [(0, channels - mask.shape[-1], 0, 0, 0, 0, 0, longest - len(mask)) for mask in masks]
        batch["segmentations"] = list(map(torch.nn.functional.pad, masks, sides))
    tensors = [name for name in ("video", "segmentations", "features") if name in batch]
    # Videos of several sizes stay a list, and so do their masks.
    one_size = all(len({item.shape for item in batch[name]}) == 1 for name in tensors)
    for name in tensors if one_size else [name for name in tensors if name == "features"]:
        batch[name] = torch.stack(batch[name])
    return batch
