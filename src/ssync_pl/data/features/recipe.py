"""What stored features were made from, and whether they still fit.

Every shard of features begins with the member `__features__/recipe.json`: the recipe, and the digest of the videos it
was made from. So each shard can be judged alone, whatever became of the others and of `index.json`.
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
from ssync_pl.data.samples import find_member
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ConfigError, ShardError

if TYPE_CHECKING:
    from ssync_pl.hosts.nn.backbones import FrozenBackbone

__all__ = [
    "RECIPE_MEMBER",
    "FeatureRecipe",
    "SourceFacts",
    "pack_recipe",
    "read_recipe",
    "require_crop",
    "source_facts",
    "verify_backbone",
]

RECIPE_MEMBER = "__features__/recipe.json"
"""Name of the first member of a shard of features; names of this form belong to no sample."""

_FORMAT = "ssync_pl.features"
_VERSION = 1
_MEMO = ".verified.json"
_BLOCK = tarfile.BLOCKSIZE
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class FeatureRecipe:
    """All that the features of a frame depend on besides the frame.

    Args:
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

    Example:
        >>> recipe = FeatureRecipe("a", "b", "0", 8, (2, 2), (8, 8), "bicubic", "none", (0.5,) * 3, (0.5,) * 3, "bf16")
        >>> recipe == FeatureRecipe.from_json(recipe.to_json())
        True
    """

    backbone: str
    layer: str
    weights: str
    dim: int
    grid: tuple[int, int]
    image_size: tuple[int, int]
    resize_mode: str
    crop: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: str
    flips: bool = False
    components: int = 0
    projection: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values.

        Returns:
            Name of the field → value; tuples become lists.
        """
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FeatureRecipe:
        """Undo `to_json`.

        Args:
            values: Name of the field → value.

        Returns:
            The recipe.

        Raises:
            ConfigError: A field is missing, unknown or out of range.
        """
        try:
            plain: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
            }
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
        """Say in which fields two recipes differ.

        Args:
            other: The recipe to compare with.

        Returns:
            One text a field: its name, the value here, the value there.
        """
        pairs = ((item.name, getattr(self, item.name), getattr(other, item.name)) for item in fields(self))
        return [
            f"{name}: {_short(ours)} here, {_short(theirs)} there" for name, ours, theirs in pairs if ours != theirs
        ]


@dataclass(frozen=True)
class SourceFacts:
    """Which videos a shard of features was made from.

    Args:
        name: File name of their shard.
        sha256: Digest of keys and videos; masks and other members do not count.

    Example:
        >>> SourceFacts("train-000000.tar", "00").name
        'train-000000.tar'
    """

    name: str
    sha256: str


def require_crop(crop: str) -> None:
    """Refuse crops whose features cannot be stored.

    Args:
        crop: `none`, `center` or `random`.

    Raises:
        ConfigError: The crop is random, or unknown.

    Example:
        >>> require_crop("center")
    """
    if crop == "random":
        raise ConfigError(
            "Expected argument `crop` to be none or center with stored features, but got 'random'. A random crop moves "
            "the picture against the patches, so each crop has features of its own: train with crop='center', or "
            "without `features`."
        )
    if crop not in ("none", "center"):
        raise ConfigError(f"Expected argument `crop` to be none or center, but got {crop!r}.")


def verify_backbone(recipe: Mapping[str, Any], backbone: FrozenBackbone) -> None:
    """Refuse features that another backbone made.

    Args:
        recipe: `FeatureStore.recipe`.
        backbone: The backbone that a host would run on frames without stored features.

    Raises:
        ConfigError: Name, layer, weights, normalisation, size or grid differ; the message says which. Or the features
            were projected, which no backbone does: a host that is trained on them needs stored features in evaluation
            too.

    Example:
        >>> verify_backbone({}, None)
        Traceback (most recent call last):
        ssync_pl.errors.ConfigError: Expected a recipe of features, but got an unusable one ...
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
    """Write the content of the recipe member.

    Args:
        recipe: How the features are made.
        source: What they are made from.

    Returns:
        JSON.

    Example:
        >>> recipe = FeatureRecipe("a", "b", "0", 8, (2, 2), (8, 8), "bicubic", "none", (0.5,) * 3, (0.5,) * 3, "bf16")
        >>> json.loads(pack_recipe(recipe, SourceFacts("a.tar", "00")))["format"]
        'ssync_pl.features'
    """
    content = {"format": _FORMAT, "version": _VERSION, "recipe": recipe.to_json(), "source": asdict(source)}
    return json.dumps(content, sort_keys=True, indent=1).encode()


def read_recipe(path: str | os.PathLike[str]) -> tuple[FeatureRecipe, SourceFacts]:
    """Read the recipe of a shard of features from its first member.

    Args:
        path: The shard.

    Returns:
        How it was made, and from what.

    Raises:
        FileNotFoundError: There is no such file.
        ShardError: It is no shard of features, or one of another version.

    Example:
        >>> read_recipe("/nowhere/train-000000.tar")
        Traceback (most recent call last):
        FileNotFoundError: ...
    """
    with open(path, "rb") as stream:
        try:
            info = tarfile.TarInfo.frombuf(stream.read(_BLOCK), "utf-8", "surrogateescape")
            if info.name != RECIPE_MEMBER or info.size > _MOST_BYTES:
                raise ValueError(f"the first member is `{info.name}`")
            content = json.loads(stream.read(info.size))
            if content["format"] != _FORMAT or content["version"] != _VERSION:
                raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
            return FeatureRecipe.from_json(content["recipe"]), SourceFacts(**content["source"])
        except (tarfile.HeaderError, ValueError, KeyError, TypeError) as error:
            raise ShardError(
                f"Expected {path} to be a shard of features ({_FORMAT}, version {_VERSION}), but it is not ({error}). "
                "Give the folder that `ssync-pl data cache-features` wrote; shards of another version are made again."
            ) from error


def source_facts(sources: Sequence[tuple[str, ShardEntry]], folder: Path) -> list[SourceFacts]:
    """Digest the videos of some shards.

    Digests of files that have not changed since (by size and time of change) are taken from a note in the folder of
    the features; other files are read whole.

    Args:
        sources: Path and index entry of each shard, with all samples of the file.
        folder: Folder of the features, where the note lies; it may be read-only.

    Returns:
        The facts, in the same order.

    Raises:
        ShardError: A shard does not fit its entry.

    Example:
        >>> source_facts([], Path("/nowhere"))
        []
    """
    memo = _read_memo(folder)
    stamps = [_stamp(path) for path, _ in sources]
    places = [os.path.abspath(path) for path, _ in sources]
    known = [
        memo[place][2] if memo.get(place, [])[:2] == stamp else None
        for place, stamp in zip(places, stamps, strict=True)
    ]
    unknown = [number for number, digest in enumerate(known) if digest is None]
    if unknown:
        with ThreadPoolExecutor(min(4, len(unknown))) as pool:  # hashing large buffers runs without the lock
            found = list(pool.map(lambda number: _digest(*sources[number]), unknown))
        for number, digest in zip(unknown, found, strict=True):
            known[number] = digest
            memo[places[number]] = [*stamps[number], digest]
        with contextlib.suppress(OSError):  # without the note the next start only takes longer
            write_bytes(folder / _MEMO, json.dumps({**_read_memo(folder), **memo}).encode())
    return [SourceFacts(entry.name, str(digest)) for (_, entry), digest in zip(sources, known, strict=True)]


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


def _stamp(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def _read_memo(folder: Path) -> dict[str, list[Any]]:
    try:
        memo = json.loads((folder / _MEMO).read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(memo, dict):
        return {}
    return {
        place: note
        for place, note in memo.items()
        if isinstance(note, list) and len(note) == 3 and isinstance(note[2], str)
    }


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)
