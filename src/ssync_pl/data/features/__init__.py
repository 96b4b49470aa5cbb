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

_HOMES = {
    "cache": ("CacheReport", "cache_features"),
    "codec": ("decode_features", "encode_features"),
    "projection": ("Projection", "read_projection"),
    "recipe": ("FeatureRecipe", "verify_backbone"),
    "store": ("FeatureStore",),
}
__all__ = [
    "CacheReport", "FeatureRecipe", "FeatureStore", "Projection", "cache_features", "decode_features",
    "encode_features", "read_projection", "verify_backbone",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
