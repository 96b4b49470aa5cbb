"""Which videos a loader reads: that none is trained on, which they are, and what shapes their objects have."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from ssync_pl.data.dataset import ShardDataset
from ssync_pl.data.patterns import is_remote
from ssync_pl.data.stream import ShardStream
from ssync_pl.errors import ConfigError

__all__ = ["ShapeTable", "flat_loaders", "hash_keys", "refuse_shared_videos", "video_names"]

_INSTANCES = "instances.json"


def flat_loaders(loaders: Any) -> list[Any]:
    """The loaders in what a Trainer holds.

    Args:
        loaders: One loader, several in a list or a dict, or None.

    Returns:
        The loaders.

    Example:
        >>> flat_loaders({"a": 1, "b": [2, 3]})
        [1, 2, 3]
    """
    if loaders is None:
        return []
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return (
        [found for one in loaders for found in flat_loaders(one)] if isinstance(loaders, (list, tuple)) else [loaders]
    )


def video_names(loader: Any) -> set[str] | None:
    """Names of the videos behind a loader, by which two loaders can be compared.

    Args:
        loader: A loader with `dataset`.

    Returns:
        Shard and key where shards are read; else the data set itself and the places in it. None where the set does not
        say what it holds.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> items = list(range(6))
        >>> one, other = DataLoader(Subset(items, [0, 1])), DataLoader(Subset(items, [1, 2]))
        >>> len(video_names(one) & video_names(other))
        1
    """
    names = _names(getattr(loader, "dataset", None))
    return None if names is None else set(names)


def refuse_shared_videos(train: Any, validation: Any) -> None:
    """Refuse to score videos that were trained on.

    Args:
        train: Training loader, or several.
        validation: Validation loader, or several.

    Raises:
        ConfigError: The two share a video, as far as they say what they hold.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader([1, 2])
        >>> refuse_shared_videos(loader, loader)
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected validation videos that are not trained on, but 2 of 2 are in the \
training set as well. Name other videos for validation.
    """
    trained = set().union(*(video_names(loader) or set() for loader in flat_loaders(train)))
    for loader in flat_loaders(validation):
        scored = video_names(loader) or set()
        shared = len(scored & trained)
        if shared:
            raise ConfigError(
                f"Expected validation videos that are not trained on, but {shared} of {len(scored)} are in the "
                "training set as well. Name other videos for validation."
            )


def hash_keys(loader: Any, keys: Iterable[str]) -> str:
    """A short name for the videos that were scored: equal where two runs were scored on the same ones.

    Args:
        loader: The loader; where it reads shards with an index, these and the sizes of their members are part of it.
        keys: Keys of the videos.

    Returns:
        16 hexadecimal digits; the order of the videos and the place of the folder do not matter.

    Example:
        >>> hash_keys(None, ["a", "b"]) == hash_keys(None, ["b", "a"])
        True
    """
    dataset = getattr(loader, "dataset", None)
    entries = dataset.shards or [] if isinstance(dataset, (ShardDataset, ShardStream)) else []
    scored = set(keys)
    content = [
        sorted(scored),
        # sets that were made alike share keys and names of shards, but no sizes of packed masks
        sorted(
            [entry.name, sample.key, sorted((member, size) for member, (_, size) in sample.members.items())]
            for entry in entries
            for sample in entry.samples
            if sample.key in scored
        ),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class ShapeTable:
    """Shapes of objects from the `instances.json` that the packaged data set has beside its videos.

    Args:
        loader: A loader of mapped shards; others have no table.

    Example:
        >>> ShapeTable(None).classes(["7"], channels=3, has_background=True) is None
        True
    """

    def __init__(self, loader: Any) -> None:
        self._dataset: ShardDataset | None = None
        self._places: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        dataset = getattr(loader, "dataset", None)
        if isinstance(dataset, ShardDataset):
            keys = [sample.key for _, sample in dataset.samples]
            described = all(_INSTANCES in sample.members for _, sample in dataset.samples)
            if described and len(set(keys)) == len(keys):  # a batch names its videos by key alone
                self._dataset = dataset
                self._places = {key: place for place, key in enumerate(keys)}

    def classes(self, keys: Sequence[str], channels: int, has_background: bool) -> Tensor | None:
        """Shape of each object of a batch.

        Args:
            keys: Keys of its videos.
            channels: Number C of channels of its true masks.
            has_background: Channel 0 is the background.

        Returns:
            int64 `(B, C)`, a number a shape, -1 where there is none; None without a table.

        Example:
            >>> ShapeTable(None).classes([], 2, True) is None
            True
        """
        if self._dataset is None or any(key not in self._places for key in keys):
            return None
        table = torch.full((len(keys), channels), -1, dtype=torch.int64)
        for row, key in enumerate(keys):
            place = self._places[key]
            content = self._dataset.members(place).decode(_INSTANCES)
            instances = content.get("instances", []) if isinstance(content, dict) else []
            for one in instances:
                channel = int(one["id"]) - (0 if has_background else 1)
                if 0 <= channel < channels and "shape" in one:
                    table[row, channel] = self._numbers.setdefault(str(one["shape"]), len(self._numbers))
        return table


def _names(dataset: Any) -> list[str] | None:
    """In the order of the set's indices."""
    if isinstance(dataset, ShardDataset):
        return [_shard_name(dataset.paths[shard], sample.key) for shard, sample in dataset.samples]
    if isinstance(dataset, ShardStream):
        if dataset.shards is None:
            return None
        pairs = zip(dataset.urls, dataset.shards, strict=True)
        return [_shard_name(url, sample.key) for url, entry in pairs for sample in entry.samples]
    if isinstance(dataset, Subset):
        whole = _names(dataset.dataset)
        return None if whole is None else [whole[index] for index in dataset.indices if index < len(whole)]
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return [f"{id(dataset)}#{index}" for index in range(len(dataset))]
    return None


def _shard_name(path: str, key: str) -> str:
    # two ways to write one folder are one folder
    return f"{path if is_remote(path) else os.path.realpath(path)}/{key}"
