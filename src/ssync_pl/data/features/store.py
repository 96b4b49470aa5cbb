"""Reading stored features, clip by clip."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssync_pl.data.features.recipe import find_shard, read_recipe, require_crop, require_same, source_facts
from ssync_pl.data.index import ShardEntry, load_shards
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ShardError, require

__all__ = ["FeatureStore", "member_name"]


def member_name(flip: bool) -> str:
    """Name of a sample's member with the features of its frames, or of its mirrored frames."""
    return "features_flipped.npy" if flip else "features.npy"


class FeatureStore:
    """Stored features of some shards, given by path and index entry, which may leave samples out.

    Refuses to open where shards are missing or damaged, or were made of other videos or with other settings. The
    videos are compared by content: that reads each shard once, later starts trust files of the same size and time of
    change. A store pickles without open files.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        sources: Sequence[tuple[str, ShardEntry]],
        *,
        image_size: int | tuple[int, int] | None,
        resize_mode: str,
        crop: str,
        flips: bool,
    ) -> None:
        require_crop(crop)
        self.folder, places = Path(folder), [place for place, _ in sources]
        advice = "Run `ssync-pl data cache-features … --out FOLDER` first; it goes on where it stopped."
        ok, expected = self.folder.is_dir() and bool(places), "argument `features` to be a folder of stored features"
        require(ok, expected, f"{str(folder)!r} for {len(places)} shards", advice=advice)
        facts = [source_facts(*source, self.folder) for source in zip(places, load_shards(places), strict=True)]
        found = [find_shard(self.folder, fact) for fact in facts]
        missing = [place for place, (_, there) in zip(places, found, strict=True) if not there]
        if missing:
            raise ShardError(
                f"Expected {folder} to hold features of all {len(places)} shards, but those of {len(missing)} are "
                f"missing or of other videos, first {missing[0]}. {advice}"
            )
        paths = [path for path, _ in found]
        stored = self.recipe = read_recipe(paths[0])[0]
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        wanted: dict[str, Any] = {"image_size": size and tuple(size), "resize_mode": resize_mode, "crop": crop}
        for path in paths:
            require_same(path, read_recipe(path)[0], replace(stored, **wanted, flips=stored.flips or flips))
        self._shards = {
            place: (str(path), entry, {sample.key: sample for sample in entry.samples})
            for place, path, entry in zip(places, paths, load_shards(paths, save=False), strict=True)
        }
        self._reader = ShardReader()

    def read(self, shard: str, key: str, frames: slice, flip: bool) -> dict[str, Tensor]:
        """Read `features` (T, N, D) bfloat16 of frames of a video, mirrored with `flip`; the slice's step is positive.

        `ShardError` where there are none, too few, or damaged ones.
        """
        path, entry, samples = self._shards[shard]
        name, shape = member_name(flip), (self.recipe.grid[0] * self.recipe.grid[1], self.recipe.dim)
        if key not in samples or name not in samples[key].members:
            raise ShardError(
                f"Expected {path} to hold `{name}` of key {key}, but it has none: the video could not be read when the "
                "features were made, or mirrored frames were not asked for. Make the features again."
            )
        members = self._reader.sample(path, entry, samples[key], max_bytes=entry.size)
        header = members.header(name)
        count = header.shape[0] if header.shape[1:] == shape and header.dtype == np.dtype("<u2") else 0
        if (frames.start or 0) >= count or (frames.stop or 0) > count:
            raise ShardError(
                f"Expected `{name}` of {path}, key {key} to hold bits of bfloat16 (T, {shape[0]}, {shape[1]}) of "
                f"frames {frames.start or 0} to {frames.stop or 'the last'}, but got {header.shape} {header.dtype}. "
                "Delete the file and run `ssync-pl data cache-features` again."
            )
        return {"features": torch.from_numpy(members.rows(name, frames).view(np.int16)).view(torch.bfloat16)}

    def close(self) -> None:
        """Close the files of this process; reading opens them again."""
        self._reader.close()
