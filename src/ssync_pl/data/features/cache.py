"""Running a frozen backbone over shards once and storing its features, shard by shard."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ssync_pl.data.features import Backbone, store
from ssync_pl.data.features.projection import PROJECTION_FILE, Projection, fit_projection, read_projection
from ssync_pl.data.features.store import FeatureRecipe
from ssync_pl.data.files import exclusive, write_bytes
from ssync_pl.data.index import ShardEntry, load_shards
from ssync_pl.data.patterns import is_remote
from ssync_pl.data.samples import SampleRules, eval_sample
from ssync_pl.data.shards import encode_member, read_shard
from ssync_pl.data.transforms import BatchTransform, Size
from ssync_pl.errors import ShardError, choose, explained, require, require_shard

_VIDEOS, _FRAMES = 256, 512  # most that a projection is fitted to
_SCRATCH = ".features.tmp"  # the shard that is being written

_logger = logging.getLogger(__name__)
_Source = tuple[str, ShardEntry]


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
        """Compute features (T, N, D) of frames (T, h, w, 3), cropped at `crop` (2,); refuses NaN and infinity."""
        device, r = self.device or video.device, self.recipe
        self.backbone.to(device)
        transform = BatchTransform(r.image_size, resize_mode=r.resize_mode, crop=r.crop, mean=r.mean, std=r.std)
        parts = []
        for frames in video.split(self.batch_size):
            batch = {"video": frames[None], "crop": crop[None], "flip": torch.tensor([flip])}
            seen = transform({name: value.to(device) for name, value in batch.items()})["video"][0]
            features, _ = self.backbone(seen)
            parts.append(features if self.projection is None else self.projection(features))
        features = torch.cat(parts)
        expected = f"backbone {self.backbone.name} to give finite features of {where}"
        require_shard(bool(features.isfinite().all()), expected, "NaN or infinity", advice="Check weights and video.")
        return features


@dataclass
class CacheReport:
    """What a call of `cache_features` did: counts of shards, and of the frames that were computed."""

    recipe: FeatureRecipe
    projection: Projection | None
    written: int = 0
    kept: int = 0
    frames: int = 0
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
    components: int | None = None,
) -> CacheReport:
    """Store the features of every frame in bfloat16, in shards of the same names and keys as those of the videos.

    A call that was killed goes on with the shards that are missing; of several for one folder, one works and the others
    wait. With `components` the first call for a folder fits `projection.npz` to up to 512 frames from all over its
    shards, and all later calls take it: so store the training videos first. `out` may hold shards of the same recipe,
    nothing else. `flips` stores features of the mirrored frames too: they are no mirror image of the features. With
    `on_bad_sample="skip"` videos that cannot be read get no features and are reported.
    """
    from tqdm import tqdm

    require(batch_size >= 1, "argument `batch_size` to be at least 1", batch_size)
    choose("on_bad_sample", on_bad_sample, "raise", "skip")
    choose("crop", crop, "none", "center")
    remote = [path for path in shards if is_remote(path)]
    require(not remote, "local shards with stored features", *remote[:1], advice="Download them first.")
    size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
    backbone.to(device)
    _, grid = backbone(torch.zeros(1, 3, *size, device=device))
    known = (backbone.name, backbone.layer, backbone.fingerprint, backbone.dim)
    recipe = FeatureRecipe(*known, grid, size, resize_mode, crop, backbone.mean, backbone.std, flips=flips)
    maker = FeatureMaker(backbone, recipe, None, batch_size, device)
    folder, skip, sources = Path(out), on_bad_sample == "skip", list(zip(shards, load_shards(shards), strict=True))
    advice = "Finished shards are kept: make room, or take another --out, and run again."
    with explained(f"to write features to {out}", OSError, advice=advice):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / ".cache.lock", timeout=-1):
            (folder / _SCRATCH).unlink(missing_ok=True)  # what a killed process left
            stored = {path: store.read_recipe(path)[0] for path in sorted(folder.glob("*.tar"))}  # refuses other files
            maker = _projected(maker, folder, components, sources, skip)
            for path, there in stored.items():
                store.require_same(path, there, maker.recipe)
            report = CacheReport(maker.recipe, maker.projection)
            for source in tqdm(sources, unit="shard", disable=None):
                _store_shard(source, maker, folder, skip, report)
            load_shards(sorted(folder.glob("*.tar")))  # writes their index
    return report


def _projected(
    maker: FeatureMaker, folder: Path, components: int | None, sources: Sequence[_Source], skip: bool
) -> FeatureMaker:
    """Take the folder's projection, or fit it."""
    path, recipe = folder / PROJECTION_FILE, maker.recipe
    if components is None and not path.exists():
        return maker
    if not path.exists():
        expected = f"{PROJECTION_FILE} beside the features in {folder}"
        require(not any(folder.glob("*.tar")), expected, "none", advice="Put it back, or take another --out.")
        fitted = fit_projection(_sample(maker, sources, skip), maker.backbone.layer_dims, components or 0)
        facts = [store.source_facts(*source, folder) for source in sources]
        info = {**fitted.info, "sources": facts, "features": asdict(recipe)}
        write_bytes(path, replace(fitted, info=info).pack())
    projection = read_projection(path)
    dim = projection.matrix.shape[1]
    made = FeatureRecipe.from_json(projection.info.get("features", {}), path)
    there = replace(made, components=dim, flips=recipe.flips)
    store.require_same(path, there, replace(recipe, components=components or 0))
    recipe = replace(recipe, dim=dim, components=dim, projection=projection.fingerprint)
    return replace(maker, recipe=recipe, projection=projection)


def _sample(maker: FeatureMaker, sources: Sequence[_Source], skip: bool) -> Iterator[Tensor]:
    """Features of frames from all over the shards, the same for every call."""
    places = [(path, entry, sample) for path, entry in sources for sample in entry.samples]
    chosen = [places[number] for number in _evenly(len(places), _VIDEOS)]
    for path, entry, sample in chosen:
        source = path, replace(entry, samples=(sample,))
        for key, video in _read(source, maker.recipe, [] if skip else None):
            frames = _evenly(len(video["video"]), max(1, _FRAMES // len(chosen)))
            yield maker(video["video"][frames], video["crop"], f"{path}, key {key}")


def _evenly(total: int, count: int) -> list[int]:
    """Ascending numbers below `total`, at most `count`, spread evenly."""
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _store_shard(source: _Source, maker: FeatureMaker, folder: Path, skip: bool, report: CacheReport) -> None:
    """Write the features of a shard, unless they are there: under a hidden name, renamed when whole."""
    from webdataset import TarWriter

    facts = store.source_facts(*source, folder)
    target, there = store.find_shard(folder, facts)
    if not there:
        temporary = folder / _SCRATCH
        try:
            with temporary.open("wb") as stream, TarWriter(stream, user="", group="", encoder=False, mtime=0) as tar:
                head, kind = os.path.splitext(store.RECIPE_MEMBER)
                tar.write({"__key__": head, kind[1:]: store.pack_recipe(maker.recipe, facts)})
                for key, video in _read(source, maker.recipe, report.skipped if skip else None):
                    members = {}
                    for flip in (False, True)[: 1 + maker.recipe.flips]:
                        features = maker(video["video"], video["crop"], f"{source[0]}, key {key}", flip)
                        bits = features.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)
                        members[store.MEMBERS[flip]] = encode_member(store.MEMBERS[flip], bits)
                        report.frames += len(bits)
                    tar.write({"__key__": key, **members})
            same = store.source_facts(source[0], load_shards([source[0]])[0], folder) == facts
            require_shard(same, f"{source[0]} to stay as it is while it is read", "a change", advice="Run again.")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    report.written, report.kept = report.written + (not there), report.kept + there


def _read(source: _Source, recipe: FeatureRecipe, skipped: list[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the videos of a shard; where one cannot be read, raise, or append the message to `skipped`."""
    rules = SampleRules(image_size=recipe.image_size, crop=recipe.crop)
    for key, members in read_shard(*source):
        try:
            yield key, eval_sample(members, rules)
        except ShardError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            _logger.warning("Skipping a bad sample: %s", error)
