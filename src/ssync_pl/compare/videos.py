"""Which videos a loader reads, so that none is scored that was trained on, and the shapes of their objects."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import Subset

from ssync_pl.data.dataset import ShardBatches, ShardDataset
from ssync_pl.data.patterns import is_remote
from ssync_pl.errors import ConfigError

__all__ = ["ShapeTable", "flat_loaders", "refuse_shared_videos"]

_INSTANCES = "instances.json"


def flat_loaders(loaders: Any) -> list[Any]:
    """Returns the loaders in what a Trainer holds: one, several in a list or a dict, or None."""
    return [] if loaders is None else [one for one in CombinedLoader(loaders).flattened if one is not None]


def refuse_shared_videos(train: Any, validation: Any) -> None:
    """Refuses loaders that share a video, as far as their data sets say what they hold."""
    trained = {name for loader in flat_loaders(train) for name in _names(getattr(loader, "dataset", None))}
    for loader in flat_loaders(validation):
        scored = set(_names(getattr(loader, "dataset", None)))
        shared = len(scored & trained)
        if shared:
            raise ConfigError(
                f"Expected validation videos that are not trained on, but {shared} of {len(scored)} are in the "
                "training set as well. Name other videos for validation."
            )


class ShapeTable:
    """Shapes of objects, from the `instances.json` that the packaged data set has beside its videos."""

    def __init__(self, loader: Any) -> None:
        self._dataset: ShardDataset | None = None
        self._places: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        dataset = getattr(loader, "dataset", None)
        if isinstance(dataset, ShardDataset):
            self._places = {sample.key: place for place, (_, sample) in enumerate(dataset.samples)}
            described = all(_INSTANCES in sample.members for _, sample in dataset.samples)
            if described and len(self._places) == len(dataset.samples):  # a batch names its videos by key alone
                self._dataset = dataset

    def classes(self, keys: Sequence[str], channels: int, has_background: bool) -> Tensor | None:
        """Returns a number for the shape of each object, int64 `(B, C)`, -1 for none; None without a table."""
        if self._dataset is None or any(key not in self._places for key in keys):
            return None
        table = torch.full((len(keys), channels), -1, dtype=torch.int64)
        for row, key in enumerate(keys):
            place = self._places[key]
            content = self._dataset.members(place).decode(_INSTANCES)
            for one in content.get("instances", []) if isinstance(content, dict) else []:
                channel = int(one["id"]) - (0 if has_background else 1)
                if 0 <= channel < channels and "shape" in one:
                    table[row, channel] = self._numbers.setdefault(str(one["shape"]), len(self._numbers))
        return table


def _names(dataset: Any) -> list[str]:
    """Shard and key where shards are read, else the set itself and the places in it, in the order of its indices."""
    if isinstance(dataset, ShardBatches):
        return [_shard_name(dataset.source.shards[shard], sample.key) for shard, sample in dataset.samples]
    if isinstance(dataset, Subset):
        whole = _names(dataset.dataset)
        return [whole[index] for index in dataset.indices if index < len(whole)]
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return [f"{id(dataset)}#{index}" for index in range(len(dataset))]
    return []


def _shard_name(path: str, key: str) -> str:
    # two ways to write one folder are one folder
    return f"{path if is_remote(path) else os.path.realpath(path)}/{key}"
