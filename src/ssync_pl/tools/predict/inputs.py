"""Videos that `ssync-pl predict --input` names: files, folders of frames or videos, shards; and windows of them."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import numpy as np
import torch
from numpy.typing import NDArray

from ssync_pl.data.convert import media
from ssync_pl.data.datamodule import ShardDataModule
from ssync_pl.data.decode import inspect_video
from ssync_pl.data.features.cache import FeatureMaker
from ssync_pl.data.features.projection import PROJECTION_FILE, read_projection
from ssync_pl.data.features.store import read_recipe
from ssync_pl.data.index import SampleEntry, load_shards
from ssync_pl.data.samples import SampleRules, crop_offsets, eval_sample
from ssync_pl.data.shards import sample_members
from ssync_pl.data.synthetic_datamodule import SyntheticDataModule
from ssync_pl.errors import ConfigError, ShardError, printable, require, require_shard
from ssync_pl.tools.predict.windows import WINDOW_KEY, cut_windows, seen_region

_KINDS = (
    f"a video file ({', '.join(media.VIDEO_EXTENSIONS)}), a folder of frames "
    f"({', '.join(media.PICTURE_EXTENSIONS)}), a folder of videos, or shards (.tar)"
)


class InputVideo(NamedTuple):
    """A video of the user's; frames per second are None where nothing says them."""

    key: str
    source: str  # for messages and the index
    frames: Callable[[], Iterator[NDArray[np.uint8]]]  # decodes one after the other, (H, W, 3)
    rate: float | None = None
    error: ShardError | None = None  # why there are no frames


def find_videos(inputs: Sequence[str], *, skip_bad: bool = False) -> list[InputVideo]:
    """Finds the videos that inputs name, in order; a damaged file raises, or with `skip_bad` gives one with `error`."""
    found: list[InputVideo] = []
    for path in (Path(os.path.expanduser(text)) for text in inputs):
        require(path.exists(), "--input to be on this machine", f"{path}, which does not exist")
        videos = _folder(path) if path.is_dir() else _file(path)
        hint = "Name the folder that holds the frames." if path.suffix.lower() in media.PICTURE_EXTENSIONS else ""
        require(bool(videos), f"--input to be {_KINDS}", f"{path}, which is none of them", advice=hint)
        found += videos
    for error in (video.error for video in found):
        if error is not None and not skip_bad:
            raise error
    return found


def _folder(path: Path) -> list[InputVideo]:
    frames, videos, ignored = dict.fromkeys(media.list_frames(path)), [], []
    for item in sorted(path.iterdir(), key=lambda item: media.natural_key(item.name)):
        if item.name.startswith(".") or item.name in frames or item.suffix == ".json":  # such as the index of shards
            continue
        masks = media.mask_owner(item) is not None
        found = [] if masks else _frame_folder(item) if item.is_dir() else _file(item)
        videos += found
        others = {one.name for one in item.iterdir()} - {*media.list_frames(item)} if found and item.is_dir() else set()
        ignored += [f"{item.name}/{other}" for other in sorted(others)] if found else [item.name]
    advice = "Name the inputs themselves, or move one kind into a folder of its own."
    kinds = [*list(frames)[:1], *(Path(video.source).name for video in videos[:1])]
    require(not (frames and videos), f"folder {path} to hold one kind of input", *kinds, advice=advice)
    if ignored:
        warnings.warn(printable(f"ssync-pl predict leaves out of {path}: {', '.join(ignored[:9])}"), stacklevel=2)
    return videos or _frame_folder(path)


def _frame_folder(path: Path) -> list[InputVideo]:
    names, key = media.list_frames(path), path.name or path.resolve().name
    frames = partial(media.read_frames, path, names, None, None, f"video {path}")
    return [InputVideo(key, str(path), frames)] if names else []


def _file(path: Path) -> list[InputVideo]:
    where, ending = f"video {path}", path.suffix.lower() if path.is_file() else ""
    if ending not in (".tar", *media.VIDEO_EXTENSIONS):
        return []
    try:
        if ending == ".tar":
            return _shard(path)
        facts = inspect_video(path, where)
    except ShardError as error:
        return [InputVideo(path.stem, str(path), lambda: iter(()), error=error)]
    frames = partial(media.read_frames, path, None, None, None, where, facts.frames)
    return [InputVideo(path.stem, str(path), frames, facts.rate)]


def _shard(path: Path) -> list[InputVideo]:
    entry = load_shards([str(path)], save=False)[0]
    require_shard(bool(entry.samples), f"shard {path} to hold videos", "none", advice="Build it again.")

    def frames(sample: SampleEntry) -> Iterator[NDArray[np.uint8]]:
        return iter(eval_sample(sample_members(str(path), entry, sample), SampleRules())["video"].numpy())

    return [InputVideo(one.key, f"{path}, key {one.key}", partial(frames, one)) for one in entry.samples]


class InputDataModule(L.LightningDataModule):
    """Gives the windows of a user's videos as `data`, the configuration's data module, would give them."""

    def __init__(
        self, data: Any, inputs: Sequence[str], clip_frames: int = 64, backbone_checkpoint: str | None = None
    ) -> None:
        super().__init__()
        expected = "the configuration to name ShardDataModule or SyntheticDataModule for --input"
        advice = "Add `--data ShardDataModule --data.image_size SIZE`, with the values of the training."
        require(isinstance(data, ShardDataModule), expected, type(data).__name__, advice=advice)
        require(clip_frames >= 2, "--clip-frames to be at least 2, as windows share a frame", clip_frames)
        self.data, self.clip_frames = data, clip_frames
        self.videos = find_videos(inputs, skip_bad=data.skip_bad)
        self.mean, self.std = data.mean, data.std
        self.transform = copy.copy(data.transform)
        if self.transform.image_size is None and isinstance(data, SyntheticDataModule):
            self.transform.image_size = (data.config.resolution, data.config.resolution)  # that of the training
        self.maker = None if data.features is None else _feature_maker(Path(data.features), backbone_checkpoint)

    def predict_dataloader(self) -> Iterator[dict[str, Any]]:
        """Gives one window per batch, decoded in this process, and features where the host wants them."""
        for video in self.videos:
            try:
                yield from self._windows(video)
            except ShardError as error:
                if not self.data.skip_bad:
                    raise
                self.data.count_bad([(video.source, str(error))])
        self.data.teardown("predict")
        bad = list(self.data.bad_samples.values())
        require_shard(len(bad) < len(self.videos), "at least one video of --input that can be read", *bad[:1])

    def _windows(self, video: InputVideo) -> Iterator[dict[str, Any]]:
        seen, device = self.transform, "cpu" if self.trainer is None else self.trainer.strategy.root_device
        rules = SampleRules(image_size=seen.image_size, crop=seen.crop, reference=seen.reference)
        if video.error is not None:
            raise video.error
        window = None
        for window in cut_windows(video.frames(), self.clip_frames):
            frames, crop = torch.from_numpy(window.frames).to(device), crop_offsets(window.frames, rules)
            batch = seen({"video": frames[None], "crop": crop[None].to(device)})
            if self.maker is not None:
                features = self.maker(frames, crop, f"video {video.source}")
                batch["features"] = features.to(torch.bfloat16).float()[None]  # as the cache rounds them
            region = seen_region(window.frames.shape[1:3], crop.tolist(), seen)
            whole = window._replace(key=video.key, source=video.source, rate=video.rate, region=region)
            yield {**batch, "__key__": [video.key], WINDOW_KEY: whole}
        require_shard(window is not None, f"{video.source} to have frames", "none", advice="Encode it again.")


def _feature_maker(folder: Path, checkpoint: str | None) -> FeatureMaker:
    """Makes features of new videos as those in a folder were made: same backbone, layer, weights and projection."""
    from ssync_pl.hosts.nn.backbones import load_backbone

    shards = sorted(folder.glob("*.tar"))
    advice = f"Put one of its shards and its {PROJECTION_FILE} back, or name their folder by --data.features."
    require(bool(shards), f"{folder} to hold the features that the host was trained on", "none", advice=advice)
    recipe, _ = read_recipe(shards[0])
    projection = read_projection(folder / PROJECTION_FILE) if recipe.projection else None
    same = projection is None or projection.fingerprint == recipe.projection
    require(same, f"the {PROJECTION_FILE} that the features in {folder} were made with", "another", advice=advice)
    for weights, file in [("pretrained", None), ("none", None)] if checkpoint is None else [(None, checkpoint)]:
        backbone = load_backbone(recipe.backbone, recipe.layer, weights, file)  # type: ignore[arg-type]
        if backbone.fingerprint == recipe.weights:
            return FeatureMaker(backbone, recipe, projection)
    raise ConfigError(
        f"Expected backbone {recipe.backbone} with the weights that the host's features were made with (sha256 "
        f"{recipe.weights[:12]}…), but {checkpoint or 'its published weights'} are others. Pass the file of weights "
        "that `ssync-pl data cache-features --checkpoint` got as --backbone_checkpoint."
    )
