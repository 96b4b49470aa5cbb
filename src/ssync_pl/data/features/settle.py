"""One projection per folder of features: made by the first call, taken by all later ones."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from ssync_pl.data.features.compute import FeatureRun, frames_of, in_batches
from ssync_pl.data.features.projection import (
    PROJECTION_FILE,
    Moments,
    Projection,
    describe_projection,
    fit_projection,
    name_shards,
    pack_projection,
    read_projection,
)
from ssync_pl.data.features.recipe import FeatureRecipe, read_recipe, require_local, source_facts
from ssync_pl.data.files import exclusive, write_bytes
from ssync_pl.data.index import SampleEntry, ShardEntry, load_shards
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["ProjectionWish", "settle_projection"]

_VIDEOS, _FRAMES = 256, 512


@dataclass(frozen=True)
class ProjectionWish:
    """What a call of `cache_features` asks for; see there."""

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
        if self.fit is not None and (not (kinds[0] or kinds[1]) or not self.fit):
            raise ConfigError(
                "Expected argument `fit` to name shards, with `components` or `standardize`, but got "
                f"{list(self.fit)} without them."
            )
        require_local(self.fit or ())

    @property
    def wanted(self) -> bool:
        """Whether features are to be projected at all."""
        return self.components is not None or self.standardize or self.file is not None


def settle_projection(out: Path, run: FeatureRun, wish: ProjectionWish, shards: Sequence[str]) -> Projection | None:
    """Take the projection of a folder, or make it; None where none is wanted.

    While one process fits, others that want the same folder wait, and take what it made.
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
        with exclusive(out / f".{PROJECTION_FILE}.lock", timeout=-1):
            if not path.exists():  # asked again: another process may have finished it meanwhile
                _require_room(out, given)
                write_bytes(path, pack_projection(given or _fit(out, run, wish, shards)))
    found = read_projection(path)
    _require_wish(path, found, run, wish, given)
    return found


def _require_room(out: Path, given: Projection | None) -> None:
    for path in sorted(out.glob("*.tar"))[:1]:
        stored, _ = read_recipe(path)
        if not stored.projection:
            raise ConfigError(
                f"Expected {out} to be empty or to hold projected features, but {path.name} holds features as the "
                "backbone gave them. Take another --out."
            )
        if given is None or given.fingerprint != stored.projection:
            raise ConfigError(
                f"Expected {out} to hold {PROJECTION_FILE} beside its features, but it is missing. Put it back "
                f"(sha256 of its map {stored.projection[:12]}…) with --projection, or take another --out."
            )


def _fit(out: Path, run: FeatureRun, wish: ProjectionWish, shards: Sequence[str]) -> Projection:
    paths = list(shards if wish.fit is None else wish.fit)
    entries = load_shards(paths)
    moments = Moments(run.recipe.dim)
    for batch in in_batches(_sample(paths, entries, run), run.batch_size):
        features = run.backbone(batch.to(run.device)).features
        if not bool(features.isfinite().all()):
            raise ShardError(
                f"Expected backbone {run.backbone.name} to give finite features, but some of {paths[0]}, … hold NaN "
                "or infinity. Check its weights and the videos."
            )
        moments.update(features)
    projection = fit_projection(moments, run.backbone.layer_dims, wish.components)
    sources = [asdict(facts) for facts in source_facts(list(zip(paths, entries, strict=True)), out)]
    frames = moments.count // (run.recipe.grid[0] * run.recipe.grid[1])
    return replace(
        projection, info={**projection.info, "frames": frames, "sources": sources, "features": run.recipe.to_json()}
    )


def _sample(paths: Sequence[str], entries: Sequence[ShardEntry], run: FeatureRun) -> Iterator[Tensor]:
    """Frames from all over the shards, the same for every call."""
    places = [(number, sample) for number, entry in enumerate(entries) for sample in entry.samples]
    chosen = _evenly(len(places), _VIDEOS)
    each = max(1, _FRAMES // max(1, len(chosen)))
    by_shard: dict[int, list[SampleEntry]] = {}
    for place in chosen:
        by_shard.setdefault(places[place][0], []).append(places[place][1])
    with contextlib.closing(ShardReader()) as reader:
        for number, samples in by_shard.items():
            entry = replace(entries[number], samples=tuple(samples))
            yield from frames_of(paths[number], entry, run, reader, lambda count: _evenly(count, each))


def _evenly(total: int, count: int) -> list[int]:
    """Ascending numbers below `total`, at most `count`, spread evenly."""
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


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
        theirs = found.info.get("sources", [])
        if [asdict(facts) for facts in now] != theirs:
            wanted, there = name_shards([asdict(facts) for facts in now]), name_shards(theirs)
            wrong.append(f"a fit to {wanted} wanted, one to {there} there")
    if "features" in found.info:
        stored = FeatureRecipe.from_json(found.info["features"])
        # How features are stored has no part in the projection.
        wrong += replace(run.recipe, dtype=stored.dtype, flips=stored.flips).differences(stored)
    elif len(found.mean) != run.recipe.dim:
        wrong.append(f"{run.recipe.dim} channels wanted, {len(found.mean)} there")
    if wrong:
        raise ConfigError(
            f"Expected the projection that {path} holds, but another was asked for ({'; '.join(wrong)}). Features of "
            "different projections cannot be mixed: use the same options, or take another --out."
        )
