"""The data module of `ssync-pl predict --input`: windows of videos, decoded as they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from ssync_pl.data.datamodule import ShardDataModule
from ssync_pl.data.features.cache import FeatureMaker
from ssync_pl.data.features.projection import PROJECTION_FILE, read_projection
from ssync_pl.data.features.store import read_recipe
from ssync_pl.data.samples import SampleRules, crop_offsets
from ssync_pl.data.synthetic_datamodule import SyntheticDataModule
from ssync_pl.errors import ConfigError, require, require_shard
from ssync_pl.tools.predict.inputs import find_videos
from ssync_pl.tools.predict.windows import cut_windows, seen_region
from ssync_pl.tools.predict.writer import WINDOW_KEY


class InputDataModule(L.LightningDataModule):
    """Gives the windows of a user's videos as the configuration's data module would give them.

    The data module of the configuration says image size, resize mode, crop, normalisation and cached features; the
    other arguments are the options of the command.
    """

    def __init__(
        self, data: Any, inputs: Sequence[str], clip_frames: int = 64, backbone_checkpoint: str | None = None
    ) -> None:
        super().__init__()
        expected = "the configuration to name ShardDataModule or SyntheticDataModule for --input"
        advice = "Add `--data ShardDataModule --data.image_size SIZE`, with the values of the training."
        require(isinstance(data, ShardDataModule), expected, type(data).__name__, advice=advice)
        require(clip_frames >= 2, "--clip-frames to be at least 2, as windows share a frame", clip_frames)
        self.videos, self.clip_frames = find_videos(inputs), clip_frames
        self.mean, self.std = data.mean, data.std
        self.transform = copy.copy(data.transform)
        if self.transform.image_size is None and isinstance(data, SyntheticDataModule):
            self.transform.image_size = (data.config.resolution, data.config.resolution)  # that of the training
        self.maker = None if data.features is None else _feature_maker(Path(data.features), backbone_checkpoint)

    def predict_dataloader(self) -> Iterator[dict[str, Any]]:
        """Gives one window per batch, decoded in this process, and features where the host wants them."""
        seen, device = self.transform, "cpu" if self.trainer is None else self.trainer.strategy.root_device
        rules = SampleRules(image_size=seen.image_size, crop=seen.crop, reference=seen.reference)
        for video in self.videos:
            window = None
            for window in cut_windows(video.frames(), self.clip_frames):
                frames, crop = torch.from_numpy(window.frames).to(device), crop_offsets(window.frames, rules)
                batch = seen({"video": frames[None], "crop": crop[None].to(device)})
                if self.maker is not None:
                    features = self.maker(frames, crop, f"video {video.source}")
                    batch["features"] = features.to(torch.bfloat16).float()[None]  # as the cache rounds them
                region = seen_region(window.frames.shape[1:3], crop.tolist(), seen)
                whole = window._replace(key=video.key, source=video.source, rate=video.rate, region=region)
                yield {**batch, "__key__": [video.key], WINDOW_KEY: whole}
            require_shard(window is not None, f"{video.source} to have frames", "none", advice="Encode it again.")


def _feature_maker(folder: Path, checkpoint: str | None) -> FeatureMaker:
    """Makes features of new videos as those in a folder were made: same backbone, layer, weights and projection."""
    from ssync_pl.hosts.nn.backbones import load_backbone

    shards = sorted(folder.glob("*.tar"))
    advice = f"Put one of its shards and its {PROJECTION_FILE} back, or name their folder by --data.features."
    require(bool(shards), f"{folder} to hold the features that the host was trained on", "none", advice=advice)
    recipe, _ = read_recipe(shards[0])
    projection = read_projection(folder / PROJECTION_FILE) if recipe.projection else None
    same = projection is None or projection.fingerprint == recipe.projection
    require(same, f"the {PROJECTION_FILE} that the features in {folder} were made with", "another", advice=advice)
    for weights, file in [("pretrained", None), ("none", None)] if checkpoint is None else [(None, checkpoint)]:
        backbone = load_backbone(recipe.backbone, recipe.layer, weights, file)  # type: ignore[arg-type]
        if backbone.fingerprint == recipe.weights:
            return FeatureMaker(backbone, recipe, projection)
    raise ConfigError(
        f"Expected backbone {recipe.backbone} with the weights that the host's features were made with (sha256 "
        f"{recipe.weights[:12]}…), but {checkpoint or 'its published weights'} are others. Pass the file of weights "
        "that `ssync-pl data cache-features --checkpoint` got as --backbone_checkpoint."
    )
