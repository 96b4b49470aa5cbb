"""Features of a frozen backbone, computed once and stored beside the shards; names are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssync_pl.data.features.cache import CacheReport, cache_features
    from ssync_pl.data.features.codec import decode_features, encode_features
    from ssync_pl.data.features.projection import Projection, read_projection
    from ssync_pl.data.features.recipe import FeatureRecipe, verify_backbone
    from ssync_pl.data.features.store import FeatureStore

__all__ = [
    "CacheReport",
    "FeatureRecipe",
    "FeatureStore",
    "Projection",
    "cache_features",
    "decode_features",
    "encode_features",
    "read_projection",
    "verify_backbone",
]

_HOMES = {
    "CacheReport": "cache",
    "FeatureRecipe": "recipe",
    "FeatureStore": "store",
    "Projection": "projection",
    "cache_features": "cache",
    "decode_features": "codec",
    "encode_features": "codec",
    "read_projection": "projection",
    "verify_backbone": "recipe",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
