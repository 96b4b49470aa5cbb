"""Running a frozen backbone over shards once and storing its features, shard by shard."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ssync_pl.data.features.codec import FeatureType, member_names, stored_dtype, tensor_to_array
from ssync_pl.data.features.compute import FeatureRun, sample_features
from ssync_pl.data.features.recipe import (
    RECIPE_MEMBER,
    FeatureRecipe,
    SourceFacts,
    find_shard,
    pack_recipe,
    read_recipe,
    require_crop,
    require_local,
    source_facts,
)
from ssync_pl.data.features.settle import settle_projection
from ssync_pl.data.files import exclusive
from ssync_pl.data.index import ShardEntry, load_shards, scan_shard, write_index
from ssync_pl.data.samples import SampleRules
from ssync_pl.data.shards import ShardReader, encode_member
from ssync_pl.data.transforms import BatchTransform, Size
from ssync_pl.errors import ConfigError, ShardError

if TYPE_CHECKING:
    from ssync_pl.data.features.backbones import FrozenBackbone

__all__ = ["CacheReport", "cache_features"]


@dataclass(frozen=True)
class CacheReport:
    """What a call of `cache_features` did.

    Attributes:
        written: Shards written.
        kept: Shards that were there already.
        busy: Names of the shards that another process is writing.
        videos: Videos in the written shards.
        frames: Their frames; mirrored frames count again.
        bytes: Size of all finished shards, kept ones included.
        seconds: Time that the written shards took.
        skipped: Shard and key of each unreadable video → message.
    """

    written: int = 0
    kept: int = 0
    busy: tuple[str, ...] = ()
    videos: int = 0
    frames: int = 0
    bytes: int = 0
    seconds: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def frames_per_second(self) -> float:
        """Frames per second over the written shards, reading and writing included."""
        return self.frames / self.seconds if self.seconds > 0 else 0.0


def cache_features(
    shards: Sequence[str],
    backbone: FrozenBackbone,
    out: str | os.PathLike[str],
    *,
    image_size: int | Size,
    resize_mode: str = "bicubic",
    crop: str = "none",
    dtype: FeatureType = "bf16",
    flips: bool = False,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    on_bad_sample: Literal["raise", "skip"] = "raise",
    progress: bool = True,
    components: int | None = None,
) -> CacheReport:
    """Store the features of every frame, in shards of the same names and keys as those of the videos.

    Frames go through `BatchTransform`, as in evaluation, with the backbone's normalisation. Each shard is written under
    a temporary name, checked and renamed; a call that was killed goes on with the shards that are missing. Several
    processes may fill one folder at once: each takes shards that no other is writing. Sets whose shards have the same
    names may share a folder: the digest of the videos tells them apart.

    With `components` features are projected (`fit_projection`): each channel standardised, each layer of the same
    weight, then a PCA. The projection is fitted once, by the first call for a folder, to up to 512 frames from all over
    its shards, and lies in the folder as `projection.npz`. So store the training videos first: later calls for that
    folder take the same projection.

    Args:
        shards: Local shards of videos.
        backbone: The frozen backbone; it is moved to `device`.
        out: Folder of the features; made when absent. It may hold shards of the same recipe, nothing else.
        image_size: Height and width of the frames that the backbone sees, or one number for both.
        resize_mode: `bicubic` (clamped) or `bilinear`.
        crop: `none` or `center`; random crops are refused.
        dtype: How features are stored; see `encode_features`.
        flips: Store features of the mirrored frames too: they are no mirror image of the features.
        batch_size: Frames per call of the backbone.
        device: Where the backbone runs.
        on_bad_sample: `raise`, or `skip` videos that cannot be read: they get no features and are reported.
        progress: Show a bar.
        components: Store this many principal components instead of the backbone's channels.

    Returns:
        What was done.

    Raises:
        ConfigError: A setting is out of range, or `out` holds features of another recipe or projection.
        ShardError: A video cannot be read, its features are not finite, videos changed meanwhile, or `out` cannot be
            written or holds other shards.
    """
    from tqdm import tqdm

    if batch_size < 1:
        raise ConfigError(f"Expected argument `batch_size` to be at least 1, but got {batch_size}.")
    if on_bad_sample not in ("raise", "skip"):
        raise ConfigError(f"Expected argument `on_bad_sample` to be raise or skip, but got {on_bad_sample!r}.")
    require_crop(crop)
    stored_dtype(dtype)
    if components is not None and not 1 <= components <= backbone.dim:
        raise ConfigError(
            f"Expected argument `components` to be from 1 to the {backbone.dim} channels of backbone {backbone.name}, "
            f"but got {components}."
        )
    require_local(shards)
    size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
    mean, std = backbone.mean, backbone.std
    transform = BatchTransform(size, resize_mode=resize_mode, crop=crop, mean=mean, std=std)
    grid = backbone.to(device).grid_for(*size)
    names = (backbone.name, backbone.layer, backbone.fingerprint)
    recipe = FeatureRecipe(*names, backbone.dim, grid, size, resize_mode, crop, mean, std, dtype, flips)
    rules = SampleRules(image_size=size, crop=crop)
    run = FeatureRun(backbone, transform, recipe, rules, batch_size, torch.device(device), on_bad_sample == "skip")
    entries, folder = load_shards(shards), Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run = _projected(run, folder, components, shards)
        _require_same_recipe(folder, run.recipe)
        report = CacheReport()
        bar = tqdm(total=sum(len(entry.samples) for entry in entries), unit="video", disable=not progress)
        with bar, contextlib.closing(ShardReader()) as reader:
            for path, entry in zip(shards, entries, strict=True):
                report = _one_shard(path, entry, run, folder, reader, bar, report)
        _write_folder_index(folder)
    except OSError as error:
        raise ShardError(
            f"Expected to write features to {out}, but could not ({error}). Finished shards are kept: make room, or "
            "take another --out, and run again."
        ) from error
    return report


def _projected(run: FeatureRun, out: Path, components: int | None, shards: Sequence[str]) -> FeatureRun:
    projection = settle_projection(out, run, components, shards)
    if projection is None:
        return run
    dim, fingerprint = projection.matrix.shape[1], projection.fingerprint
    recipe = replace(run.recipe, dim=dim, components=projection.components, projection=fingerprint)
    return replace(run, recipe=recipe, projection=projection.to(run.device))


def _require_same_recipe(out: Path, recipe: FeatureRecipe) -> None:
    for path in sorted(out.glob("*.tar")):
        found, _ = read_recipe(path)
        if found != recipe:
            raise ConfigError(
                f"Expected {out} to be empty or to hold features of the same recipe, but {path.name} was made "
                f"otherwise ({'; '.join(recipe.differences(found))}). Take another --out."
            )


def _one_shard(
    path: str, entry: ShardEntry, run: FeatureRun, out: Path, reader: ShardReader, bar: Any, report: CacheReport
) -> CacheReport:
    facts = source_facts([(path, entry)], out)[0]
    done = _kept(entry, facts, out, bar)
    if done is None:
        try:
            with exclusive(out / f".{facts.sha256[:12]}.lock"):
                # asked again: another process may have finished it before the lock was taken
                done = _kept(entry, facts, out, bar) or _made(path, entry, facts, run, out, reader, bar)
        except BlockingIOError:
            return replace(report, busy=(*report.busy, entry.name))
    sums = {name: getattr(report, name) + getattr(done, name) for name in ("written", "kept", "videos", "frames")}
    sums |= {"bytes": report.bytes + done.bytes, "seconds": report.seconds + done.seconds}
    return replace(report, **sums, skipped={**report.skipped, **done.skipped})


def _kept(entry: ShardEntry, facts: SourceFacts, out: Path, bar: Any) -> CacheReport | None:
    path, there = find_shard(out, facts)
    if not there:
        return None
    try:
        surplus = {sample.key for sample in scan_shard(path).samples} - {sample.key for sample in entry.samples}
    except ShardError as error:
        raise ShardError(f"{error} It holds features: delete it and run again.") from error
    if surplus:
        raise ShardError(f"Expected {path} to hold features of {entry.name}, but key {min(surplus)} is not from there.")
    bar.update(len(entry.samples))
    return CacheReport(kept=1, bytes=path.stat().st_size)


def _made(
    path: str, entry: ShardEntry, facts: SourceFacts, run: FeatureRun, out: Path, reader: ShardReader, bar: Any
) -> CacheReport:
    start = time.perf_counter()
    temporary = out / f".{facts.sha256[:12]}.tmp"
    try:
        done = _write_shard(temporary, path, entry, facts, run, reader, bar)
        if source_facts([(path, load_shards([path])[0])], out)[0] != facts:
            raise ShardError(f"Expected {path} to stay as it is while it is read, but it changed. Run again.")
        final, _ = find_shard(out, facts)
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    return replace(done, bytes=final.stat().st_size, seconds=time.perf_counter() - start)


def _write_shard(
    target: Path, path: str, entry: ShardEntry, facts: SourceFacts, run: FeatureRun, reader: ShardReader, bar: Any
) -> CacheReport:
    keys: list[str] = []
    frames = 0
    skipped: dict[str, str] = {}
    with tarfile.open(target, mode="w", format=tarfile.GNU_FORMAT) as tar:
        _add(tar, RECIPE_MEMBER, pack_recipe(run.recipe, facts))
        for key, variants in sample_features(path, entry, run, reader, skipped):
            for flip, encoded in enumerate(variants):
                for member, tensor in zip(member_names(run.recipe.dtype, bool(flip)), encoded.values(), strict=True):
                    _add(tar, f"{key}.{member}", encode_member(member, tensor_to_array(tensor), f"key {key}"))
                frames += len(encoded["features"])
            keys.append(key)
            bar.update()
    bar.update(len(skipped))
    if [sample.key for sample in scan_shard(target).samples] != keys:
        raise ShardError(f"Expected {target} to hold {len(keys)} samples after writing, but it does not. Run again.")
    return CacheReport(written=1, videos=len(keys), frames=frames, skipped=skipped)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o444
    tar.addfile(info, io.BytesIO(data))


def _write_folder_index(out: Path) -> None:
    paths = sorted(out.glob("*.tar"))
    read = [read_recipe(path) for path in paths]
    if read:
        sources = {path.name: facts.sha256 for path, (_, facts) in zip(paths, read, strict=True)}
        write_index(out, load_shards(paths, save=False), {"features": {**read[0][0].to_json(), "sources": sources}})
