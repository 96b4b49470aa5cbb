"""One projection a folder of features: made by the first call, taken by all later ones."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ssync_pl.data.features.claim import cannot_write, claim
from ssync_pl.data.features.compute import FeatureRun, frames_of
from ssync_pl.data.features.projection import (
    PROJECTION_FILE,
    Moments,
    Projection,
    fit_projection,
    pack_projection,
    read_projection,
)
from ssync_pl.data.features.recipe import FeatureRecipe, read_recipe, source_facts
from ssync_pl.data.index import SampleEntry, ShardEntry, load_shards
from ssync_pl.data.patterns import is_remote
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["ProjectionWish", "describe_projection", "evenly", "settle_projection"]

_logger = logging.getLogger(__name__)

_VIDEOS = 256
_FRAMES = 512
_PATIENCE = 0.2


@dataclass(frozen=True)
class ProjectionWish:
    """What a call of `cache_features` asks for.

    Args:
        components: Number of principal components; `None` for none.
        standardize: Standardise channels without a PCA.
        fit: Shards to fit to; `None` for those of the call.
        file: A projection made before.

    Raises:
        ConfigError: The arguments contradict each other, or `components` is below 1.

    Example:
        >>> ProjectionWish(components=48).wanted
        True
    """

    components: int | None = None
    standardize: bool = False
    fit: Sequence[str] | None = None
    file: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        kinds = [self.components is not None, self.standardize, self.file is not None]
        if sum(kinds) > 1:
            raise ConfigError(
                "Expected at most one of the arguments `components`, `standardize` and `projection`, but got "
                f"{self.components}, {self.standardize} and {self.file}."
            )
        if self.components is not None and self.components < 1:
            raise ConfigError(f"Expected argument `components` to be at least 1, but got {self.components}.")
        if self.fit is None:
            return
        if not (kinds[0] or kinds[1]) or not self.fit:
            raise ConfigError(
                "Expected argument `fit` to name shards, with `components` or `standardize`, but got "
                f"{list(self.fit)} without them."
            )
        remote = [path for path in self.fit if is_remote(path)]
        if remote:
            raise ConfigError(f"Expected local shards as argument `fit`, but got {remote[0]}. Download them first.")

    @property
    def wanted(self) -> bool:
        """Whether features are to be projected at all."""
        return self.components is not None or self.standardize or self.file is not None


def settle_projection(
    out: Path, run: FeatureRun, layer_dims: Sequence[int], wish: ProjectionWish, shards: Sequence[str]
) -> Projection | None:
    """Take the projection of a folder, or make it.

    The file is written under a temporary name and renamed. While one process fits, others that want the same folder
    wait, and take what it made; what a killed process left is taken over.

    Args:
        out: Folder of the features, which exists.
        run: How features are made; its recipe is that of the features as the backbone gives them.
        layer_dims: Channels of each layer of the backbone.
        wish: What was asked for.
        shards: Shards of the call.

    Returns:
        The projection on CPU, the same for every call with this folder; `None` where none is wanted.

    Raises:
        ConfigError: The folder has another projection or none, or none can be fitted.
        ShardError: A video cannot be read, or the projection cannot be written.

    Example:
        >>> settle_projection(Path("/nowhere"), None, [], ProjectionWish(), []) is None
        True
    """
    path = out / PROJECTION_FILE
    if not wish.wanted:
        if path.exists():
            raise ConfigError(
                f"Expected one of --components, --standardize and --projection, as {out} holds projected features "
                f"({describe_projection(read_projection(path))}). Say it again, or take another --out."
            )
        return None
    given = None if wish.file is None else read_projection(wish.file)
    if not path.exists():
        _require_room(out, given)
        _make(path, run, layer_dims, wish, shards, given)
    found = read_projection(path)
    _require_wish(path, found, run, wish, given)
    return found


def evenly(total: int, count: int) -> list[int]:
    """Choose numbers that are spread evenly.

    Args:
        total: They are from 0 to `total - 1`.
        count: How many at most.

    Returns:
        Ascending numbers.

    Example:
        >>> evenly(10, 3), evenly(2, 5)
        ([1, 5, 8], [0, 1])
    """
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def describe_projection(projection: Projection) -> str:
    """Say in a line what a projection is.

    Args:
        projection: The projection.

    Returns:
        Its size and what it was fitted to.

    Example:
        >>> info = {"components": 1, "explained": 0.9, "frames": 8, "sources": [{"name": "a.tar"}]}
        >>> describe_projection(Projection(torch.zeros(2), torch.ones(2, 1), info))
        '1 components of 2 channels, 90.0% of the variance, fitted to 8 frames of a.tar'
    """
    channels, kept = projection.matrix.shape
    if not projection.components:
        text = f"{kept} standardised channels"
    else:
        text = f"{kept} components of {channels} channels"
        if "explained" in projection.info:
            text += f", {projection.info['explained']:.1%} of the variance"
    if projection.info.get("sources"):
        text += f", fitted to {projection.info.get('frames')} frames of {_fitted_to(projection)}"
    return text


def _require_room(out: Path, given: Projection | None) -> None:
    for path in sorted(out.glob("*.tar"))[:1]:
        stored, _ = read_recipe(path)
        if not stored.projection:
            raise ConfigError(
                f"Expected {out} to be empty or to hold projected features, but {path.name} holds features as the "
                "backbone gave them. Take another --out, or delete the folder."
            )
        if given is None or given.fingerprint != stored.projection:
            raise ConfigError(
                f"Expected {out} to hold {PROJECTION_FILE} beside its features, but it is missing. Put it back "
                f"(sha256 of its map {stored.projection[:12]}…) with --projection, or delete the folder."
            )


def _make(
    path: Path,
    run: FeatureRun,
    layer_dims: Sequence[int],
    wish: ProjectionWish,
    shards: Sequence[str],
    given: Projection | None,
) -> None:
    waited = False
    while not path.exists():
        with contextlib.ExitStack() as stack:
            try:
                mine = stack.enter_context(claim(path))
            except OSError as error:
                raise cannot_write(path.parent, error) from error
            if mine is not None and not path.exists():  # asked again: it may have been finished before the claim
                made = _fit(path.parent, run, layer_dims, wish, shards) if given is None else given
                try:
                    mine.stream.write(pack_projection(made))
                    mine.finish()
                except OSError as error:
                    raise cannot_write(path.parent, error) from error
                return
        if not waited and not path.exists():
            _logger.info("Waiting for another process, which fits the projection of %s.", path.parent)
            waited = True
        time.sleep(_PATIENCE)


def _fit(
    out: Path, run: FeatureRun, layer_dims: Sequence[int], wish: ProjectionWish, shards: Sequence[str]
) -> Projection:
    paths = list(shards if wish.fit is None else wish.fit)
    entries = load_shards(paths)
    moments = Moments(run.recipe.dim)
    frames = 0
    for batch in _in_batches(_sample(paths, entries, run), run.batch_size):
        features = run.backbone(batch.to(run.device)).features
        if not bool(features.isfinite().all()):
            raise ShardError(
                f"Expected backbone {run.backbone.name} to give finite features, but some of {paths[0]}, … hold NaN "
                "or infinity. Check its weights and the videos."
            )
        moments.update(features)
        frames += len(features)
    projection = fit_projection(moments, layer_dims, wish.components)
    sources = [asdict(facts) for facts in source_facts(list(zip(paths, entries, strict=True)), out)]
    info = {**projection.info, "frames": frames, "sources": sources, "features": run.recipe.to_json()}
    return replace(projection, info=info)


def _sample(paths: Sequence[str], entries: Sequence[ShardEntry], run: FeatureRun) -> Iterator[Tensor]:
    """Frames from all over the shards, the same for every call: transformed, (n, 3, H, W) a video."""
    places = [(number, sample) for number, entry in enumerate(entries) for sample in entry.samples]
    chosen = evenly(len(places), _VIDEOS)
    each = max(1, _FRAMES // max(1, len(chosen)))
    by_shard: dict[int, list[SampleEntry]] = {}
    for place in chosen:
        by_shard.setdefault(places[place][0], []).append(places[place][1])
    with contextlib.closing(ShardReader()) as reader:
        for number, samples in by_shard.items():
            entry = replace(entries[number], samples=tuple(samples))
            yield from frames_of(paths[number], entry, run, reader, lambda count: evenly(count, each))


def _in_batches(parts: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    held: list[Tensor] = []
    for part in parts:
        for frame in part:
            held.append(frame)
            if len(held) == size:
                yield torch.stack(held)
                held = []
    if held:
        yield torch.stack(held)


def _require_wish(
    path: Path, found: Projection, run: FeatureRun, wish: ProjectionWish, given: Projection | None
) -> None:
    wrong = []
    if given is not None and given.fingerprint != found.fingerprint:
        wrong.append(f"map {given.fingerprint[:12]}… wanted, {found.fingerprint[:12]}… there")
    if given is None and (wish.components or 0) != found.components:
        wrong.append(f"{wish.components or 'no'} components wanted, {found.components or 'none'} there")
    if wish.fit is not None:
        now = source_facts(list(zip(wish.fit, load_shards(wish.fit), strict=True)), path.parent)
        if [asdict(facts) for facts in now] != found.info.get("sources"):
            wrong.append(f"a fit to {_names([facts.name for facts in now])} wanted, one to {_fitted_to(found)} there")
    if "features" in found.info:
        theirs = FeatureRecipe.from_json(found.info["features"])
        # How features are stored has no part in the projection.
        ours = replace(run.recipe, dtype=theirs.dtype, flips=theirs.flips)
        wrong += ours.differences(theirs)
    elif len(found.mean) != run.recipe.dim:
        wrong.append(f"{run.recipe.dim} channels wanted, {len(found.mean)} there")
    if wrong:
        raise ConfigError(
            f"Expected the projection that {path} holds, but another was asked for ({'; '.join(wrong)}). Features of "
            "different projections cannot be mixed: use the same options, or take another --out."
        )


def _fitted_to(projection: Projection) -> str:
    return _names([source["name"] for source in projection.info.get("sources", [])])


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 3 else f"{names[0]} … {names[-1]} ({len(names)} shards)"
