"""The data module of `ssync-pl predict --input`: windows of videos, decoded as they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ssync_pl.data.datamodule import ShardDataModule
from ssync_pl.data.samples import SampleRules, crop_offsets
from ssync_pl.data.synthetic_datamodule import SyntheticDataModule
from ssync_pl.errors import ConfigError, ShardError, require
from ssync_pl.tools.predict.features import find_features, make_features
from ssync_pl.tools.predict.inputs import InputVideo, find_videos
from ssync_pl.tools.predict.windows import cut_windows, seen_region
from ssync_pl.tools.predict.writer import WINDOW_KEY

__all__ = ["CarrySlots", "InputDataModule", "carries_slots"]


class InputDataModule(L.LightningDataModule):
    """Gives the windows of a user's videos as the configuration's data module would give them.

    The data module of the configuration says image size, resize mode, crop, normalisation and cached features; the
    other arguments are the options of the command.
    """

    def __init__(
        self,
        data: Any,
        inputs: Sequence[str],
        clip_frames: int = 64,
        projection: str | None = None,
        backbone_checkpoint: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(data, ShardDataModule):
            raise ConfigError(
                "Expected the configuration to name ShardDataModule or SyntheticDataModule for --input, as they say "
                f"how frames are resized and normalised, but got {type(data).__name__}. Add `--data ShardDataModule "
                "--data.image_size SIZE`, with the values of the training."
            )
        few = "--clip-frames to be at least 2, as windows share a frame"
        require(clip_frames >= 2, few, clip_frames, advice="Take 16 or more.")
        self.videos, self.clip_frames = find_videos(inputs), clip_frames
        self.mean, self.std = data.mean, data.std
        self.has_background, self.ignore_overlaps = data.has_background, data.ignore_overlaps
        self.transform = copy.copy(data.transform)
        if self.transform.image_size is None and isinstance(data, SyntheticDataModule):
            self.transform.image_size = (data.config.resolution, data.config.resolution)  # that of the training
        found = find_features(data, projection)
        self.maker = None if found is None else make_features(*found, backbone_checkpoint)
        self.carry: CarrySlots | None = None

    def setup(self, stage: str) -> None:
        """Hooks the host, so that windows go on where the one before ended."""
        if self.trainer is not None:
            self.carry = CarrySlots(self.trainer.lightning_module)

    def teardown(self, stage: str) -> None:
        """Leaves the host as it was."""
        if self.carry is not None:
            self.carry.close()

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Builds the loader: one window per batch, decoded in this process."""
        seen = self.transform
        rules = SampleRules(image_size=seen.image_size, crop=seen.crop, reference=seen.reference)
        return DataLoader(_Windows(self.videos, self.clip_frames, rules), batch_size=None, collate_fn=_as_it_is)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Resizes, crops and normalises the frames, and computes features where the host wants them."""
        if not isinstance(batch, dict) or WINDOW_KEY not in batch:
            return batch
        if self.carry is not None and batch[WINDOW_KEY]["start"] == 0:
            self.carry.slots = None
        tensors = {"video": batch["video"], "crop": batch["crop"]}
        out = self.transform(tensors)
        if self.maker is not None:
            features = self.maker(batch["video"][0], batch["crop"][0], str(batch["__key__"]))
            out["features"] = features.to(torch.bfloat16).float()[None]  # as the cache rounds them
        precision = getattr(self.trainer, "precision_plugin", None)
        out = out if precision is None else precision.convert_input(out)
        return {**out, "__key__": batch["__key__"], WINDOW_KEY: batch[WINDOW_KEY]}


class CarrySlots:
    """Lets each window of a video begin with the slots that the window before ended with, where the host can.

    The shared frame is corrected once more from its own slots, so that slots keep their objects. `slots` is set to None
    where another video begins.
    """

    def __init__(self, host: nn.Module) -> None:
        self.slots: Tensor | None = None
        self._handles: list[Any] = []
        if carries_slots(host):
            initializer: Any = host.initializer
            self._handles = [initializer.register_forward_hook(self._begin), host.register_forward_hook(self._end)]

    def close(self) -> None:
        """Leaves the host as it was."""
        for handle in self._handles:
            handle.remove()
        self.slots = None

    def _begin(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output if self.slots is None else self.slots.to(output.dtype)

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.slots = output.slots[:, -1].detach()


def carries_slots(host: nn.Module) -> bool:
    """Whether a host can start a clip from given slots, which its attribute `carries_slots` says.

    `host.initializer(...)` gives the first slots (B, S, D) of a clip; `host(...).slots` (B, T, S, D) are those of each
    frame.
    """
    return bool(getattr(host, "carries_slots", False)) and isinstance(getattr(host, "initializer", None), nn.Module)


class _Windows(IterableDataset[dict[str, Any]]):
    """The windows of some videos, one batch each."""

    def __init__(self, videos: Sequence[InputVideo], clip_frames: int, rules: SampleRules) -> None:
        self.videos, self.clip_frames, self.rules = videos, clip_frames, rules

    def __iter__(self) -> Iterator[dict[str, Any]]:
        size, crop, reference = self.rules.image_size, self.rules.crop, self.rules.reference
        for video in self.videos:
            window = None
            for window in cut_windows(video.frames(), self.clip_frames):
                offsets = crop_offsets(window.frames, self.rules, None, None)
                region = seen_region(window.frames.shape[1:3], offsets.tolist(), size, crop, reference)
                tensors = {"video": torch.from_numpy(window.frames)[None], "crop": offsets[None]}
                yield {
                    **tensors,
                    "__key__": [video.key],
                    WINDOW_KEY: {**window._asdict(), "video": video, "region": region},
                }
            if window is None:
                raise ShardError(f"Expected {video.source} to have frames, but it has none. Encode it again.")


def _as_it_is(item: Any) -> Any:
    return item
