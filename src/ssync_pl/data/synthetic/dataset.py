"""Writes a synthetic data set as shards, in one step: a folder is there complete, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.convert.writer import Item, convert, record_path
from ssync_pl.data.index import read_index, write_index
from ssync_pl.data.processes import may_start_processes
from ssync_pl.data.synthetic.config import GENERATOR_VERSION, SceneConfig
from ssync_pl.data.synthetic.render import render_scene
from ssync_pl.data.synthetic.scene import sample_scene
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["DEFAULT_SPLITS", "dataset_folder", "generate", "split_seed"]

DEFAULT_SPLITS: Mapping[str, int] = {"train": 440, "validation": 48}
"""Videos per split: enough for a small model to learn objects in minutes."""


def split_seed(seed: int, split: str) -> int:
    """Return the seed that ``render_video`` takes for a split's videos.

    Args:
        seed: Seed of the data set, at least 0.
        split: Name of the split.

    Returns:
        A 64-bit number, another one for every seed and split, so that no two splits share a video.

    Raises:
        ConfigError: The seed is negative or no whole number.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ConfigError(f"Expected argument `seed` to be a whole number, 0 or more, but got {seed!r}.")
    return int(np.random.SeedSequence(int(seed), spawn_key=tuple(split.encode())).generate_state(1, np.uint64)[0])


def dataset_folder(
    root: str | os.PathLike[str],
    config: SceneConfig,
    splits: Mapping[str, int] = DEFAULT_SPLITS,
    seed: int = 0,
    samples_per_shard: int = 32,
) -> Path:
    """Return the folder that ``generate`` fills for the same arguments.

    Args:
        root: Folder of all generated data sets.
        config: Settings of the scenes.
        splits: Split name → number of videos.
        seed: Seed of the data set, at least 0.
        samples_per_shard: Videos per shard.

    Returns:
        ``<root>/<name>-<12 digits of a hash of all the rest>``; nothing is made.

    Raises:
        ConfigError: An argument is out of range.
    """
    recipe = _recipe(config, splits, seed, samples_per_shard)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return Path(root) / f"{config.name}-{digest}"


def generate(
    root: str | os.PathLike[str],
    config: SceneConfig,
    splits: Mapping[str, int] = DEFAULT_SPLITS,
    seed: int = 0,
    num_workers: int | None = None,
    samples_per_shard: int = 32,
    progress: bool = True,
) -> Path:
    """Render a data set into shards ``<name>-<split>-000000.tar`` …, or return at once when it is there.

    All is written to a hidden folder beside the final one, which is renamed at the end: whoever stops half-way leaves
    nothing that looks complete, and of two processes that generate the same set, the later one drops its copy. Members
    of a sample: ``video.npy``, ``segmentations.npy.gz`` and ``instances.json`` (see ``render_scene``).

    Args:
        root: Folder of all generated data sets; made when absent.
        config: Settings of the scenes.
        splits: Split name → number of videos; splits never share videos.
        seed: Seed of the data set, at least 0.
        num_workers: Processes that render; 0 renders in this one. None: one per CPU, but none for a handful of videos.
            The result does not depend on it.
        samples_per_shard: Videos per shard.
        progress: Show a bar on standard error.

    Returns:
        The folder; its ``index.json`` holds the recipe.

    Raises:
        ConfigError: An argument is out of range, or the objects do not fit where they start.
        ShardError: The disk is full or refuses, or the folder is there but damaged.
    """
    if num_workers is not None and (isinstance(num_workers, bool) or num_workers < 0):
        raise ConfigError(f"Expected argument `num_workers` to be 0 or more, or None, but got {num_workers!r}.")
    recipe = _recipe(config, splits, seed, samples_per_shard)
    final = dataset_folder(root, config, splits, seed, samples_per_shard)
    if _is_complete(final, recipe):
        return final
    if num_workers != 0:
        # A half-started process is killed at any time: it must not make a folder that nobody removes.
        may_start_processes()
    # settings that never fit are refused before anything is written
    for number in recipe["split_seeds"].values():
        sample_scene(replace(config, frames=1), number, 0)
    # the random part lets processes of several machines share a disk
    scratch = final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        scratch.mkdir(parents=True)
        _fill(scratch, config, recipe, num_workers, progress)
        try:
            os.replace(scratch, final)
        except OSError:
            # another process was first: its copy is the same to the bit
            if not _is_complete(final, recipe):
                raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "The disk is full: free some space or choose another folder." if full else "Choose another folder."
        raise ShardError(f"Expected to write a data set to {final}, but got {error}. {advice}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def _recipe(config: SceneConfig, splits: Mapping[str, int], seed: int, samples_per_shard: int) -> dict[str, Any]:
    if not isinstance(config, SceneConfig):
        raise ConfigError(f"Expected argument `config` to be a SceneConfig, but got {type(config).__name__}.")
    counts = {"samples_per_shard": samples_per_shard, **{f"splits[{split!r}]": n for split, n in splits.items()}}
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 10**6:
            raise ConfigError(f"Expected argument `{name}` to be from 1 to 999999 videos, but got {count!r}.")
    if not splits or not all(isinstance(split, str) and split.isidentifier() for split in splits):
        raise ConfigError(f"Expected argument `splits` to have names of letters, digits and `_`, but got {[*splits]}.")
    return {
        "generator": "ssync_pl.data.synthetic",
        "generator_version": GENERATOR_VERSION,
        "config": config.to_dict(),
        "seed": int(seed),
        "split_seeds": {split: split_seed(seed, split) for split in splits},
        "splits": dict(splits),
        "samples_per_shard": samples_per_shard,
    }


def _is_complete(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Return whether the folder is there; raise when it is there but not whole."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    index = read_index(folder) if folder.is_dir() else None
    problem = None
    if index is None:
        problem = "there is no readable `index.json` in it"
    elif index.recipe != recipe:
        problem = "its `index.json` names another recipe"
    else:
        for split, count in recipe["splits"].items():
            shards = [e for n, e in index.shards.items() if n.startswith(f"{recipe['config']['name']}-{split}-")]
            found = sum(len(entry.samples) for entry in shards)
            if found != count:
                problem = f"it lists {found} videos of {split}, not {count}"
            for entry in shards:
                path = folder / entry.name
                if not path.is_file() or path.stat().st_size != entry.size:
                    problem = f"`{entry.name}` is missing or cut short"
    if problem:
        raise ShardError(
            f"Expected {folder} to hold a complete data set, but {problem}. Delete the folder: it is made again."
        )
    return True


@dataclass(frozen=True)
class _Render:
    """Make the members of the video with the seed and number of an item."""

    config: SceneConfig

    def __call__(self, item: Item) -> dict[str, Any]:
        arrays, facts = render_scene(self.config, *item.source)
        video, masks = arrays["video"], arrays["segmentations"]
        return {"video.npy": video, "segmentations.npy.gz": masks, "instances.json": facts}


def _fill(
    folder: Path, config: SceneConfig, recipe: Mapping[str, Any], num_workers: int | None, progress: bool
) -> None:
    for split, count in recipe["splits"].items():
        prefix = f"{config.name}-{split}"
        items = [Item(f"{i:06d}", [recipe["split_seeds"][split], i]) for i in range(count)]
        options: dict[str, Any] = {"samples_per_shard": recipe["samples_per_shard"], "progress": progress, "recipe": {}}
        try:
            convert(items, _Render(config), folder, prefix, num_workers=num_workers, **options)
        except ShardError as error:
            if not isinstance(error.__cause__, BrokenProcessPool):
                raise
            warnings.warn(
                "Rendering goes on in one process, because the worker processes ended early: memory ran out, or the "
                'main script lacks `if __name__ == "__main__":`. Pass num_workers=0 to start none.',
                stacklevel=2,
            )
            convert(items, _Render(config), folder, prefix, num_workers=0, **options)
        record_path(folder, prefix).unlink()
    index = read_index(folder)
    write_index(folder, index.shards.values() if index else (), recipe)
