"""Features of new videos for hosts that were trained on a cache: same backbone, layer and projection, on the fly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssync_pl.data.datamodule import ShardDataModule
from ssync_pl.data.features.projection import PROJECTION_FILE, Projection, read_projection
from ssync_pl.data.features.recipe import FeatureRecipe, read_recipe
from ssync_pl.data.transforms import BatchTransform
from ssync_pl.errors import ConfigError, require

if TYPE_CHECKING:
    from ssync_pl.hosts.nn.backbones import FrozenBackbone

__all__ = ["FeatureMaker", "find_features"]

_BATCH = 32


def find_features(data: ShardDataModule, given: str | None) -> tuple[FeatureRecipe, Projection | None] | None:
    """Finds out how the cached features of a data module were made; None without.

    The folder of the cache says it; where the folder is gone, its projection does, whose path may be `given`.
    """
    if data.features is None:
        require(given is None, "--projection only with cached features", "a data module without")
        return None
    folder = Path(data.features)
    path = Path(given) if given is not None else folder / PROJECTION_FILE
    projection = read_projection(path) if path.is_file() else None
    require(given is None or projection is not None, "--projection to be a file", f"{path}, which does not exist")
    shards = sorted(folder.glob("*.tar"))
    if not shards and projection is not None and "features" in projection.info:
        return FeatureRecipe.from_json(projection.info["features"]), projection
    if not shards:
        raise ConfigError(
            f"Expected {folder} to hold the features that the host was trained on, but there are none. Put them back, "
            f"or pass their {PROJECTION_FILE} as --projection."
        )
    recipe, _ = read_recipe(shards[0])
    if recipe.projection != ("" if projection is None else projection.fingerprint):
        raise ConfigError(
            f"Expected the projection of the features in {folder} (sha256 {recipe.projection[:12] or 'none'}), but "
            f"{path} {'is missing' if projection is None else 'holds another'}. Pass theirs as --projection."
        )
    return recipe, projection


class FeatureMaker:
    """Turns frames into the features that a cache would hold of them; the backbone's weights have to be the same."""

    def __init__(self, recipe: FeatureRecipe, projection: Projection | None, checkpoint: str | None = None) -> None:
        self.backbone, self.projection, self.recipe = _backbone(recipe, checkpoint), projection, recipe
        self.transform = BatchTransform(
            recipe.image_size, resize_mode=recipe.resize_mode, crop=recipe.crop, mean=recipe.mean, std=recipe.std
        )

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Features (1, T, N, D) of `video` uint8 (1, T, h, w, 3) with `crop` (1, 2), rounded as in the cache."""
        video = batch["video"]
        backbone = self.backbone.to(video.device)
        projection = None if self.projection is None else self.projection.to(video.device)
        parts = []
        for first in range(0, video.shape[1], _BATCH):
            piece = {"video": video[:, first : first + _BATCH], "crop": batch["crop"]}
            features = backbone(self.transform(piece)["video"][0]).features
            features = features if projection is None else projection(features)
            finite = bool(features.isfinite().all())
            require(finite, f"backbone {backbone.name} to give finite features", "NaN or infinity", advice="Check it.")
            parts.append(features.to(torch.bfloat16).float())
        return torch.cat(parts)[None]


def _backbone(recipe: FeatureRecipe, checkpoint: str | None) -> FrozenBackbone:
    from ssync_pl.hosts.nn.backbones import load_backbone

    for weights, file in [("pretrained", None), ("none", None)] if checkpoint is None else [(None, checkpoint)]:
        backbone = load_backbone(recipe.backbone, recipe.layer, weights, file)  # type: ignore[arg-type]
        if backbone.fingerprint == recipe.weights:
            return backbone
    raise ConfigError(
        f"Expected backbone {recipe.backbone} with the weights that the host's features were made with (sha256 "
        f"{recipe.weights[:12]}…), but {checkpoint or 'its published weights'} are others. Pass the file of weights "
        "that `ssync-pl data cache-features --checkpoint` got as --backbone_checkpoint."
    )
