"""Map-style data set over local shards, and the collation of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssync_pl.data.decode import MAX_MEMBER_BYTES
from ssync_pl.data.index import ShardEntry
from ssync_pl.data.samples import Members, SampleRules, eval_sample, train_sample
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ShardError

if TYPE_CHECKING:
    from ssync_pl.data.features.store import FeatureStore

__all__ = ["BAD_SAMPLES", "Collate", "ShardDataset"]

BAD_SAMPLES = "__bad_samples__"
"""Batch entry that carries skipped samples to the main process, as (place, message)."""


class ShardDataset(Dataset[dict[str, Any]]):
    """Videos or clips of local shards, by index.

    In training, index `visit * clips + clip_number * videos + video` is one clip (see `TrainSampler`); in evaluation,
    indices from `videos` on are repeats that pad a batch (see `EvalSampler`).

    Args:
        paths: Local shards.
        shards: Their index entries, in the same order.
        rules: How samples are cut.
        clips_per_video: Clips of each video per pass, in training.
        skip_bad: Put the next good sample in place of one that cannot be read, instead of raising.
        features: Cached features of the same shards, which then come with every sample.
        max_bytes: Most bytes of a member, stored and decoded.

    Raises:
        ShardError: The shards hold no sample.
    """

    def __init__(
        self,
        paths: Sequence[str],
        shards: Sequence[ShardEntry],
        rules: SampleRules,
        clips_per_video: int = 1,
        skip_bad: bool = False,
        features: FeatureStore | None = None,
        max_bytes: int = MAX_MEMBER_BYTES,
    ) -> None:
        self.paths = list(paths)
        self.shards = list(shards)
        self.rules = rules
        self.clips_per_video = clips_per_video if rules.training else 1
        self.skip_bad = skip_bad
        self.samples = [(number, sample) for number, shard in enumerate(self.shards) for sample in shard.samples]
        self.features = features
        self.max_bytes = max_bytes
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
                bad.append((self.members((video + step) % videos).where, str(error)))
                continue
            # A stand-in keeps the batch full but must not count as a video of its own.
            return {**sample, "real": real and not bad, BAD_SAMPLES: bad}
        raise ShardError(f"Expected at least one readable sample, but all {videos} failed; the last: {bad[-1][1]}")

    def members(self, video: int) -> Members:
        """Return the members of one video, each read when it is asked for."""
        number, sample = self.samples[video]
        return self._reader.sample(self.paths[number], self.shards[number], sample, self.max_bytes)

    def close(self) -> None:
        """Close the shards in this process; reading opens them again."""
        self._reader.close()
        if self.features is not None:
            self.features.close()

    def _build(self, video: int, epoch: int, clip: int) -> dict[str, Any]:
        number, sample = self.samples[video]
        members = self.members(video)
        if self.rules.training:
            built = train_sample(members, f"{self.shards[number].name}/{sample.key}", self.rules, epoch, clip)
        else:
            built = eval_sample(members, self.rules)
        if self.features is not None:
            flip = self.rules.training and bool(built["flip"])
            built |= self.features.read(self.paths[number], sample.key, built["cut"], flip)
        return {**built, "__key__": sample.key}


@dataclass(frozen=True)
class Collate:
    """Put samples together: stack, pad frames and object channels, and note what is padding."""

    rules: SampleRules

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate."""
        lengths = [len(range(sample["cut"].start, sample["cut"].stop, sample["cut"].step)) for sample in samples]
        longest = max(lengths)
        batch: dict[str, Any] = {
            "crop": torch.stack([sample["crop"] for sample in samples]),
            "__key__": [sample["__key__"] for sample in samples],
            BAD_SAMPLES: [bad for sample in samples for bad in sample[BAD_SAMPLES]],
        }
        if "video" in samples[0]:
            batch["video"] = _stack([_lengthen(sample["video"], longest, repeat=True) for sample in samples])
        if "features" in samples[0]:
            batch["features"] = torch.stack([_lengthen(item["features"], longest, repeat=True) for item in samples])
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


def _lengthen(frames: Tensor, length: int, *, repeat: bool = False) -> Tensor:
    missing = length - len(frames)
    if missing == 0:
        return frames
    tail = frames[-1:].expand(missing, *frames.shape[1:]) if repeat else frames.new_zeros(missing, *frames.shape[1:])
    return torch.cat([frames, tail])


def _stack(frames: list[Tensor]) -> Tensor | list[Tensor]:
    return torch.stack(frames) if len({item.shape for item in frames}) == 1 else frames
