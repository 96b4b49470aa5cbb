"""The data module of `ssync-pl predict --input`: windows of videos, decoded as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, IterableDataset

from ssync_pl.data.datamodule import ShardDataModule
from ssync_pl.data.samples import SampleRules, crop_offsets
from ssync_pl.data.synthetic_datamodule import SyntheticDataModule
from ssync_pl.data.transforms import BatchTransform
from ssync_pl.errors import ConfigError, ShardError
from ssync_pl.tools.predict.features import FeatureMaker, FeatureSource, find_features
from ssync_pl.tools.predict.inputs import InputVideo, find_videos
from ssync_pl.tools.predict.joined import WINDOW_KEY
from ssync_pl.tools.predict.region import seen_region
from ssync_pl.tools.predict.windows import cut_windows, window_length

__all__ = ["InputDataModule", "InputWindows"]


class InputWindows(IterableDataset[dict[str, Any]]):
    """The windows of some videos, one batch each.

    Args:
        videos: The videos.
        clip_frames: Most frames of a window.
        rules: How the model's frames are cropped.

    Example:
        >>> list(InputWindows([], 64, SampleRules()))
        []
    """

    def __init__(self, videos: Sequence[InputVideo], clip_frames: int, rules: SampleRules) -> None:
        self.videos = list(videos)
        self.clip_frames = clip_frames
        self.rules = rules

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for video in self.videos:
            count = 0
            for window in cut_windows(video.frames(), window_length(video.total, self.clip_frames)):
                frames = window.frames
                offsets = crop_offsets(frames, self.rules, None, None)
                source = (frames.shape[1], frames.shape[2])
                region = seen_region(
                    source, offsets.tolist(), self.rules.image_size, self.rules.crop, self.rules.reference
                )
                count += len(frames)
                yield {
                    "video": torch.from_numpy(frames)[None],
                    "crop": offsets[None],
                    "__key__": [video.key],
                    WINDOW_KEY: {
                        "key": video.key,
                        "source": video.source,
                        "start": window.start,
                        "last": window.last,
                        "rate": video.rate,
                        "frames": frames,
                        "region": region,
                    },
                }
            if not count:
                raise ShardError(f"Expected {video.source} to have frames, but it has none. Encode it again.")


class InputDataModule(L.LightningDataModule):
    """Give the windows of a user's videos as the configuration's data module would give them.

    Args:
        data: The data module of the configuration: image size, resize mode, crop, normalisation, cached features.
        inputs: What `--input` names.
        clip_frames: Most frames of a window.
        projection: `projection.npz` of the cache that the host was trained on, where it is not in its folder.
        backbone_checkpoint: Weights of the cache's backbone, where they are not the published ones.

    Raises:
        ConfigError: The data module is none of the package's, or an input or the features cannot be used.
        ShardError: A video cannot be read.

    Example:
        >>> InputDataModule(ShardDataModule(image_size=64), ["/nowhere.mp4"])
        Traceback (most recent call last):
        ssync_pl.errors.ConfigError: Expected --input to be there, but /nowhere.mp4 does not exist. Check the path.
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
        window_length(None, clip_frames)
        self.videos = find_videos(inputs)
        self.clip_frames = clip_frames
        self.mean, self.std = data.mean, data.std
        self.has_background, self.ignore_overlaps = data.has_background, data.ignore_overlaps
        self.transform = _transform(data)
        self.source: FeatureSource | None = find_features(data, projection)
        self.maker = None if self.source is None else FeatureMaker(self.source, data, backbone_checkpoint)

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Build the loader: one window a batch.

        Returns:
            The loader; it decodes in this process.
        """
        rules = SampleRules(
            image_size=self.transform.image_size, crop=self.transform.crop, reference=self.transform.reference
        )
        return DataLoader(InputWindows(self.videos, self.clip_frames, rules), batch_size=None, collate_fn=_as_it_is)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Resize, crop and normalise the frames, and compute features where the host wants them.

        Args:
            batch: A window.
            dataloader_idx: Not needed.

        Returns:
            `video` (1, T, 3, H, W) float32, where they are wanted `features` (1, T, N, D), and the window's facts.
        """
        if not isinstance(batch, dict) or WINDOW_KEY not in batch:
            return batch
        window = batch[WINDOW_KEY]
        tensors = {"video": batch["video"], "crop": batch["crop"]}
        out = self.transform(tensors)
        if self.maker is not None:
            out["features"] = self.maker(tensors)
        precision = getattr(self.trainer, "precision_plugin", None)
        out = out if precision is None else precision.convert_input(out)
        return {**out, "__key__": batch["__key__"], WINDOW_KEY: window}


def _transform(data: ShardDataModule) -> BatchTransform:
    transform = data.transform
    if transform.image_size is not None or not isinstance(data, SyntheticDataModule):
        return transform
    size = data.config.resolution  # the stored size, which the host was trained at
    return BatchTransform(
        (size, size),
        resize_mode=transform.resize_mode,
        crop=transform.crop,
        mean=data.mean,
        std=data.std,
        reference=transform.reference,
    )


def _as_it_is(item: Any) -> Any:
    return item
