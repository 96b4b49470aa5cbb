"""Shards, loaders and transforms; names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssync_pl.data.datamodule import ShardDataModule
    from ssync_pl.data.index import load_shards
    from ssync_pl.data.shards import ShardWriter
    from ssync_pl.data.synthetic_datamodule import SyntheticDataModule

__all__ = ["ShardDataModule", "ShardWriter", "SyntheticDataModule", "load_shards"]

_HOMES = {
    "ShardDataModule": "ssync_pl.data.datamodule",
    "ShardWriter": "ssync_pl.data.shards",
    "SyntheticDataModule": "ssync_pl.data.synthetic_datamodule",
    "load_shards": "ssync_pl.data.index",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
