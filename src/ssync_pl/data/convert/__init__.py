"""Converters from the original formats of video data sets to shards."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssync_pl.data.convert.engine import ConversionReport, Item, convert

__all__ = ["ConversionReport", "Item", "convert"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module("ssync_pl.data.convert.engine"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
