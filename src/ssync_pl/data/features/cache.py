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
from tqdm import tqdm

from ssync_pl.data.decode import read_npy_header
from ssync_pl.data.features.claim import Claim, cannot_write, claim
from ssync_pl.data.features.codec import FeatureType, stored_dtype, tensor_to_array
from ssync_pl.data.features.compute import FeatureRun, sample_features
from ssync_pl.data.features.recipe import (
    RECIPE_MEMBER,
    FeatureRecipe,
    SourceFacts,
    pack_recipe,
    read_recipe,
    require_crop,
    source_facts,
)
from ssync_pl.data.features.settle import ProjectionWish, settle_projection
from ssync_pl.data.features.store import member_names
from ssync_pl.data.index import ShardEntry, load_shards, scan_shard, write_index
from ssync_pl.data.patterns import is_remote
from ssync_pl.data.samples import SampleRules
from ssync_pl.data.shards import ShardReader, encode_member
from ssync_pl.data.transforms import BatchTransform, Size
from ssync_pl.errors import ConfigError, ShardError

if TYPE_CHECKING:
    from ssync_pl.hosts.nn.backbones import FrozenBackbone

__all__ = ["CacheReport", "cache_features"]


@dataclass(frozen=True)
class CacheReport:
    """What a call of `cache_features` did.

    Args:
        written: Shards written.
        kept: Shards that were there already.
        busy: Names of the shards that another process is writing.
        videos: Videos in the written shards.
        frames: Their frames; mirrored frames count again.
        bytes: Size of all finished shards, kept ones included.
        seconds: Time that the written shards took.
        skipped: Shard and key of each unreadable video → message.

    Example:
        >>> CacheReport(frames=10, seconds=2.0).frames_per_second
        5.0
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
        """Frames a second over the written shards, reading and writing included."""
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
    standardize: bool = False,
    fit: Sequence[str] | None = None,
    projection: str | os.PathLike[str] | None = None,
) -> CacheReport:
    """Store the features of every frame, in shards of the same names and keys as those of the videos.

    Frames go through `BatchTransform`, as in evaluation, with the backbone's normalisation. Each shard is written under
    a temporary name, checked and renamed; a call that was killed goes on with the shards that are missing. Several
    processes may fill one folder at once: each takes shards that no other is writing.

    With `components` features are projected (`fit_projection`): each channel standardised, each layer of the same
    weight, then a PCA. The projection is fitted once, by the first call for a folder, to up to 512 frames from all over
    its shards, or those of `fit`, and lies in the folder as `projection.npz`. So store the training videos first:
    later calls for that folder, of the validation videos for example, take the same projection. A host that is trained
    on projected features needs stored features in evaluation too, since its backbone would not project.

    Args:
        shards: Local shards of videos.
        backbone: The frozen backbone; it is moved to `device`.
        out: Folder of the features; made when absent. It may hold shards of the same recipe, nothing else.
        image_size: Height and width of the frames that the backbone sees, or one number for both.
        resize_mode: `bicubic` (clamped) or `bilinear`.
        crop: `none` or `center`; random crops are refused.
        dtype: How features are stored; see `encode_features`.
        flips: Store features of the mirrored frames too: they are no mirror image of the features.
        batch_size: Frames a call of the backbone.
        device: Where the backbone runs.
        on_bad_sample: `raise`, or `skip` videos that cannot be read: they get no features and are reported.
        progress: Show a bar.
        components: Store this many principal components instead of the backbone's channels.
        standardize: Store standardised channels, without a PCA.
        fit: Local shards to fit the projection to; `None` takes `shards`.
        projection: `projection.npz` of another folder, to use instead of fitting one.

    Returns:
        What was done.

    Raises:
        ConfigError: A setting is out of range, or `out` holds features of another recipe or projection.
        ShardError: A video cannot be read, its features are not finite, videos changed meanwhile, or `out` cannot be
            written or holds other shards.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from torch import nn
        >>> from ssync_pl.data.shards import ShardWriter
        >>> from ssync_pl.hosts.nn.backbones import FrozenBackbone
        >>> class Means(FrozenBackbone):
        ...     def grid_for(self, height, width):
        ...         return height // 4, width // 4
        ...
        ...     def extract(self, frames):
        ...         return self.model(frames).flatten(2).mT
        >>> backbone = Means(nn.AvgPool2d(4), name="means", layer="pool", dim=3, mean=[0.5] * 3, std=[0.5] * 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ShardWriter(f"{folder}/videos", "train") as writer:
        ...         writer.write("7", {"video.npy": np.zeros((6, 8, 8, 3), np.uint8)})
        ...     paths = [f"{folder}/videos/train-000000.tar"]
        ...     report = cache_features(paths, backbone, f"{folder}/features", image_size=8, progress=False)
        >>> report.written, report.videos, report.frames
        (1, 1, 6)
    """
    if batch_size < 1:
        raise ConfigError(f"Expected argument `batch_size` to be at least 1, but got {batch_size}.")
    if on_bad_sample not in ("raise", "skip"):
        raise ConfigError(f"Expected argument `on_bad_sample` to be raise or skip, but got {on_bad_sample!r}.")
    require_crop(crop)
    stored_dtype(dtype)
    wish = ProjectionWish(components, standardize, fit, projection)
    if components is not None and components > backbone.dim:
        raise ConfigError(
            f"Expected argument `components` to be at most the {backbone.dim} channels of backbone {backbone.name}, "
            f"but got {components}."
        )
    remote = [path for path in shards if is_remote(path)]
    if remote:
        raise ConfigError(f"Expected local shards to compute features of, but got {remote[0]}. Download them first.")
    names = [os.path.basename(path) for path in shards]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"Expected shards with names of their own, but got {next(n for n in names if names.count(n) > 1)} twice. "
            "Keep the features of each data set in a folder of its own."
        )
    size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
    mean, std = backbone.mean, backbone.std
    transform = BatchTransform(size, resize_mode=resize_mode, crop=crop, mean=mean, std=std)
    recipe = FeatureRecipe(
        backbone.name,
        backbone.layer,
        backbone.fingerprint,
        backbone.dim,
        backbone.to(device).grid_for(*size),
        size,
        resize_mode,
        crop,
        (mean[0], mean[1], mean[2]),
        (std[0], std[1], std[2]),
        dtype,
        flips,
    )
    rules = SampleRules(image_size=size, crop=crop)
    run = FeatureRun(backbone, transform, recipe, rules, batch_size, torch.device(device), on_bad_sample == "skip")
    return _cache(list(shards), run, Path(out), progress, wish)


def _cache(shards: list[str], run: FeatureRun, out: Path, progress: bool, wish: ProjectionWish) -> CacheReport:
    entries = load_shards(shards)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    run = _projected(run, out, wish, shards)
    _require_same_recipe(out, run.recipe)
    report = CacheReport()
    bar = tqdm(total=sum(len(entry.samples) for entry in entries), unit="video", disable=not progress)
    with bar, contextlib.closing(ShardReader()) as reader:
        for path, entry in zip(shards, entries, strict=True):
            report = _one_shard(path, entry, run, out, reader, bar, report)
    finished = [out / entry.name for entry in entries if (out / entry.name).exists()]
    _write_folder_index(out)
    return replace(report, bytes=sum(path.stat().st_size for path in finished))


def _projected(run: FeatureRun, out: Path, wish: ProjectionWish, shards: list[str]) -> FeatureRun:
    projection = settle_projection(out, run, run.backbone.layer_dims, wish, shards)
    if projection is None:
        return run
    recipe = replace(
        run.recipe,
        dim=projection.matrix.shape[1],
        components=projection.components,
        projection=projection.fingerprint,
    )
    return replace(run, recipe=recipe, projection=projection.to(run.device))


def _one_shard(
    path: str, entry: ShardEntry, run: FeatureRun, out: Path, reader: ShardReader, bar: Any, report: CacheReport
) -> CacheReport:
    start = time.perf_counter()
    final = out / entry.name
    facts = source_facts([(path, entry)], out)[0]
    with contextlib.ExitStack() as stack:
        mine: Claim | None = None
        if not final.exists():
            try:
                mine = stack.enter_context(claim(final))
            except OSError as error:
                raise cannot_write(out, error) from error
        if final.exists():  # asked again: another process may have finished it before the claim
            _require_finished(final, entry, facts)
            bar.update(len(entry.samples))
            return replace(report, kept=report.kept + 1)
        if mine is None:
            return replace(report, busy=(*report.busy, entry.name))
        done = _write_shard(mine, path, entry, facts, run, reader, bar)
        if source_facts([(path, load_shards([path])[0])], out)[0] != facts:
            raise ShardError(f"Expected {path} to stay as it is while it is read, but it changed. Run again.")
        try:
            mine.finish()
        except OSError as error:
            raise cannot_write(out, error) from error
    return replace(
        report,
        written=report.written + 1,
        videos=report.videos + done.videos,
        frames=report.frames + done.frames,
        seconds=report.seconds + time.perf_counter() - start,
        skipped={**report.skipped, **done.skipped},
    )


def _require_same_recipe(out: Path, recipe: FeatureRecipe) -> None:
    for path in sorted(out.glob("*.tar")):
        found, _ = read_recipe(path)
        if found != recipe:
            raise ConfigError(
                f"Expected {out} to be empty or to hold features of the same recipe, but {path.name} was made "
                f"otherwise ({'; '.join(recipe.differences(found))}). Take another --out, or delete the folder."
            )


def _require_finished(path: Path, entry: ShardEntry, facts: SourceFacts) -> None:
    _, stored = read_recipe(path)
    if stored != facts:
        raise ShardError(
            f"Expected {path} to hold features of the videos in {entry.name} as they are now, but those have changed "
            f"since (sha256 {facts.sha256[:12]}… now, {stored.sha256[:12]}… then). Delete {path} and run again."
        )
    try:
        surplus = {sample.key for sample in scan_shard(path).samples} - {sample.key for sample in entry.samples}
    except ShardError as error:
        raise ShardError(f"{error} It holds features: delete it and run again.") from error
    if surplus:
        raise ShardError(f"Expected {path} to hold features of {entry.name}, but key {min(surplus)} is not from there.")


def _write_shard(
    mine: Claim, path: str, entry: ShardEntry, facts: SourceFacts, run: FeatureRun, reader: ShardReader, bar: Any
) -> CacheReport:
    out = mine.final.parent
    frames: dict[str, int] = {}
    skipped: dict[str, str] = {}
    tar = tarfile.open(fileobj=mine.stream, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
    _add(tar, out, RECIPE_MEMBER, pack_recipe(run.recipe, facts))
    for key, variants in sample_features(path, entry, run, reader, skipped):
        for flip, encoded in enumerate(variants):
            for member, tensor in zip(member_names(run.recipe.dtype, bool(flip)), encoded.values(), strict=True):
                _add(tar, out, f"{key}.{member}", encode_member(member, tensor_to_array(tensor), f"key {key}"))
        frames[key] = len(variants[0]["features"])
        bar.update()
    try:
        tar.close()
        mine.stream.flush()
    except OSError as error:
        raise cannot_write(out, error) from error
    bar.update(len(skipped))
    _check(mine.temporary, frames, run.recipe)
    return CacheReport(videos=len(frames), frames=sum(frames.values()) * (1 + run.recipe.flips), skipped=skipped)


def _check(path: Path, frames: dict[str, int], recipe: FeatureRecipe) -> None:
    entry = scan_shard(path)
    found = {sample.key: sample for sample in entry.samples}
    if list(found) != list(frames):
        raise ShardError(f"Expected {path} to hold {len(frames)} samples after writing, but it holds {len(found)}.")
    shape = (recipe.grid[0] * recipe.grid[1], recipe.dim)
    with contextlib.closing(ShardReader()) as reader:
        for key, count in frames.items():
            for flip in range(1 + recipe.flips):
                for member in member_names(recipe.dtype, bool(flip)):
                    expected = (count, recipe.dim) if member.endswith("_scale.npy") else (count, *shape)
                    data = reader.member(str(path), entry, found[key], member)
                    header = read_npy_header(data, member, f"{path}, key {key}")
                    if header.shape != expected or header.data_offset + header.nbytes != len(data):
                        raise ShardError(f"Expected `{member}` of {path}, key {key} to be whole, but it is not.")


def _add(tar: tarfile.TarFile, out: Path, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o444
    try:
        tar.addfile(info, io.BytesIO(data))
    except OSError as error:
        raise cannot_write(out, error) from error


def _write_folder_index(out: Path) -> None:
    paths = sorted(out.glob("*.tar"))
    if not paths:
        return
    read = [read_recipe(path) for path in paths]
    sources = {facts.name: facts.sha256 for _, facts in read}
    try:
        write_index(out, load_shards(paths, save=False), {"features": {**read[0][0].to_json(), "sources": sources}})
    except OSError as error:
        raise cannot_write(out, error) from error
