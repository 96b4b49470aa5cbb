"""Running a frozen backbone over shards once and storing its features, shard by shard."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ssync_pl.data.features.backbone import Backbone
from ssync_pl.data.features.projection import PROJECTION_FILE, Projection, fit_projection, read_projection
from ssync_pl.data.features.recipe import (
    RECIPE_MEMBER,
    FeatureRecipe,
    SourceFacts,
    find_shard,
    pack_recipe,
    read_recipe,
    require_crop,
    require_same,
    source_facts,
)
from ssync_pl.data.features.store import member_name
from ssync_pl.data.files import exclusive, write_bytes
from ssync_pl.data.index import SampleEntry, ShardEntry, load_shards
from ssync_pl.data.patterns import is_remote
from ssync_pl.data.samples import SampleRules, eval_sample
from ssync_pl.data.shards import ShardReader, encode_member
from ssync_pl.data.transforms import BatchTransform, Size
from ssync_pl.errors import ShardError, choose, require

__all__ = ["CacheReport", "cache_features"]

_VIDEOS, _FRAMES = 256, 512  # most that a projection is fitted to

_logger = logging.getLogger(__name__)


@dataclass
class CacheReport:
    """What a call of `cache_features` did; `busy` shards were left to other processes, `frames` were computed."""

    recipe: FeatureRecipe
    projection: Projection | None
    written: int = 0
    kept: int = 0
    busy: list[str] = field(default_factory=list)
    frames: int = 0
    seconds: float = 0.0
    bytes: int = 0
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Run:
    """What stays the same over all shards; `skip` leaves out videos that cannot be read."""

    backbone: Backbone
    transform: BatchTransform
    recipe: FeatureRecipe
    batch_size: int
    device: torch.device | str
    skip: bool
    projection: Projection | None = None


def cache_features(
    shards: Sequence[str],
    backbone: Backbone,
    out: str | os.PathLike[str],
    *,
    image_size: int | Size,
    resize_mode: str = "bicubic",
    crop: str = "none",
    flips: bool = False,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    on_bad_sample: Literal["raise", "skip"] = "raise",
    progress: bool = True,
    components: int | None = None,
) -> CacheReport:
    """Store the features of every frame in bfloat16, in shards of the same names and keys as those of the videos.

    Frames are resized as in evaluation. A call that was killed goes on with the shards that are missing; several
    processes may fill one folder at once. With `components` the first call for a folder fits `projection.npz` to up to
    512 frames from all over its shards, and all later calls take it: so store the training videos first.

    Args:
        shards: Local shards of videos.
        backbone: The frozen backbone; it is moved to `device`.
        out: Folder of the features; made when absent. It may hold shards of the same recipe, nothing else.
        image_size: Height and width of the frames that the backbone sees, or one number for both.
        resize_mode: `bicubic` (clamped) or `bilinear`.
        crop: `none` or `center`.
        flips: Store features of the mirrored frames too: they are no mirror image of the features.
        batch_size: Most frames per call of the backbone.
        device: Where the backbone runs.
        on_bad_sample: `raise`, or `skip` videos that cannot be read: they get no features and are reported.
        progress: Show a bar.
        components: Store this many principal components (`fit_projection`) instead of the backbone's channels.

    Raises:
        ConfigError: A setting is out of range, or `out` holds features of another recipe or projection.
        ShardError: A video cannot be read or changes, features are not finite, or `out` cannot be written.
    """
    from tqdm import tqdm

    require(batch_size >= 1, "argument `batch_size` to be at least 1", batch_size)
    choose("on_bad_sample", on_bad_sample, "raise", "skip")
    require_crop(crop)
    expected = f"argument `components` to be from 1 to the {backbone.dim} channels of backbone {backbone.name}"
    require(components is None or 1 <= components <= backbone.dim, expected, components)
    remote = [path for path in shards if is_remote(path)]
    require(not remote, "local shards with stored features", *remote[:1], advice="Download them first.")
    size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
    mean, std = backbone.mean, backbone.std
    transform = BatchTransform(size, resize_mode=resize_mode, crop=crop, mean=mean, std=std)
    backbone.to(device)
    _, grid = backbone(torch.zeros(1, 3, *size, device=device))
    names = (backbone.name, backbone.layer, backbone.fingerprint)
    recipe = FeatureRecipe(*names, backbone.dim, grid, size, resize_mode, crop, mean, std, flips=flips)
    run, folder = _Run(backbone, transform, recipe, batch_size, device, on_bad_sample == "skip"), Path(out)
    sources = list(zip(shards, load_shards(shards), strict=True))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run = _projected(run, folder, components, sources)
        for path in sorted(folder.glob("*.tar")):
            require_same(path, read_recipe(path)[0], run.recipe)
        report = CacheReport(run.recipe, run.projection)
        for path, entry in tqdm(sources, unit="shard", disable=not progress):
            _store_shard(path, entry, run, folder, report)
        load_shards(sorted(folder.glob("*.tar")))  # writes their index
    except OSError as error:
        raise ShardError(
            f"Expected to write features to {out}, but could not ({error}). Finished shards are kept: make room, or "
            "take another --out, and run again."
        ) from error
    return report


def _projected(run: _Run, folder: Path, components: int | None, sources: Sequence[tuple[str, ShardEntry]]) -> _Run:
    """Take the folder's projection, or fit it; other processes that want one of the same folder wait meanwhile."""
    path = folder / PROJECTION_FILE
    if components is not None and not path.exists():
        with exclusive(folder / f".{PROJECTION_FILE}.lock", timeout=-1):
            if not path.exists():  # asked again: another process may have finished it
                expected = f"{PROJECTION_FILE} beside the features in {folder}"
                require(not any(folder.glob("*.tar")), expected, "none", advice="Put it back, or take another --out.")
                fitted = fit_projection(_sample(run, sources), run.backbone.layer_dims, components)
                facts = [asdict(source_facts(*source, folder)) for source in sources]
                info = {**fitted.info, "sources": facts, "features": asdict(run.recipe)}
                write_bytes(path, replace(fitted, info=info).pack())
    if not path.exists():
        return run
    projection = read_projection(path)
    dim = projection.matrix.shape[1]
    there = replace(FeatureRecipe.from_json(projection.info["features"]), components=dim, flips=run.recipe.flips)
    require_same(path, there, replace(run.recipe, components=components or 0))
    recipe = replace(run.recipe, dim=dim, components=dim, projection=projection.fingerprint)
    return replace(run, recipe=recipe, projection=projection.to(run.device))


def _sample(run: _Run, sources: Sequence[tuple[str, ShardEntry]]) -> Iterator[Tensor]:
    """Features of frames from all over the shards, the same for every call."""
    places = [(path, entry, sample) for path, entry in sources for sample in entry.samples]
    chosen = [places[number] for number in _evenly(len(places), _VIDEOS)]
    each = max(1, _FRAMES // max(1, len(chosen)))
    for path, entry, sample in chosen:
        for key, video in _read(path, entry, [sample], run, []):
            yield _features(video, _evenly(len(video["video"]), each), False, run, f"{path}, key {key}")


def _evenly(total: int, count: int) -> list[int]:
    """Ascending numbers below `total`, at most `count`, spread evenly."""
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _store_shard(path: str, entry: ShardEntry, run: _Run, folder: Path, report: CacheReport) -> None:
    facts, start = source_facts(path, entry, folder), time.perf_counter()
    target, there = find_shard(folder, facts)
    if not there:
        try:
            with exclusive(folder / f".{facts.sha256[:12]}.lock"):
                target, there = find_shard(folder, facts)  # asked again: another process may have finished it
                if not there:
                    target = _write_shard(path, entry, facts, run, folder, report)
        except BlockingIOError:
            report.busy.append(entry.name)
            return
        report.seconds += time.perf_counter() - start
    report.kept += there
    report.written += not there
    report.bytes += target.stat().st_size


def _write_shard(
    path: str, entry: ShardEntry, facts: SourceFacts, run: _Run, folder: Path, report: CacheReport
) -> Path:
    """Write a shard of features under a temporary name, then rename it."""
    temporary = folder / f".{facts.sha256[:12]}.tmp"
    try:
        with tarfile.open(temporary, mode="w", format=tarfile.GNU_FORMAT) as tar:
            _add(tar, RECIPE_MEMBER, pack_recipe(run.recipe, facts))
            for key, video in _read(path, entry, entry.samples, run, report.skipped):
                for flip in (False, True)[: 1 + run.recipe.flips]:
                    features = _features(video, range(len(video["video"])), flip, run, f"{path}, key {key}")
                    bits = features.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)
                    _add(tar, f"{key}.{member_name(flip)}", encode_member(member_name(flip), bits))
                    report.frames += len(bits)
        if source_facts(path, load_shards([path])[0], folder) != facts:
            raise ShardError(f"Expected {path} to stay as it is while it is read, but it changed. Run again.")
        target, _ = find_shard(folder, facts)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o444
    tar.addfile(info, io.BytesIO(data))


def _read(
    path: str, entry: ShardEntry, samples: Sequence[SampleEntry], run: _Run, skipped: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    rules = SampleRules(image_size=run.recipe.image_size, crop=run.recipe.crop)
    with contextlib.closing(ShardReader()) as reader:
        for sample in samples:
            try:
                yield sample.key, eval_sample(reader.sample(path, entry, sample), rules)
            except ShardError as error:
                if not run.skip:
                    raise
                skipped.append(str(error))
                _logger.warning("Skipping a bad sample: %s", error)


def _features(video: dict[str, Any], frames: Sequence[int], flip: bool, run: _Run, where: str) -> Tensor:
    """Features (M, N, D) of some frames of a video, mirrored with `flip`."""
    parts = []
    for first in range(0, len(frames), run.batch_size):
        piece = {"video": video["video"][None, list(frames[first : first + run.batch_size])]}
        piece |= {"crop": video["crop"][None], "flip": torch.tensor([flip])}
        seen = run.transform({name: value.to(run.device) for name, value in piece.items()})["video"][0]
        features, _ = run.backbone(seen)
        parts.append(features if run.projection is None else run.projection(features))
    features = torch.cat(parts)
    if not bool(features.isfinite().all()):
        raise ShardError(
            f"Expected backbone {run.backbone.name} to give finite features, but those of {where} hold NaN or "
            "infinity. Check its weights and the video."
        )
    return features
