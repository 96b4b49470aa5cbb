"""Features of new videos for hosts that were trained on a cache: same backbone, layer and projection, on the fly."""

from __future__ import annotations

from pathlib import Path

from ssync_pl.data.datamodule import ShardDataModule
from ssync_pl.data.features.cache import FeatureMaker
from ssync_pl.data.features.projection import PROJECTION_FILE, Projection, read_projection
from ssync_pl.data.features.store import FeatureRecipe, read_recipe
from ssync_pl.errors import ConfigError, require

__all__ = ["find_features", "make_features"]


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


def make_features(recipe: FeatureRecipe, projection: Projection | None, checkpoint: str | None) -> FeatureMaker:
    """What turns frames into the features of a recipe; the backbone's weights have to be the same."""
    from ssync_pl.hosts.nn.backbones import load_backbone

    for weights, file in [("pretrained", None), ("none", None)] if checkpoint is None else [(None, checkpoint)]:
        backbone = load_backbone(recipe.backbone, recipe.layer, weights, file)  # type: ignore[arg-type]
        if backbone.fingerprint == recipe.weights:
            return FeatureMaker(backbone, recipe, projection)
    raise ConfigError(
        f"Expected backbone {recipe.backbone} with the weights that the host's features were made with (sha256 "
        f"{recipe.weights[:12]}…), but {checkpoint or 'its published weights'} are others. Pass the file of weights "
        "that `ssync-pl data cache-features --checkpoint` got as --backbone_checkpoint."
    )
