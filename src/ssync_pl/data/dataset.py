"""Map-style data set over local shards, and the collation of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssync_pl.data.index import SampleEntry, ShardEntry
from ssync_pl.data.reader import ShardReader
from ssync_pl.data.samples import (
    Fetch,
    MaskFormat,
    SampleRules,
    clip_span,
    count_objects,
    eval_sample,
    find_member,
    mask_channels,
    train_sample,
)
from ssync_pl.errors import ShardError

if TYPE_CHECKING:
    from ssync_pl.data.features.store import FeatureStore

__all__ = ["BAD_SAMPLES", "Collate", "ShardDataset", "split_short"]

BAD_SAMPLES = "__bad_samples__"
"""Batch entry that carries skipped samples to the main process, as (place, message)."""


class ShardDataset(Dataset[dict[str, Any]]):
    """Videos or clips of local shards, by index.

    In training, index `visit * clips + clip_number * videos + video` is one clip (see `TrainSampler`); in evaluation,
    indices from `videos` on are repeats that pad a batch (see `EvalSampler`). Both count up from 0, so any sampler of
    plain indices works as well.

    Args:
        paths: Local shards.
        shards: Their index entries, in the same order.
        rules: How samples are cut.
        clips_per_video: Clips of each video a pass, in training.
        skip_bad: Put the next good sample in place of one that cannot be read, instead of raising.
        features: Cached features of the same shards, which then come with every sample.

    Raises:
        ShardError: The shards hold no sample.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from ssync_pl.data.index import load_shards
        >>> from ssync_pl.data.shards import ShardWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ShardWriter(folder, "train") as writer:
        ...         writer.write("7", {"video.npy": np.zeros((6, 8, 8, 3), np.uint8)})
        ...     paths = [f"{folder}/train-000000.tar"]
        ...     dataset = ShardDataset(paths, load_shards(paths), SampleRules(clip_length=2))
        ...     len(dataset), dataset[0]["__key__"], dataset[0]["video"].shape
        (1, '7', torch.Size([2, 8, 8, 3]))
    """

    def __init__(
        self,
        paths: Sequence[str],
        shards: Sequence[ShardEntry],
        rules: SampleRules,
        clips_per_video: int = 1,
        skip_bad: bool = False,
        features: FeatureStore | None = None,
    ) -> None:
        self.paths = list(paths)
        self.shards = list(shards)
        self.rules = rules
        self.clips_per_video = clips_per_video if rules.training else 1
        self.skip_bad = skip_bad
        self.samples = [(number, sample) for number, shard in enumerate(self.shards) for sample in shard.samples]
        self.features = features
        self._reader = ShardReader()
        if not self.samples:
            raise ShardError(
                f"Expected at least one sample in the shards, but got none in {', '.join(self.paths[:3])}."
            )

    def __len__(self) -> int:
        return len(self.samples) * self.clips_per_video

    def __getitem__(self, index: int) -> dict[str, Any]:
        videos = len(self.samples)
        epoch, rest = divmod(int(index), len(self)) if self.rules.training else (0, int(index))
        repeat, video = divmod(rest, videos)
        real = self.rules.training or repeat == 0
        bad: list[tuple[str, str]] = []
        for step in range(videos):
            try:
                sample = self._build((video + step) % videos, epoch, repeat)
            except ShardError as error:
                if not self.skip_bad:
                    raise
                bad.append((self.where((video + step) % videos), str(error)))
                continue
            # A stand-in keeps the batch full but must not count as a video of its own.
            return {**sample, "real": real and not bad, BAD_SAMPLES: bad}
        raise ShardError(f"Expected at least one readable sample, but all {videos} failed; the last: {bad[-1][1]}")

    def where(self, video: int) -> str:
        """Name a video for messages.

        Args:
            video: Number of the video.

        Returns:
            Shard and key.
        """
        number, sample = self.samples[video]
        return f"{self.paths[number]}, key {sample.key}"

    def fetch(self, video: int) -> Fetch:
        """Return the function that reads members of one video.

        Args:
            video: Number of the video.

        Returns:
            Function from member name to bytes.
        """
        number, sample = self.samples[video]
        return lambda member: self._reader.member(self.paths[number], self.shards[number], sample, member)

    def mask_channels(self, video: int) -> int:
        """Read how many channels a video's masks have.

        Args:
            video: Number of the video.

        Returns:
            Number of channels, from the header only.

        Raises:
            ShardError: The video has no readable masks.
        """
        member = find_member(self.samples[video][1].members, "segmentations", self.where(video))
        return mask_channels(member, self.fetch(video)(member), self.where(video))

    def count_objects(self, video: int, mask_format: MaskFormat) -> int:
        """Count a video's objects: the largest id, or the number of channels.

        Args:
            video: Number of the video.
            mask_format: How the masks are stored.

        Returns:
            Number of objects.

        Raises:
            ShardError: The video has no readable masks.
        """
        member = find_member(self.samples[video][1].members, "segmentations", self.where(video))
        return count_objects(member, self.fetch(video)(member), mask_format, self.where(video))

    def close(self) -> None:
        """Close the memory maps of this process; reading opens them again."""
        self._reader.close()
        if self.features is not None:
            self.features.close()

    def _build(self, video: int, epoch: int, clip: int) -> dict[str, Any]:
        number, sample = self.samples[video]
        where, fetch = self.where(video), self.fetch(video)
        if self.rules.training:
            key = f"{self.shards[number].name}/{sample.key}"
            built = train_sample(sample.members, fetch, key, where, self.rules, epoch, clip)
        else:
            built = eval_sample(sample.members, fetch, where, self.rules)
        if self.features is not None:
            flip = self.rules.training and bool(built["flip"])
            built |= self.features.read(self.paths[number], sample.key, built["cut"], flip)
        return {**built, "__key__": sample.key}


@dataclass(frozen=True)
class Collate:
    """Put samples together: stack, pad frames and object channels, and note what is padding.

    Args:
        rules: How the samples were cut.

    Example:
        >>> sample = {"video": torch.zeros(2, 4, 4, 3, dtype=torch.uint8), "crop": torch.zeros(2), "real": True}
        >>> batch = Collate(SampleRules())([{**sample, "cut": slice(0, 2, 1), "__key__": "7", BAD_SAMPLES: []}])
        >>> batch["__key__"], batch["batch_padding_mask"], batch["frame_mask"]
        (['7'], tensor([True]), tensor([[True, True]]))
    """

    rules: SampleRules

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate.

        Args:
            samples: What `ShardDataset` returns.

        Returns:
            `video` uint8 (B, T, h, w, 3), or a list of (T, h, w, 3) when heights or widths differ; `__key__`; `crop`;
            in training `flip`; in evaluation `batch_padding_mask` (B,) and `frame_mask` (B, T); with masks
            `segmentations` like `video` with N channels, `mask_ids`, `max_objects`; with cached features `features`
            (B, T, N, D) and what they need to be decoded. `video` is left out where the rules say so.
        """
        lengths = [len(range(sample["cut"].start, sample["cut"].stop, sample["cut"].step)) for sample in samples]
        longest = max(lengths)
        batch: dict[str, Any] = {
            "crop": torch.stack([sample["crop"] for sample in samples]),
            "__key__": [sample["__key__"] for sample in samples],
            BAD_SAMPLES: [bad for sample in samples for bad in sample[BAD_SAMPLES]],
        }
        if "video" in samples[0]:
            batch["video"] = _stack([_lengthen(sample["video"], longest, repeat=True) for sample in samples])
        for name in ("features", "features_scale"):
            if name in samples[0]:
                batch[name] = torch.stack([_lengthen(sample[name], longest, repeat=True) for sample in samples])
        if self.rules.training:
            batch["flip"] = torch.stack([sample["flip"] for sample in samples])
        else:
            batch["batch_padding_mask"] = torch.tensor([sample["real"] for sample in samples])
            batch["frame_mask"] = torch.arange(longest) < torch.tensor(lengths)[:, None]
        if self.rules.masks:
            masks = [sample["segmentations"] for sample in samples]
            ids = self.rules.mask_format == "ids"
            channels = max(mask.shape[-1] for mask in masks)
            limit = self.rules.max_objects
            if limit is None:
                limit = max(int(mask.max()) for mask in masks) if ids else channels
            batch["mask_ids"], batch["max_objects"] = ids, limit
            batch["segmentations"] = _stack(
                [_lengthen(torch.nn.functional.pad(mask, (0, channels - mask.shape[-1])), longest) for mask in masks]
            )
        return batch


def split_short(shard: ShardEntry, clip_length: int, frame_stride: int) -> tuple[ShardEntry, list[SampleEntry]]:
    """Take the videos that are known to be shorter than a clip out of a shard's entry.

    Args:
        shard: The entry.
        clip_length: Frames of a clip.
        frame_stride: Distance between them.

    Returns:
        The entry without them, and them.

    Example:
        >>> entry = ShardEntry("a.tar", 0, (SampleEntry("7", {}, frames=3), SampleEntry("8", {}, frames=9)))
        >>> kept, short = split_short(entry, 4, 1)
        >>> [sample.key for sample in kept.samples], [sample.key for sample in short]
        (['8'], ['7'])
    """
    span = clip_span(clip_length, frame_stride)
    short = [sample for sample in shard.samples if sample.frames is not None and sample.frames < span]
    kept = tuple(sample for sample in shard.samples if sample.frames is None or sample.frames >= span)
    return ShardEntry(shard.name, shard.size, kept), short


def _lengthen(frames: Tensor, length: int, *, repeat: bool = False) -> Tensor:
    missing = length - len(frames)
    if missing == 0:
        return frames
    tail = frames[-1:].expand(missing, *frames.shape[1:]) if repeat else frames.new_zeros(missing, *frames.shape[1:])
    return torch.cat([frames, tail])


def _stack(frames: list[Tensor]) -> Tensor | list[Tensor]:
    return torch.stack(frames) if len({item.shape for item in frames}) == 1 else frames
