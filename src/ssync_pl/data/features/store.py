"""Reading stored features, clip by clip."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ssync_pl.data.features.codec import array_to_tensor, member_names, stored_dtype
from ssync_pl.data.features.recipe import find_shard, read_recipe, require_crop, require_local, source_facts
from ssync_pl.data.index import ShardEntry, load_shards
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["FeatureStore"]


class FeatureStore:
    """Stored features of some shards; refuses to open where they do not fit the shards or the settings.

    The videos are compared by content with those that the features were made from. That reads each shard once; later
    starts trust files of the same size and time of change. A store pickles without its memory maps: each worker
    process opens its own.

    Args:
        folder: What `ssync-pl data cache-features` wrote.
        sources: Path and index entry of each shard of videos; the entry may leave samples out.
        image_size: Height and width of the frames in the batch, or one number for both.
        resize_mode: How frames are resized.
        crop: How frames are cropped.
        flips: Whether features of mirrored frames will be asked for.

    Attributes:
        recipe: How the features were made; see `FeatureRecipe`.
        grid: Rows and columns of the patches.
        dim: D, size of a feature.

    Raises:
        ConfigError: A setting does not fit what is stored, or there is no such folder.
        ShardError: Features of a shard are missing or damaged, or its videos have changed.
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
        self.folder = Path(folder)
        if not self.folder.is_dir() or not sources:
            raise ConfigError(
                f"Expected argument `features` to be a folder of stored features of at least one shard, but got "
                f"{str(folder)!r} for {len(sources)} shards. Run `ssync-pl data cache-features … --out FOLDER` first."
            )
        places = [place for place, _ in sources]
        require_local(places)
        found = [
            find_shard(self.folder, facts)
            for facts in source_facts(list(zip(places, load_shards(places), strict=True)), self.folder)
        ]
        missing = [place for place, (_, there) in zip(places, found, strict=True) if not there]
        if missing:
            raise ShardError(
                f"Expected {folder} to hold features of all {len(places)} shards, but those of {len(missing)} are "
                f"missing or of other videos, first {missing[0]}. Run `ssync-pl data cache-features` with the same "
                "options: it goes on where it stopped."
            )
        paths = [path for path, _ in found]
        read = [read_recipe(path)[0] for path in paths]
        first = read[0]
        for path, recipe in zip(paths, read, strict=True):
            if recipe != first:
                raise ShardError(
                    f"Expected all shards of {folder} to be made alike, but {path.name} and {paths[0].name} differ "
                    f"({'; '.join(recipe.differences(first))}). Run `ssync-pl data cache-features` again with another "
                    "--out."
                )
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        settings = (
            ("image_size", first.image_size, None if size is None else tuple(size)),
            ("resize_mode", first.resize_mode, resize_mode),
            ("crop", first.crop, crop),
            ("flips (flip_probability > 0)", first.flips, first.flips or flips),
        )
        wrong = [f"{name} {stored!r} stored, {wanted!r} set" for name, stored, wanted in settings if stored != wanted]
        if wrong:
            raise ConfigError(
                f"Expected the settings that the features in {folder} were made with, but got others "
                f"({'; '.join(wrong)}). Set these values, or run `ssync-pl data cache-features` with yours and another "
                "--out."
            )
        self.recipe: dict[str, Any] = first.to_json()
        self.grid = first.grid
        self.dim = first.dim
        self._dtype = first.dtype
        entries = load_shards(paths, save=False)
        self._shards = {
            place: (str(path), entry, {sample.key: sample for sample in entry.samples})
            for place, path, entry in zip(places, paths, entries, strict=True)
        }
        self._reader = ShardReader()

    def read(self, shard: str, key: str, frames: slice, flip: bool) -> dict[str, Tensor]:
        """Read the features of some frames of a video.

        Args:
            shard: Path of the video's shard, as in `sources`.
            key: The video's key.
            frames: Which frames, with positive step; `slice(None)` for all.
            flip: Whether the frames are mirrored.

        Returns:
            `features` (T, N, D) bfloat16 or int8; for int8 also `features_scale` (T, D) float32.

        Raises:
            ConfigError: Mirrored features were not stored.
            ShardError: The video has no features, fewer frames, or damaged ones.
        """
        if flip and not self.recipe["flips"]:
            raise ConfigError(f"Expected {self.folder} to hold features of mirrored frames, but it has none.")
        path, entry, samples = self._shards[shard]
        sample, where = samples.get(key), f"{path}, key {key}"
        if sample is None:
            raise ShardError(
                f"Expected {self.folder} to hold features of {shard}, key {key}, but it has none: the video could not "
                "be read when the features were made."
            )
        names = member_names(self._dtype, flip)
        shapes: list[tuple[int, ...]] = [(self.grid[0] * self.grid[1], self.dim), (self.dim,)]
        out = {}
        for name, field, shape in zip(names, ("features", "features_scale"), shapes, strict=False):
            dtype = stored_dtype(self._dtype) if field == "features" else np.dtype("<f4")
            if name not in sample.members:
                raise _damaged(where, f"it has no `{name}`")
            members = self._reader.sample(path, entry, sample, max_bytes=entry.size)
            header = members.header(name)
            if not header.shape or header.shape[1:] != shape or header.dtype != dtype:
                raise _damaged(where, f"`{name}` is {header.shape} {header.dtype}, not (T, {shape}) {dtype}")
            count = header.shape[0]
            if (frames.stop is not None and frames.stop > count) or (frames.start or 0) >= count:
                raise ShardError(
                    f"Expected frames {frames.start or 0} to {frames.stop or count} of {shard}, key {key}, but "
                    f"there are features of {count} only."
                )
            out[field] = array_to_tensor(members.rows(name, frames))
        return out

    def close(self) -> None:
        """Close the files of this process; reading opens them again."""
        self._reader.close()


def _damaged(where: str, what: str) -> ShardError:
    return ShardError(
        f"Expected whole features in {where}, but {what}. Delete the file and run `ssync-pl data cache-features` again."
    )
