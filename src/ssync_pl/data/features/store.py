"""Stored features: what they were made from, whether they still fit, and reading them clip by clip.

Every shard of features begins with the member `__features__/recipe.json`: the recipe, and the digest of the videos it
was made from. So each shard can be judged alone, whatever became of the others and of the index.
"""

import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssync_pl.data.decode import parse_json
from ssync_pl.data.files import write_bytes
from ssync_pl.data.index import ShardEntry, load_shards
from ssync_pl.data.samples import find_member
from ssync_pl.data.shards import read_shard, sample_members
from ssync_pl.errors import ShardError, explained, require, require_shard

RECIPE_MEMBER = "__features__/recipe.json"  # of a shard of features; names of this form belong to no sample
MEMBERS = ("features.npy", "features_flipped.npy")  # of a sample: the features of its frames, and of mirrored ones
_HEAD = {"format": "ssync_pl.features", "version": 1}
_MEMO = ".verified.json"


@dataclass(frozen=True)
class FeatureRecipe:
    """All that the features of a frame depend on besides the frame."""

    backbone: str
    layer: str
    weights: str  # fingerprint
    dim: int
    grid: tuple[int, int]  # rows and columns of patches
    image_size: tuple[int, int]
    resize_mode: str
    crop: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = "bf16"
    flips: bool = False  # whether there are features of the mirrored frames too
    components: int = 0  # principal components that the channels were projected to; 0 without a PCA
    projection: str = ""  # fingerprint

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: object) -> "FeatureRecipe":
        """Undo `dataclasses.asdict` and JSON; `ShardError` for what is no recipe of ours."""
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        known = set(plain) == {item.name for item in fields(cls)} and plain["dtype"] == "bf16"
        require_shard(known, f"{where} to hold a recipe of features in bf16", plain, advice="Make the features again.")
        return cls(**plain)


def pack_recipe(recipe: FeatureRecipe, source: Mapping[str, str]) -> bytes:
    """Write the content of the recipe member."""
    return json.dumps({**_HEAD, "recipe": asdict(recipe), "source": dict(source)}, sort_keys=True).encode()


def read_recipe(path: str | os.PathLike[str]) -> tuple[FeatureRecipe, dict[str, str]]:
    """Read how a shard of features was made, and of what; `ShardError` when it is none."""
    expected = f"{path} to be a shard of features (format and version {[*_HEAD.values()]})"
    kinds = (OSError, tarfile.TarError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
    with explained(expected, *kinds, advice="Take another folder; features of another version are made again."):
        with open(path, "rb") as stream:
            info = tarfile.TarInfo.frombuf(stream.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            if info.name != RECIPE_MEMBER or info.size > 1 << 20:
                raise ValueError(f"it begins with {info.name!r}")
            content = json.loads(stream.read(info.size))
        if {**content, **_HEAD} != content:
            raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
        return FeatureRecipe.from_json(content["recipe"], path), content["source"]


def source_facts(path: str, entry: ShardEntry, folder: Path) -> dict[str, str]:
    """What a shard of features was made from: its name and the digest of its keys and videos, not masks.

    A note beside the features spares files that have not changed since (by size and time) another reading.
    """
    place, status = os.path.abspath(path), os.stat(path)
    stamp, memo = [status.st_size, status.st_mtime_ns], {}
    free = not os.path.lexists(folder / _MEMO)
    with contextlib.suppress(OSError, ShardError):
        memo = parse_json((folder / _MEMO).read_bytes(), _MEMO, dict)
        free = all(isinstance(note, list) and len(note) == 3 for note in memo.values())  # else another program's
    note = memo.get(place)
    if not isinstance(note, list) or note[:2] != stamp:
        memo[place] = note = [*stamp, _digest(path, entry)]
        with contextlib.suppress(OSError):  # without the note the next start only takes longer
            if free:
                write_bytes(folder / _MEMO, json.dumps(memo).encode())
    return {"name": entry.name, "sha256": str(note[2])}


def _digest(path: str, entry: ShardEntry) -> str:
    digest = hashlib.sha256()
    for key, members in read_shard(path, entry, entry.size):
        try:
            member = find_member(members.sizes, "video")
        except ShardError:
            digest.update(f"{key}\0\0".encode())  # the sample is refused by name where it is used
            continue
        digest.update(f"{key}\0{member}\0{members.sizes[member]}\0".encode())
        digest.update(members.read(member))
    return digest.hexdigest()


def find_shard(folder: Path, source: Mapping[str, str]) -> tuple[Path, bool]:
    """Where a shard's features lie or would lie, and whether they do; the digest is added where its name is taken."""
    plain = folder / source["name"]
    if not plain.exists() or read_recipe(plain)[1] == source:
        return plain, plain.exists()
    keyed = folder / f"{source['name'].removesuffix('.tar')}-{source['sha256'][:12]}.tar"
    return keyed, keyed.exists() and read_recipe(keyed)[1] == source


def require_same(path: Path, there: FeatureRecipe, wanted: FeatureRecipe) -> None:
    """Refuse a file of features that was not made as it is wanted, and say in what."""
    pairs = [(item.name, getattr(there, item.name), getattr(wanted, item.name)) for item in fields(wanted)]
    wrong = "; ".join(f"{name}: {stored} there, {ours} wanted" for name, stored, ours in pairs if stored != ours)
    advice = "Set what is there, or make features with what is wanted and another --out."
    require(not wrong, f"{path} to be made as it is wanted", f"another recipe ({wrong})", advice=advice)


class FeatureStore:
    """Stored features of some shards, given by path and index entry, which may leave samples out.

    Refuses to open where shards are missing or damaged, or were made of videos of other content or with other settings.
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
        self.folder, places = Path(folder), [place for place, _ in sources]
        advice = "Run `ssync-pl data cache-features … --out FOLDER` first; it goes on where it stopped."
        ok, expected = self.folder.is_dir() and bool(places), "argument `features` to be a folder of stored features"
        require(ok, expected, f"{str(folder)!r} for {len(places)} shards", advice=advice)
        facts = [source_facts(*source, self.folder) for source in zip(places, load_shards(places), strict=True)]
        found = {place: find_shard(self.folder, fact) for place, fact in zip(places, facts, strict=True)}
        missing = [place for place, (_, there) in found.items() if not there]
        expected = f"{folder} to hold features of all {len(places)} shards"
        got = f"{len(missing)} missing or of other videos, first {', '.join(missing[:1])}"
        require_shard(not missing, expected, got, advice=advice)
        paths = [path for path, _ in found.values()]
        stored = self.recipe = read_recipe(paths[0])[0]
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        wanted: dict[str, Any] = {"image_size": size and tuple(size), "resize_mode": resize_mode, "crop": crop}
        for path in paths:
            require_same(path, read_recipe(path)[0], replace(stored, **wanted, flips=stored.flips or flips))
        self._shards = {
            place: (str(path), entry, {sample.key: sample for sample in entry.samples})
            for place, path, entry in zip(found, paths, load_shards(paths, save=False), strict=True)
        }

    def read(self, shard: str, key: str, frames: slice, flip: bool) -> dict[str, Tensor]:
        """Read `features` (T, N, D) bfloat16 of frames of a video, with `flip` of mirrored ones; refuses too few."""
        path, entry, samples = self._shards[shard]
        name, shape = MEMBERS[flip], (self.recipe.grid[0] * self.recipe.grid[1], self.recipe.dim)
        there, expected = key in samples and name in samples[key].members, f"{path} to hold `{name}` of key {key}"
        advice = "The video could not be read, or mirrored frames were not asked for: make the features again."
        require_shard(there, expected, "none", advice=advice)
        members = sample_members(path, entry, samples[key], max_bytes=entry.size)
        header = members.header(name)
        count = header.shape[0] if header.shape[1:] == shape and header.dtype == np.dtype("<u2") else 0
        first, last = frames.start or 0, frames.stop or "the last"
        expected = f"{expected} as bits of bfloat16 (T, {shape[0]}, {shape[1]}) for frames {first} to {last}"
        advice = "Delete the file and run `ssync-pl data cache-features` again."
        fits = first < count and (frames.stop or 0) <= count
        require_shard(fits, expected, header.shape, header.dtype, advice=advice)
        return {"features": torch.from_numpy(members.rows(name, frames).view(np.int16)).view(torch.bfloat16)}
