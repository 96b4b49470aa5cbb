"""Features of new videos for hosts that were trained on a cache: same backbone, layer and projection, on the fly."""

from __future__ import annotations

from pathlib import Path

from ssync_pl.data.datamodule import ShardDataModule
from ssync_pl.data.features.cache import FeatureMaker
from ssync_pl.data.features.projection import PROJECTION_FILE, Projection, read_projection
from ssync_pl.data.features.recipe import FeatureRecipe, read_recipe
from ssync_pl.errors import ConfigError, require

__all__ = ["find_features", "make_features"]


def find_features(data: ShardDataModule, given: str | None) -> tuple[FeatureRecipe, Projection | None] | None:
    """Finds out how the features were made that the data module of the configuration gives.

    The folder of the cache says it; where the folder is gone, its projection does.

    Args:
        data: The data module of the configuration.
        given: `projection.npz` of the cache; None for that in its folder.

    Returns:
        None for hosts without cached features.

    Raises:
        ConfigError: The projection is not to be found, or is another one.
    """
    if data.features is None:
        require(
            given is None, "--projection only with cached features", "a data module without", advice="Leave it out."
        )
        return None
    folder = Path(data.features)
    path = folder / PROJECTION_FILE if given is None else Path(given)
    require(given is None or path.is_file(), "--projection to be a file", f"{path}, which does not exist")
    projection = read_projection(path) if path.is_file() else None
    shards = sorted(folder.glob("*.tar"))
    if shards:
        recipe, _ = read_recipe(shards[0])
    elif projection is not None and "features" in projection.info:
        return FeatureRecipe.from_json(projection.info["features"]), projection
    else:
        raise ConfigError(
            f"Expected {folder} to hold the features that the host was trained on, but there are none. Put them back, "
            f"or pass their {PROJECTION_FILE} as --projection."
        )
    if not recipe.projection:
        require(given is None, "--projection only with projected features", f"those in {folder}, which are not")
        return recipe, None
    if projection is None or projection.fingerprint != recipe.projection:
        raise ConfigError(
            f"Expected the projection that the features in {folder} were made with (sha256 {recipe.projection[:12]}…), "
            f"but {path} {'is missing' if projection is None else 'holds another'}. Pass the {PROJECTION_FILE} of that "
            "cache as --projection."
        )
    return recipe, projection


def make_features(recipe: FeatureRecipe, projection: Projection | None, checkpoint: str | None) -> FeatureMaker:
    """Builds what turns frames into the features of a recipe, from a file of the backbone's weights or published ones.

    Raises:
        ConfigError: The backbone cannot be built, or its weights are others.
    """
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
