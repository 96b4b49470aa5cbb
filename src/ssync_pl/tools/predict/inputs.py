"""Videos that `ssync-pl predict --input` names: files, folders of frames, folders of videos, shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssync_pl.data.convert.media import (
    PICTURE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    is_mask_folder,
    list_frames,
    natural_key,
    read_frames,
)
from ssync_pl.data.decode import inspect_video
from ssync_pl.data.index import SampleEntry, ShardEntry, load_shards
from ssync_pl.data.samples import SampleRules, eval_sample
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ShardError, require

__all__ = ["InputVideo", "find_videos"]

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_KINDS = (
    f"a video file ({', '.join(VIDEO_EXTENSIONS)}), a folder of frames ({', '.join(PICTURE_EXTENSIONS)}), a folder of "
    "videos, or shards (.tar)"
)


class InputVideo(NamedTuple):
    """A video of the user's; frames per second are None where nothing says them."""

    key: str
    source: str  # for messages and the index
    frames: Callable[[], Iterator[NDArray[np.uint8]]]  # decodes one after the other, (H, W, 3)
    rate: float | None = None


def find_videos(inputs: Sequence[str]) -> list[InputVideo]:
    """Finds the videos that some inputs name, in their order; those of a folder in natural order."""
    return [video for text in inputs for video in _look_into(Path(text).expanduser())]


def _look_into(path: Path) -> list[InputVideo]:
    require(path.exists(), "--input to be on this machine", f"{path}, which does not exist")
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() in VIDEO_EXTENSIONS:
        return [_video_file(path)]
    hint = "Name the folder that holds the frames." if path.suffix.lower() in PICTURE_EXTENSIONS else ""
    require(path.name.lower().endswith(_TARS), f"--input to be {_KINDS}", f"{path}, which is none of them", advice=hint)
    return _shard(path)


def _folder(path: Path) -> list[InputVideo]:
    names = sorted((item.name for item in path.iterdir() if item.name[0] != "."), key=natural_key)
    files = [name for name in names if (path / name).is_file()]
    pictures, clips, shards = (
        [name for name in files if name.lower().endswith(kind)]
        for kind in (PICTURE_EXTENSIONS, VIDEO_EXTENSIONS, _TARS)
    )
    kinds = [some[0] for some in (pictures, clips, shards) if some]
    advice = "Name the files themselves, or move one kind into a folder of its own."
    require(len(kinds) < 2, f"folder {path} to hold one kind of input", *kinds, advice=advice)
    if pictures:
        return [_frame_folder(path)]
    if shards:
        return [video for name in shards for video in _shard(path / name)]
    # Masks beside videos are named so for the converter.
    folders = [
        name for name in names if (path / name).is_dir() and not is_mask_folder(name) and list_frames(path / name)
    ]
    got = ", ".join(names[:5]) or "nothing"
    require(bool(clips or folders), f"folder {path} to hold videos, as {_KINDS}", got)
    chosen = sorted([*clips, *folders], key=natural_key)
    return [_video_file(path / name) if name in clips else _frame_folder(path / name) for name in chosen]


def _video_file(path: Path) -> InputVideo:
    where = f"video {path}"
    facts = inspect_video(path, where)
    next(read_frames(path, None, range(1), None, where))
    frames = partial(read_frames, path, None, None, None, where)
    return InputVideo(path.stem, str(path), frames, facts.rate)


def _frame_folder(path: Path) -> InputVideo:
    names, key = list_frames(path), path.name or path.resolve().name
    return InputVideo(key, str(path), partial(read_frames, path, names, None, None, f"video {path}"))


def _shard(path: Path) -> list[InputVideo]:
    entry = load_shards([str(path)], save=False)[0]
    if not entry.samples:
        raise ShardError(f"Expected shard {path} to hold videos, but it is empty. Build it again.")

    def video(sample: SampleEntry) -> InputVideo:
        frames = partial(_shard_frames, str(path), entry, sample)
        return InputVideo(sample.key, f"{path}, key {sample.key}", frames)

    return [video(sample) for sample in entry.samples]


def _shard_frames(path: str, shard: ShardEntry, sample: SampleEntry) -> Iterator[NDArray[np.uint8]]:
    reader = ShardReader()
    try:
        yield from eval_sample(reader.sample(path, shard, sample), SampleRules())["video"].numpy()
    finally:
        reader.close()
