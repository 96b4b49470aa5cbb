"""Videos that `ssync-pl predict --input` names: files, folders of frames, folders of videos, shards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssync_pl.data.convert import media
from ssync_pl.data.decode import inspect_video
from ssync_pl.data.index import SampleEntry, ShardEntry, load_shards
from ssync_pl.data.samples import SampleRules, eval_sample
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import require, require_shard

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


def find_videos(inputs: Sequence[str]) -> list[InputVideo]:
    """Finds the videos that some inputs name, in their order; those of a folder in natural order."""
    found: list[InputVideo] = []
    for path in (Path(text).expanduser() for text in inputs):
        require(path.exists(), "--input to be on this machine", f"{path}, which does not exist")
        videos = _folder(path) if path.is_dir() else _file(path)
        hint = "Name the folder that holds the frames." if path.suffix.lower() in media.PICTURE_EXTENSIONS else ""
        require(bool(videos), f"--input to be {_KINDS}", f"{path}, which is none of them", advice=hint)
        found += videos
    return found


def _folder(path: Path) -> list[InputVideo]:
    frames, videos, ignored = dict.fromkeys(media.list_frames(path)), [], []
    for item in sorted(path.iterdir(), key=lambda item: media.natural_key(item.name)):
        if item.name.startswith(".") or item.name in frames or media.is_mask_folder(item.name):
            continue
        found = _frame_folder(item) if item.is_dir() else _file(item)
        videos += found
        ignored += [] if found or item.suffix == ".json" else [item.name]  # such as the index of shards
    advice = "Name the inputs themselves, or move one kind into a folder of its own."
    kinds = [*list(frames)[:1], *(Path(video.source).name for video in videos[:1])]
    require(not (frames and videos), f"folder {path} to hold one kind of input", *kinds, advice=advice)
    if ignored:
        warnings.warn(f"ssync-pl predict leaves out of {path}: {', '.join(ignored[:9])}", stacklevel=2)
    return videos or _frame_folder(path)


def _frame_folder(path: Path) -> list[InputVideo]:
    names, key = media.list_frames(path), path.name or path.resolve().name
    frames = partial(media.read_frames, path, names, None, None, f"video {path}")
    return [InputVideo(key, str(path), frames)] if names else []


def _file(path: Path) -> list[InputVideo]:
    where, ending = f"video {path}", path.suffix.lower() if path.is_file() else ""
    if ending == ".tar":
        return _shard(path)
    if ending not in media.VIDEO_EXTENSIONS:
        return []
    facts = inspect_video(path, where)
    return [InputVideo(path.stem, str(path), partial(media.read_frames, path, None, None, None, where), facts.rate)]


def _shard(path: Path) -> list[InputVideo]:
    entry = load_shards([str(path)], save=False)[0]
    require_shard(bool(entry.samples), f"shard {path} to hold videos", "none", advice="Build it again.")
    read = partial(_shard_frames, str(path), entry)
    return [InputVideo(one.key, f"{path}, key {one.key}", partial(read, one)) for one in entry.samples]


def _shard_frames(path: str, shard: ShardEntry, sample: SampleEntry) -> Iterator[NDArray[np.uint8]]:
    return iter(eval_sample(ShardReader().sample(path, shard, sample), SampleRules())["video"].numpy())
