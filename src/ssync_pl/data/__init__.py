"""Shards, loaders and transforms; names are imported when they are first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssync_pl.data.datamodule import ShardDataModule
    from ssync_pl.data.index import load_shards
    from ssync_pl.data.shards import ShardWriter
    from ssync_pl.data.synthetic_datamodule import SyntheticDataModule

__all__ = ["ShardDataModule", "ShardWriter", "SyntheticDataModule", "load_shards"]

_HOMES = dict(zip(__all__, ("datamodule", "shards", "synthetic_datamodule", "index"), strict=True))


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
