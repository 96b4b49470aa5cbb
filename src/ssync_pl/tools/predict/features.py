"""Features of new videos for hosts that were trained on a cache: same backbone, layer and projection, on the fly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssync_pl.data.datamodule import ShardDataModule
from ssync_pl.data.features.projection import PROJECTION_FILE, Projection, read_projection
from ssync_pl.data.features.recipe import FeatureRecipe, read_recipe
from ssync_pl.data.transforms import BatchTransform
from ssync_pl.errors import ConfigError

if TYPE_CHECKING:
    from ssync_pl.hosts.nn.backbones import FrozenBackbone

__all__ = ["FeatureMaker", "FeatureSource", "find_features"]

_BATCH = 32


@dataclass(frozen=True)
class FeatureSource:
    """How the features were made that a host was trained on; None where nothing says it."""

    backbone: str
    layer: str | None
    weights: str | None
    projection: Projection | None
    image_size: tuple[int, int] | None = None


def find_features(data: ShardDataModule, projection: str | None) -> FeatureSource | None:
    """Finds out which features the data module of the configuration gives.

    The folder of the cache says it. Where the folder is gone, `projection` does, or the settings of a
    `SyntheticDataModule` that projects nothing.

    Args:
        data: The data module of the configuration.
        projection: `projection.npz` of the cache; None for that in its folder.

    Returns:
        The source; None for hosts without cached features.

    Raises:
        ConfigError: The projection is not to be found, or is another one.
    """
    if data.features is None:
        if projection is not None:
            raise ConfigError(
                "Expected --projection only with cached features, but the data module of the configuration has none. "
                "Leave it out."
            )
        return None
    folder = Path(data.features)
    shards = sorted(folder.glob("*.tar"))
    beside = folder / PROJECTION_FILE
    given = None if projection is None else _read(projection)
    if shards:
        recipe, _ = read_recipe(shards[0])
        found = given
        if recipe.projection:
            found = found or (read_projection(beside) if beside.is_file() else None)
            if found is None:
                raise _no_projection(folder, f"there is no {PROJECTION_FILE}")
            if found.fingerprint != recipe.projection:
                raise ConfigError(
                    f"Expected the projection that the features in {folder} were made with (sha256 "
                    f"{recipe.projection[:12]}…), but {projection or beside} holds another "
                    f"({found.fingerprint[:12]}…). Pass the {PROJECTION_FILE} of that cache as --projection."
                )
        elif given is not None:
            raise ConfigError(f"Expected --projection only with projected features, but those in {folder} are not.")
        return _source(recipe, found)
    found = given or (read_projection(beside) if beside.is_file() else None)
    if found is not None and "features" in found.info:
        return _source(FeatureRecipe.from_json(found.info["features"]), found)
    name, layer, components = getattr(data, "_cache", (None, None, None))
    if name is None or (components is not None and found is None):
        raise _no_projection(folder, "there are no features")
    return FeatureSource(name, layer, None, found)


class FeatureMaker:
    """Turns frames into the features that a cache would hold of them.

    Args:
        source: How they are made.
        data: The data module of the configuration; its size, resize mode and crop are those of the frames.
        checkpoint: File of the backbone's weights; None takes published ones.

    Raises:
        ConfigError: The backbone cannot be built, or its weights are others.
    """

    def __init__(self, source: FeatureSource, data: ShardDataModule, checkpoint: str | None = None) -> None:
        self.backbone = _backbone(source, checkpoint)
        self.source = source
        self.transform = BatchTransform(
            data.transform.image_size or source.image_size,
            resize_mode=data.transform.resize_mode,
            crop=data.transform.crop,
            mean=self.backbone.mean,
            std=self.backbone.std,
        )

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Computes features.

        Args:
            batch: `video` uint8 (1, T, h, w, 3) and `crop` (1, 2), on the device that is to be used.

        Returns:
            float32 (1, T, N, D), rounded as the cache rounds them.

        Raises:
            ConfigError: The features are not finite.
        """
        video = batch["video"]
        backbone = self.backbone.to(video.device)
        projection = None if self.source.projection is None else self.source.projection.to(video.device)
        parts = []
        for first in range(0, video.shape[1], _BATCH):
            piece = {"video": video[:, first : first + _BATCH], "crop": batch["crop"]}
            features = backbone(self.transform(piece)["video"][0]).features
            if projection is not None:
                features = projection(features)
            if not bool(features.isfinite().all()):
                raise ConfigError(
                    f"Expected backbone {backbone.name} to give finite features, but got NaN or infinity. Check its "
                    "weights and the video."
                )
            parts.append(features.to(torch.bfloat16).float())
        return torch.cat(parts)[None]


def _source(recipe: FeatureRecipe, projection: Projection | None) -> FeatureSource:
    return FeatureSource(recipe.backbone, recipe.layer, recipe.weights, projection, recipe.image_size)


def _backbone(source: FeatureSource, checkpoint: str | None) -> FrozenBackbone:
    from ssync_pl.hosts.nn.backbones import load_backbone

    tried = [(None, checkpoint)] if checkpoint is not None else [("pretrained", None), ("none", None)]
    for weights, file in tried:
        backbone = load_backbone(source.backbone, source.layer, weights, file)  # type: ignore[arg-type]
        if source.weights is None or backbone.fingerprint == source.weights:
            return backbone
    raise ConfigError(
        f"Expected backbone {source.backbone} with the weights that the host's features were made with (sha256 "
        f"{(source.weights or '')[:12]}…), but {checkpoint or 'its published weights'} are others. Pass the file of "
        "weights that `ssync-pl data cache-features --checkpoint` got as --backbone_checkpoint."
    )


def _read(projection: str) -> Projection:
    if not Path(projection).is_file():
        raise ConfigError(f"Expected --projection to be a {PROJECTION_FILE}, but {projection} does not exist.")
    return read_projection(projection)


def _no_projection(folder: Path, what: str) -> ConfigError:
    return ConfigError(
        f"Expected {folder} to hold the features that the host was trained on, with their {PROJECTION_FILE}, but "
        f"{what}. Pass that file, from wherever the folder is now, as --projection."
    )
