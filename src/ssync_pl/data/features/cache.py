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

from ssync_pl.data.features import Backbone, store
from ssync_pl.data.features.projection import PROJECTION_FILE, Projection, fit_projection, read_projection
from ssync_pl.data.features.store import FeatureRecipe, member_name
from ssync_pl.data.files import exclusive, write_bytes
from ssync_pl.data.index import ShardEntry, load_shards
from ssync_pl.data.patterns import is_remote
from ssync_pl.data.samples import SampleRules, eval_sample
from ssync_pl.data.shards import ShardReader, encode_member
from ssync_pl.data.transforms import BatchTransform, Size
from ssync_pl.errors import ShardError, choose, require

__all__ = ["CacheReport", "FeatureMaker", "cache_features"]

_VIDEOS, _FRAMES = 256, 512  # most that a projection is fitted to

_logger = logging.getLogger(__name__)
_Source = tuple[str, ShardEntry]
_Video = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class FeatureMaker:
    """Turns frames into features as a cache holds them, on a device, or on that of the frames."""

    backbone: Backbone
    recipe: FeatureRecipe
    projection: Projection | None = None
    batch_size: int = 32
    device: torch.device | str | None = None

    @torch.no_grad()
    def __call__(self, video: Tensor, crop: Tensor, where: str, flip: bool = False) -> Tensor:
        """Compute features (T, N, D) of frames (T, h, w, 3) uint8 with crops at `crop` (2,), mirrored with `flip`.

        `ShardError` names `where` they are from when they are not finite.
        """
        device = self.device or video.device
        projection = None if self.projection is None else self.projection.to(device)
        self.backbone.to(device)
        r = self.recipe
        transform = BatchTransform(r.image_size, resize_mode=r.resize_mode, crop=r.crop, mean=r.mean, std=r.std)
        parts = []
        for frames in video.split(self.batch_size):
            batch = {"video": frames[None], "crop": crop[None], "flip": torch.tensor([flip])}
            seen = transform({name: value.to(device) for name, value in batch.items()})["video"][0]
            features, _ = self.backbone(seen)
            parts.append(features if projection is None else projection(features))
        features = torch.cat(parts)
        if not bool(features.isfinite().all()):
            raise ShardError(
                f"Expected backbone {self.backbone.name} to give finite features, but those of {where} hold NaN or "
                "infinity. Check its weights and the video."
            )
        return features


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

    A call that was killed goes on with the shards that are missing; several processes may fill one folder at once.
    With `components` the first call for a folder fits `projection.npz` to up to 512 frames from all over its shards,
    and all later calls take it: so store the training videos first.

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
    choose("resize_mode", resize_mode, "bicubic", "bilinear")
    store.require_crop(crop)
    remote = [path for path in shards if is_remote(path)]
    require(not remote, "local shards with stored features", *remote[:1], advice="Download them first.")
    size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
    backbone.to(device)
    _, grid = backbone(torch.zeros(1, 3, *size, device=device))
    names, scale = (backbone.name, backbone.layer, backbone.fingerprint), (backbone.mean, backbone.std)
    recipe = FeatureRecipe(*names, backbone.dim, grid, size, resize_mode, crop, *scale, flips=flips)
    maker = FeatureMaker(backbone, recipe, None, batch_size, device)
    folder, skip, sources = Path(out), on_bad_sample == "skip", list(zip(shards, load_shards(shards), strict=True))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        maker = _projected(maker, folder, components, sources, skip)
        for path in sorted(folder.glob("*.tar")):
            store.require_same(path, store.read_recipe(path)[0], maker.recipe)
        report = CacheReport(maker.recipe, maker.projection)
        for shard, entry in tqdm(sources, unit="shard", disable=not progress):
            _store_shard(shard, entry, maker, folder, skip, report)
        load_shards(sorted(folder.glob("*.tar")))  # writes their index
    except OSError as error:
        raise ShardError(
            f"Expected to write features to {out}, but could not ({error}). Finished shards are kept: make room, or "
            "take another --out, and run again."
        ) from error
    return report


def _projected(
    maker: FeatureMaker, folder: Path, components: int | None, sources: Sequence[_Source], skip: bool
) -> FeatureMaker:
    """Take the folder's projection, or fit it; other processes that want one of the same folder wait meanwhile."""
    path = folder / PROJECTION_FILE
    if components is not None and not path.exists():
        with exclusive(folder / f".{PROJECTION_FILE}.lock", timeout=-1):
            if not path.exists():  # asked again: another process may have finished it
                expected = f"{PROJECTION_FILE} beside the features in {folder}"
                require(not any(folder.glob("*.tar")), expected, "none", advice="Put it back, or take another --out.")
                fitted = fit_projection(_sample(maker, sources, skip), maker.backbone.layer_dims, components)
                facts = [asdict(store.source_facts(*source, folder)) for source in sources]
                info = {**fitted.info, "sources": facts, "features": asdict(maker.recipe)}
                write_bytes(path, replace(fitted, info=info).pack())
    if not path.exists():
        return maker
    projection = read_projection(path)
    dim, recipe = projection.matrix.shape[1], maker.recipe
    there = replace(FeatureRecipe.from_json(projection.info["features"]), components=dim, flips=recipe.flips)
    store.require_same(path, there, replace(recipe, components=components or 0))
    recipe = replace(recipe, dim=dim, components=dim, projection=projection.fingerprint)
    return replace(maker, recipe=recipe, projection=projection)


def _sample(maker: FeatureMaker, sources: Sequence[_Source], skip: bool) -> Iterator[Tensor]:
    """Features of frames from all over the shards, the same for every call."""
    places = [(path, entry, sample) for path, entry in sources for sample in entry.samples]
    chosen = [places[number] for number in _evenly(len(places), _VIDEOS)]
    for path, entry, sample in chosen:
        for key, video in _read(path, replace(entry, samples=(sample,)), maker.recipe, [] if skip else None):
            frames = _evenly(len(video["video"]), max(1, _FRAMES // len(chosen)))
            yield maker(video["video"][frames], video["crop"], f"{path}, key {key}")


def _evenly(total: int, count: int) -> list[int]:
    """Ascending numbers below `total`, at most `count`, spread evenly."""
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _store_shard(
    path: str, entry: ShardEntry, maker: FeatureMaker, folder: Path, skip: bool, report: CacheReport
) -> None:
    """Write the features of a shard, unless they are there, or another process is writing them."""
    facts, start = store.source_facts(path, entry, folder), time.perf_counter()
    target, there = store.find_shard(folder, facts)
    try:
        with contextlib.nullcontext() if there else exclusive(folder / f".{facts.sha256[:12]}.lock"):
            target, there = store.find_shard(folder, facts)  # asked again: another process may have finished it
            if not there:
                videos = _read(path, entry, maker.recipe, report.skipped if skip else None)
                target, frames = _write_shard(path, videos, facts, maker, folder)
                report.frames, report.seconds = report.frames + frames, report.seconds + time.perf_counter() - start
            report.written, report.kept = report.written + (not there), report.kept + there
            report.bytes += target.stat().st_size
    except BlockingIOError:
        report.busy.append(entry.name)


def _write_shard(
    path: str, videos: Iterator[_Video], facts: store.SourceFacts, maker: FeatureMaker, folder: Path
) -> tuple[Path, int]:
    """Write a shard under a temporary name, then rename it; return where it lies, and how many frames it holds."""
    temporary, count = folder / f".{facts.sha256[:12]}.tmp", 0
    try:
        with tarfile.open(temporary, mode="w", format=tarfile.GNU_FORMAT) as tar:
            _add(tar, store.RECIPE_MEMBER, store.pack_recipe(maker.recipe, facts))
            for key, video in videos:
                for flip in (False, True)[: 1 + maker.recipe.flips]:
                    features = maker(video["video"], video["crop"], f"{path}, key {key}", flip)
                    bits = features.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)
                    _add(tar, f"{key}.{member_name(flip)}", encode_member(member_name(flip), bits))
                    count += len(bits)
        if store.source_facts(path, load_shards([path])[0], folder) != facts:
            raise ShardError(f"Expected {path} to stay as it is while it is read, but it changed. Run again.")
        target, _ = store.find_shard(folder, facts)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target, count


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o444
    tar.addfile(info, io.BytesIO(data))


def _read(path: str, entry: ShardEntry, recipe: FeatureRecipe, skipped: list[str] | None) -> Iterator[_Video]:
    """Read the videos of a shard; where one cannot be read, raise, or append the message to `skipped`."""
    rules = SampleRules(image_size=recipe.image_size, crop=recipe.crop)
    with contextlib.closing(ShardReader()) as reader:
        for sample in entry.samples:
            try:
                yield sample.key, eval_sample(reader.sample(path, entry, sample), rules)
            except ShardError as error:
                if skipped is None:
                    raise
                skipped.append(str(error))
                _logger.warning("Skipping a bad sample: %s", error)
