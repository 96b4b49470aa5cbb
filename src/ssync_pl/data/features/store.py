"""Reading stored features, clip by clip."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ssync_pl.data.features.codec import array_to_tensor, decode_features, stored_dtype
from ssync_pl.data.features.recipe import FeatureRecipe, read_recipe, require_crop, source_facts
from ssync_pl.data.index import ShardEntry, load_shards
from ssync_pl.data.patterns import is_remote
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["FeatureStore", "decode_features", "member_names"]

_REDO = "Run `ssync-pl data cache-features` again with another --out"


class FeatureStore:
    """Stored features of some shards; refuses to open where they do not fit the shards or the settings.

    The videos are compared by content with those that the features were made from. That reads each shard once; later
    starts trust files of the same size and time of change. A store pickles without its open files: each worker
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

    Example:
        >>> FeatureStore("/nowhere", [], image_size=64, resize_mode="bicubic", crop="random", flips=False)
        Traceback (most recent call last):
        ssync_pl.errors.ConfigError: Expected argument `crop` to be none or center with stored features, ...
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
        if not self.folder.is_dir():
            raise ConfigError(
                f"Expected argument `features` to be a folder of stored features, but {str(folder)!r} is none. Run "
                "`ssync-pl data cache-features … --out FOLDER` first."
            )
        if not sources:
            raise ConfigError("Expected argument `sources` to name at least one shard, but got none.")
        names = [entry.name for _, entry in sources]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(
                f"Expected shards with names of their own, but got {twice} twice. Keep the features of each data set "
                "in a folder of its own."
            )
        remote = [place for place, _ in sources if is_remote(place)]
        if remote:
            raise ConfigError(
                f"Expected local shards with stored features, but got {remote[0]}. Download them, or train without "
                "`features`."
            )
        paths = [self.folder / name for name in names]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ShardError(
                f"Expected {folder} to hold features of all {len(names)} shards, but {len(missing)} are missing "
                f"({missing[0]}, …). Run `ssync-pl data cache-features` with the same options: it goes on where it "
                "stopped."
            )
        read = [read_recipe(path) for path in paths]
        first = read[0][0]
        for path, (recipe, _) in zip(paths, read, strict=True):
            if recipe != first:
                raise ShardError(
                    f"Expected all shards of {folder} to be made alike, but {path.name} and {paths[0].name} differ "
                    f"({'; '.join(recipe.differences(first))}). {_REDO}."
                )
        _require_settings(first, str(folder), image_size, resize_mode, crop, flips)
        whole = load_shards([place for place, _ in sources])
        now = source_facts([(place, entry) for (place, _), entry in zip(sources, whole, strict=True)], self.folder)
        for (place, _), facts, (_, stored) in zip(sources, now, read, strict=True):
            if facts != stored:
                raise ShardError(
                    f"Expected the videos of {place} to be those that the features in {folder} were made from, but "
                    f"they have changed (sha256 {facts.sha256[:12]}… now, {stored.sha256[:12]}… then). Delete "
                    f"{stored.name} there and run `ssync-pl data cache-features` with the same options again."
                )
        self.recipe: dict[str, Any] = first.to_json()
        self.grid = first.grid
        self.dim = first.dim
        self._dtype = first.dtype
        self._paths = {path.name: str(path) for path in paths}
        self._shards = {entry.name: entry for entry in load_shards(paths, save=False)}
        self._samples = {name: {sample.key: sample for sample in entry.samples} for name, entry in self._shards.items()}
        self._reader = ShardReader()
        wanted = member_names(first.dtype, False) + (member_names(first.dtype, True) if first.flips else ())
        for name, samples in self._samples.items():
            for sample in samples.values():
                lost = [member for member in wanted if member not in sample.members]
                if lost:
                    raise self._damaged(name, sample.key, f"it has no `{lost[0]}`")

    def read(self, shard_name: str, key: str, frames: slice, flip: bool) -> dict[str, Tensor]:
        """Read the features of some frames of a video.

        Args:
            shard_name: File name of the shard of the video.
            key: The video's key.
            frames: Which frames, with positive step; `slice(None)` for all.
            flip: Whether the frames are mirrored.

        Returns:
            `features` (T, N, D) bfloat16 or int8; for int8 also `features_scale` (T, D) float32. Copies: nothing
            refers to the memory map.

        Raises:
            ConfigError: Mirrored features were not stored.
            ShardError: The video has no features, fewer frames, or damaged ones.
        """
        if flip and not self.recipe["flips"]:
            raise ConfigError(f"Expected {self.folder} to hold features of mirrored frames, but it has none.")
        sample = self._samples.get(shard_name, {}).get(key)
        if sample is None:
            raise ShardError(
                f"Expected {self.folder} to hold features of {shard_name}, key {key}, but it has none: the video could "
                "not be read when the features were made."
            )
        shard = self._shards[shard_name]
        members = self._reader.sample(self._paths[shard_name], shard, sample, max_bytes=shard.size)
        name, *scales = member_names(self._dtype, flip)
        header = members.header(name)
        count = header.shape[0] if header.shape else 0
        expected = (count, self.grid[0] * self.grid[1], self.dim)
        if header.shape != expected or header.dtype != stored_dtype(self._dtype):
            raise self._damaged(shard_name, key, f"features are {header.shape} {header.dtype}, not {expected}")
        if (frames.stop is not None and frames.stop > count) or (frames.start or 0) >= count:
            raise ShardError(
                f"Expected frames {frames.start or 0} to {frames.stop or count} of {shard_name}, key {key}, but there "
                f"are features of {count} only."
            )
        out = {"features": array_to_tensor(members.rows(name, frames))}
        for scale in scales:
            found = members.header(scale)
            if found.shape != (count, self.dim) or found.dtype != np.float32:
                raise self._damaged(shard_name, key, f"scales are {found.shape} {found.dtype}")
            out["features_scale"] = array_to_tensor(members.rows(scale, frames))
        return out

    def close(self) -> None:
        """Close the files of this process; reading opens them again."""
        self._reader.close()

    def _damaged(self, shard_name: str, key: str, what: str) -> ShardError:
        return ShardError(
            f"Expected whole features in {self._paths[shard_name]}, key {key}, but {what}. Delete the file and run "
            "`ssync-pl data cache-features` again."
        )


def member_names(dtype: str, flip: bool) -> tuple[str, ...]:
    """Names of a sample's members.

    Args:
        dtype: How features are stored.
        flip: Whether the frames are mirrored.

    Returns:
        The member of the features and, for int8, that of the scales.

    Example:
        >>> member_names("int8", flip=True)
        ('features_flipped.npy', 'features_flipped_scale.npy')
    """
    stem = "features_flipped" if flip else "features"
    return (f"{stem}.npy", f"{stem}_scale.npy") if dtype == "int8" else (f"{stem}.npy",)


def _require_settings(
    recipe: FeatureRecipe,
    folder: str,
    image_size: int | tuple[int, int] | None,
    resize_mode: str,
    crop: str,
    flips: bool,
) -> None:
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    settings = (
        ("image_size", recipe.image_size, None if size is None else tuple(size)),
        ("resize_mode", recipe.resize_mode, resize_mode),
        ("crop", recipe.crop, crop),
    )
    wrong = [f"{name} {stored!r} stored, {wanted!r} set" for name, stored, wanted in settings if stored != wanted]
    if wrong:
        raise ConfigError(
            f"Expected the settings that the features in {folder} were made with, but got others "
            f"({'; '.join(wrong)}). Set these values, or run `ssync-pl data cache-features` with yours and another "
            "--out."
        )
    if flips and not recipe.flips:
        raise ConfigError(
            f"Expected {folder} to hold features of mirrored frames for flip_probability > 0, but it has none. "
            f"{_REDO} and --flips, or set flip_probability=0."
        )
