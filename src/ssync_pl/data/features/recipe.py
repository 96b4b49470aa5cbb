"""What stored features were made from, and whether they still fit.

Every shard of features begins with the member `__features__/recipe.json`: the recipe, and the digest of the videos it
was made from. So each shard can be judged alone, whatever became of the others and of the index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssync_pl.data.features.codec import stored_dtype
from ssync_pl.data.files import write_bytes
from ssync_pl.data.index import ShardEntry
from ssync_pl.data.patterns import is_remote
from ssync_pl.data.samples import find_member
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ConfigError, ShardError

if TYPE_CHECKING:
    from ssync_pl.data.features.backbones import FrozenBackbone

__all__ = ["FeatureRecipe", "SourceFacts", "find_shard", "read_recipe", "require_crop", "source_facts"]

RECIPE_MEMBER = "__features__/recipe.json"
"""Name of the first member of a shard of features; names of this form belong to no sample."""

_FORMAT, _VERSION = "ssync_pl.features", 1
_MEMO = ".verified.json"
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class FeatureRecipe:
    """All that the features of a frame depend on besides the frame.

    Attributes:
        backbone: Name of the backbone.
        layer: Its layer or layers.
        weights: Fingerprint of its weights.
        dim: D, size of a feature.
        grid: Rows and columns of patches.
        image_size: Height and width of the frames that it saw.
        resize_mode: How frames were resized.
        crop: `none` or `center`.
        mean: Per-channel mean that frames were normalised with.
        std: The same for the standard deviation.
        dtype: How features are stored.
        flips: Whether there are features of the mirrored frames too.
        components: Principal components that the backbone's channels were projected to; 0 without a PCA.
        projection: Fingerprint of the projection; empty where features are as the backbone gave them.
    """

    backbone: str
    layer: str
    weights: str
    dim: int
    grid: tuple[int, int]
    image_size: tuple[int, int]
    resize_mode: str
    crop: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str
    flips: bool = False
    components: int = 0
    projection: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FeatureRecipe:
        """Undo `to_json`; `ConfigError` when a field is missing, unknown or out of range."""
        try:
            plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
            recipe = cls(**plain)
            stored_dtype(recipe.dtype)
            numbers = (recipe.dim, *recipe.grid, *recipe.image_size)
            if len(numbers) != 5 or not all(isinstance(number, int) and number > 0 for number in numbers):
                raise ValueError(f"sizes {numbers}")
            if recipe.components not in (0, recipe.dim) or not isinstance(recipe.projection, str):
                raise ValueError(f"{recipe.components} components of projection {recipe.projection!r}")
        except (TypeError, ValueError) as error:
            raise ConfigError(f"Expected a recipe of features, but got an unusable one ({error}).") from error
        return recipe

    def differences(self, other: FeatureRecipe) -> list[str]:
        """Say in which fields two recipes differ: name, the value here, the value there."""
        pairs = ((item.name, getattr(self, item.name), getattr(other, item.name)) for item in fields(self))
        return [
            f"{name}: {_short(ours)} here, {_short(theirs)} there" for name, ours, theirs in pairs if ours != theirs
        ]


@dataclass(frozen=True)
class SourceFacts:
    """Which videos a shard of features was made from: name of their shard, digest of keys and videos (not of masks)."""

    name: str
    sha256: str


def require_crop(crop: str) -> None:
    """Refuse crops whose features cannot be stored."""
    if crop == "random":
        raise ConfigError(
            "Expected argument `crop` to be none or center with stored features, but got 'random': a random crop moves "
            "the picture against the patches. Train with crop='center', or without `features`."
        )
    if crop not in ("none", "center"):
        raise ConfigError(f"Expected argument `crop` to be none or center, but got {crop!r}.")


def require_local(paths: Sequence[str]) -> None:
    """Refuse remote shards and the same shard twice."""
    remote = [path for path in paths if is_remote(path)]
    if remote:
        raise ConfigError(f"Expected local shards with stored features, but got {remote[0]}. Download them first.")
    places = [os.path.abspath(path) for path in paths]
    if len(set(places)) < len(places):
        twice = next(path for path in places if places.count(path) > 1)
        raise ConfigError(f"Expected each shard once, but got {twice} twice. Name it once.")


def verify_backbone(recipe: Mapping[str, Any], backbone: FrozenBackbone) -> None:
    """Refuse features that another backbone made.

    Args:
        recipe: `FeatureStore.recipe`.
        backbone: The backbone that a host would run on frames without stored features.

    Raises:
        ConfigError: Name, layer, weights, normalisation, size or grid differ; the message says which. Or the features
            were projected, which no backbone does.
    """
    stored = FeatureRecipe.from_json(recipe)
    if stored.projection:
        raise ConfigError(
            f"Expected stored features as backbone {backbone.name} gives them ({backbone.dim} channels), but they were "
            f"{f'projected to {stored.components} components' if stored.components else 'standardised'}. Set "
            f"`backbone: null` and `feature_dim: {stored.dim}`, and store features of the evaluation's videos in the "
            "same folder."
        )
    facts: dict[str, tuple[Any, Any]] = {
        # The tag after the dot names published weights, and those are compared by their bytes.
        "backbone": (stored.backbone.split(".")[0], backbone.name.split(".")[0]),
        "layer": (stored.layer, backbone.layer),
        "weights": (stored.weights, backbone.fingerprint),
        "dim": (stored.dim, backbone.dim),
        "mean": (stored.mean, backbone.mean),
        "std": (stored.std, backbone.std),
    }
    wrong = [f"{name}: {_short(a)} stored, {_short(b)} wanted" for name, (a, b) in facts.items() if a != b]
    if not wrong and (grid := backbone.grid_for(*stored.image_size)) != stored.grid:
        wrong = [f"grid: {stored.grid} stored, {grid} wanted"]
    if wrong:
        raise ConfigError(
            f"Expected stored features of backbone {backbone.name}, but they were made otherwise ({'; '.join(wrong)}). "
            "Run `ssync-pl data cache-features` with this backbone, or set the backbone that made them."
        )


def pack_recipe(recipe: FeatureRecipe, source: SourceFacts) -> bytes:
    """Write the content of the recipe member."""
    content = {"format": _FORMAT, "version": _VERSION, "recipe": recipe.to_json(), "source": asdict(source)}
    return json.dumps(content, sort_keys=True).encode()


def read_recipe(path: str | os.PathLike[str]) -> tuple[FeatureRecipe, SourceFacts]:
    """Read how a shard of features was made, from its first member; `ShardError` when it is none."""
    try:
        with open(path, "rb") as stream:
            info = tarfile.TarInfo.frombuf(stream.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            if info.name != RECIPE_MEMBER or info.size > _MOST_BYTES:
                raise ValueError(f"it begins with {info.name!r}")
            content = json.loads(stream.read(info.size))
        if (content["format"], content["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
        return FeatureRecipe.from_json(content["recipe"]), SourceFacts(**content["source"])
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise ShardError(
            f"Expected {path} to be a shard of features (format {_FORMAT!r}, version {_VERSION}), but it is none "
            f"({error}). Take another folder; features of another version are made again."
        ) from error


def find_shard(folder: Path, facts: SourceFacts) -> tuple[Path, bool]:
    """Where the features of a shard lie or would lie in a folder, and whether they are there.

    They have the name of their shard. Where another set has a shard of that name there, the digest is added.
    """
    plain = folder / facts.name
    if not plain.exists():
        return plain, False
    if read_recipe(plain)[1] == facts:
        return plain, True
    keyed = folder / f"{facts.name.removesuffix('.tar')}-{facts.sha256[:12]}.tar"
    return keyed, keyed.exists() and read_recipe(keyed)[1] == facts


def source_facts(sources: Sequence[tuple[str, ShardEntry]], folder: Path) -> list[SourceFacts]:
    """Digest the videos of some shards, given by path and index entry with all samples.

    Digests of files that have not changed since (by size and time of change) are taken from a note in the folder of
    the features, which may be read-only; other files are read whole.
    """
    memo = _read_memo(folder)
    places = [os.path.abspath(path) for path, _ in sources]
    stamps = {place: [(status := os.stat(place)).st_size, status.st_mtime_ns] for place in places}
    unknown = [n for n, place in enumerate(places) if memo.get(place, [])[:2] != stamps[place]]
    if unknown:
        with ThreadPoolExecutor(min(4, len(unknown))) as pool:  # hashing large buffers runs without the lock
            found = list(pool.map(lambda number: _digest(*sources[number]), unknown))
        fresh = {places[n]: [*stamps[places[n]], digest] for n, digest in zip(unknown, found, strict=True)}
        memo.update(fresh)
        with contextlib.suppress(OSError):  # without the note the next start only takes longer
            write_bytes(folder / _MEMO, json.dumps({**_read_memo(folder), **fresh}).encode())
    return [SourceFacts(entry.name, str(memo[place][2])) for (_, entry), place in zip(sources, places, strict=True)]


def _digest(path: str, entry: ShardEntry) -> str:
    digest = hashlib.sha256()
    with contextlib.closing(ShardReader()) as reader:
        for sample in entry.samples:
            try:
                member = find_member(sample.members, "video")
            except ShardError:
                digest.update(f"{sample.key}\0\0".encode())  # the sample is refused by name where it is used
                continue
            view = reader.member(path, entry, sample, member)
            digest.update(f"{sample.key}\0{member}\0{len(view)}\0".encode())
            digest.update(view)
            view.release()
    return digest.hexdigest()


def _read_memo(folder: Path) -> dict[str, list[Any]]:
    try:
        memo = json.loads((folder / _MEMO).read_bytes())
        return {place: note for place, note in memo.items() if len(note) == 3 and isinstance(note[2], str)}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)
