"""One projection per folder of features: made by the first call, taken by all later ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from ssync_pl.data.features.compute import FeatureRun, frames_of, in_batches
from ssync_pl.data.features.projection import (
    PROJECTION_FILE,
    Moments,
    Projection,
    describe_projection,
    fit_projection,
    pack_projection,
    read_projection,
)
from ssync_pl.data.features.recipe import FeatureRecipe, read_recipe, source_facts
from ssync_pl.data.files import exclusive, write_bytes
from ssync_pl.data.index import SampleEntry, ShardEntry, load_shards
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["settle_projection"]

_VIDEOS, _FRAMES = 256, 512


def settle_projection(out: Path, run: FeatureRun, components: int | None, shards: Sequence[str]) -> Projection | None:
    """Take the projection of a folder, or fit it to some shards; None where none is wanted.

    While one process fits, others that want the same folder wait, and take what it made.
    """
    path = out / PROJECTION_FILE
    if components is not None and not path.exists():
        with exclusive(out / f".{PROJECTION_FILE}.lock", timeout=-1):
            if not path.exists():  # asked again: another process may have finished it meanwhile
                _require_room(out)
                write_bytes(path, pack_projection(_fit(out, run, components, shards)))
    if not path.exists():
        return None
    found = read_projection(path)
    wrong = []
    if (components or 0) != found.components:
        wrong.append(f"{components or 'no'} components wanted, {found.components or 'none'} there")
    if "features" in found.info:
        stored = FeatureRecipe.from_json(found.info["features"])
        # How features are stored has no part in the projection.
        wrong += replace(run.recipe, dtype=stored.dtype, flips=stored.flips).differences(stored)
    if wrong:
        raise ConfigError(
            f"Expected the projection that {path} holds ({describe_projection(found)}), but another was asked for "
            f"({'; '.join(wrong)}). Use the same options, or take another --out."
        )
    return found


def _require_room(out: Path) -> None:
    for path in sorted(out.glob("*.tar"))[:1]:
        stored = read_recipe(path)[0].projection
        what = f"but {PROJECTION_FILE} (sha256 of its map {stored[:12]}…) is missing. Put it back, or take"
        raise ConfigError(
            f"Expected {out} to be empty or to hold projected features, "
            f"{what if stored else f'but {path.name} holds features as the backbone gave them. Take'} another --out."
        )


def _fit(out: Path, run: FeatureRun, components: int, paths: Sequence[str]) -> Projection:
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
    projection = fit_projection(moments, run.backbone.layer_dims, components)
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
