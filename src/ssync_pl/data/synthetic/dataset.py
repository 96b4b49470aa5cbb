"""Writes a synthetic data set as shards, through the converters' writer."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.convert.writer import convert
from ssync_pl.data.files import exclusive
from ssync_pl.data.index import read_index, write_index
from ssync_pl.data.processes import may_start_processes
from ssync_pl.data.synthetic.config import SceneConfig, number
from ssync_pl.data.synthetic.render import render_video
from ssync_pl.data.synthetic.scene import sample_scene
from ssync_pl.errors import explained


def dataset_folder(root: str | os.PathLike[str], config: SceneConfig, splits: Mapping[str, int], seed: int = 0) -> Path:
    """Returns the folder that `generate` fills for the same arguments: ``<root>/<name>-<hash of all the rest>``."""
    recipe = json.dumps(_recipe(config, splits, seed), sort_keys=True)
    return Path(root) / f"{config.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def generate(
    root: str | os.PathLike[str],
    config: SceneConfig,
    splits: Mapping[str, int],
    seed: int = 0,
    num_workers: int | None = None,
) -> Path:
    """Renders a data set into shards ``<name>-<split>-000000.tar`` …, or returns at once when it is there.

    A run that was stopped goes on where it was; of several processes that generate the same set, one works and the
    others wait. Members of a sample: ``video.npy`` and ``segmentations.npy.gz`` (see ``render_video``).

    Args:
        root: Folder of all generated data sets; made when absent.
        config: Settings of the scenes.
        splits: Split name → number of videos; splits never share videos.
        seed: Seed of the data set, at least 0.
        num_workers: Processes that render; 0 renders in this one, None has one per CPU. Results do not depend on it.

    Returns:
        The folder; its ``index.json`` holds the recipe.

    Raises:
        ConfigError: An argument is out of range, or the objects do not fit where they start.
        ShardError: The disk is full or refuses, or the folder holds other shards.
    """
    recipe, folder = _recipe(config, splits, seed), dataset_folder(root, config, splits, seed)
    if _is_complete(folder, recipe):
        return folder
    may_start_processes()  # a script without a main guard must not wait for its own lock
    for first in recipe["split_seeds"].values():  # settings that never fit are refused before anything is written
        sample_scene(replace(config, frames=1), first, 0)
    with explained(f"to write to {folder}", OSError, advice="Choose another folder."):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / ".generate.lock", timeout=-1):
            if not _is_complete(folder, recipe):
                for split, count in splits.items():
                    items = [[recipe["split_seeds"][split], i] for i in range(count)]
                    prefix = f"{config.name}-{split}"
                    convert(items, partial(_render, config), folder, prefix, recipe={}, num_workers=num_workers)
                index = read_index(folder)
                write_index(folder, index.shards.values() if index else (), recipe)
    return folder


def _recipe(config: SceneConfig, splits: Mapping[str, int], seed: int) -> dict[str, Any]:
    """All that decides the bytes of a set; sets of earlier versions, which had more settings, keep their folders."""
    seed = number("seed", seed, int, 0, 2**63)
    sources = {split: np.random.SeedSequence(seed, spawn_key=tuple(split.encode())) for split in splits}
    settings = {"camera_motion": "static", "camera_travel": 0.0, "max_speed": 4.0, **asdict(config)}
    for name in ("camera_shell", "camera_elevation"):  # they came after the first sets were made
        if getattr(config, name) == getattr(SceneConfig, name):
            del settings[name]
    recipe = {
        "generator": "ssync_pl.data.synthetic",
        "generator_version": 1,  # raised whenever the same settings would give other pixels
        "config": settings,
        "seed": seed,
        "split_seeds": {split: int(source.generate_state(1, np.uint64)[0]) for split, source in sources.items()},
        "splits": {split: number(f"splits[{split!r}]", count, int, 1, 999_999) for split, count in splits.items()},
        "samples_per_shard": 32,
    }
    return dict(json.loads(json.dumps(recipe)))


def _is_complete(folder: Path, recipe: Mapping[str, Any]) -> bool:
    index = read_index(folder)
    if index is None or index.recipe != recipe:
        return False
    paths = {folder / entry.name: entry.size for entry in index.shards.values()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _render(config: SceneConfig, source: tuple[int, int]) -> dict[str, Any]:
    made = render_video(config, *source)
    return {"video.npy": made["video"], "segmentations.npy.gz": made["segmentations"]}
