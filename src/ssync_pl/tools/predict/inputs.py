"""Videos that `ssync-pl predict --input` names: files, folders of frames, folders of videos, shards."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssync_pl.data.convert.media import (
    PICTURE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    inspect_video,
    is_mask_folder,
    list_frames,
    natural_key,
    read_frames,
)
from ssync_pl.data.index import SampleEntry, ShardEntry, load_shards
from ssync_pl.data.patterns import expand_braces, is_remote
from ssync_pl.data.samples import SampleRules, eval_sample
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["InputVideo", "find_videos"]

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_ORIENTATION = 0x0112  # the EXIF tag; from 5 on width and height change places
_KINDS = (
    f"a video file ({', '.join(VIDEO_EXTENSIONS)}), a folder of frames ({', '.join(PICTURE_EXTENSIONS)}), a folder of "
    "videos, or shards (.tar)"
)


@dataclass(frozen=True)
class InputVideo:
    """A video of the user's.

    Attributes:
        key: Its name.
        source: Where it comes from, for messages and the index.
        frames: Decodes one frame after the other, uint8 (H, W, 3).
        total: Number of frames; None where nothing says it.
        rate: Frames per second; None where nothing says it.
    """

    key: str
    source: str
    frames: Callable[[], Iterator[NDArray[np.uint8]]]
    total: int | None
    rate: float | None = None


def find_videos(inputs: Sequence[str]) -> list[InputVideo]:
    """Finds the videos that some inputs name, and looks into each.

    Args:
        inputs: Paths of video files, folders of frames, folders of such videos, or shards; braces (`{0..9}`) and globs
            (`*`) are expanded.

    Returns:
        The videos, in the order of the inputs, those of a folder in natural order.

    Raises:
        ConfigError: An input does not exist, or is none of these.
        ShardError: A video cannot be read, is empty, or its frames differ in size.
    """
    videos = [video for text in inputs for path in _expand(text) for video in _look_into(path)]
    if not videos:
        raise ConfigError(f"Expected --input to name at least one video, but got {list(inputs)}.")
    return videos


def _expand(text: str) -> list[Path]:
    if os.path.exists(os.path.expanduser(text)):  # names may hold brackets and colons
        return [Path(text).expanduser()]
    if is_remote(text):
        raise ConfigError(
            f"Expected --input to be on this machine, but got {text!r}. Download it, or read remote shards through "
            "--data.predict."
        )
    found: list[Path] = []
    for pattern in expand_braces(text, "input"):
        pattern = os.path.expanduser(pattern)
        matches = sorted(glob.glob(pattern), key=natural_key) if glob.has_magic(pattern) else [pattern]
        if not matches:
            raise ConfigError(f"Expected --input to match something, but {text!r} matches nothing. Check the path.")
        found += [Path(match) for match in matches]
    return found


def _look_into(path: Path) -> list[InputVideo]:
    if not path.exists():
        raise ConfigError(f"Expected --input to be there, but {path} does not exist. Check the path.")
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() in VIDEO_EXTENSIONS:
        return [_video_file(path)]
    if path.name.lower().endswith(_TARS):
        return _shard(path)
    hint = " Name the folder that holds the frames." if path.suffix.lower() in PICTURE_EXTENSIONS else ""
    raise ConfigError(f"Expected --input to be {_KINDS}, but {path} is none of them.{hint}")


def _folder(path: Path) -> list[InputVideo]:
    names = sorted((item.name for item in path.iterdir() if item.name[0] != "."), key=natural_key)
    kinds = {"frames": PICTURE_EXTENSIONS, "video files": VIDEO_EXTENSIONS, "shards": _TARS}
    found = {
        kind: [name for name in names if name.lower().endswith(endings) and (path / name).is_file()]
        for kind, endings in kinds.items()
    }
    told = [f"{len(some)} {kind} ({some[0]}, …)" for kind, some in found.items() if some]
    if len(told) > 1:
        raise ConfigError(
            f"Expected folder {path} to hold one kind of input, but got {' and '.join(told)}. Name the files "
            "themselves, or move one kind into a folder of its own."
        )
    if found["frames"]:
        return [_frame_folder(path, list_frames(path))]
    if found["shards"]:
        return [video for name in found["shards"] for video in _shard(path / name)]
    # Masks beside videos are named so for the converter.
    folders = {name: list_frames(path / name) for name in names if (path / name).is_dir() and not is_mask_folder(name)}
    videos = {name: _video_file(path / name) for name in found["video files"]}
    videos |= {name: _frame_folder(path / name, inner) for name, inner in folders.items() if inner}
    if not videos:
        got = ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "nothing"
        raise ConfigError(f"Expected folder {path} to hold videos, as {_KINDS}, but got {got}.")
    return [videos[name] for name in sorted(videos, key=natural_key)]


def _video_file(path: Path) -> InputVideo:
    where = f"video {path}"
    try:
        facts = inspect_video(path, where)
        if facts.frames:
            next(read_frames(path, None, range(1), None, where))
    except ShardError as error:  # whose advice is the converter's
        empty = not path.stat().st_size
        reason = "an empty file" if empty else str(error.__cause__ or error).splitlines()[0]
        raise ShardError(
            f"Expected --input to be a video that can be read, but {path} cannot ({reason}). Copy or encode it again."
        ) from error
    if facts.missing is not None or not facts.frames:
        got = facts.missing or "it has no frames"
        raise ShardError(f"Expected {where} to be whole, but {got}. Copy or encode it again.")
    frames = partial(read_frames, path, None, None, None, where)
    return InputVideo(path.stem, str(path), frames, facts.frames, facts.rate)


def _frame_folder(path: Path, names: list[str]) -> InputVideo:
    where = f"video {path}"
    sizes = {}
    for name in names:  # before the prediction begins, from the headers alone
        try:
            with Image.open(path / name) as picture:
                turned = picture.getexif().get(_ORIENTATION, 1) >= 5
                sizes[name] = picture.size if turned else picture.size[::-1]
        except Exception as error:  # Pillow raises almost anything on damaged files
            raise ShardError(
                f"Expected {path / name} to be a picture, but reading it failed ({error}). Export it again, or take "
                "it out of the folder."
            ) from error
        if sizes[name] != sizes[names[0]]:
            raise ShardError(
                f"Expected all frames of {path} to have one size, but {names[0]} has {sizes[names[0]]} and {name} has "
                f"{sizes[name]} (height, width). Resize the frames, or split the folder."
            )
    key = path.name or path.resolve().name
    return InputVideo(key, str(path), partial(read_frames, path, names, None, None, where), len(names))


def _shard(path: Path) -> list[InputVideo]:
    entry = load_shards([str(path)], save=False)[0]
    if not entry.samples:
        raise ShardError(f"Expected shard {path} to hold videos, but it is empty. Build it again.")
    return [
        InputVideo(
            sample.key, f"{path}, key {sample.key}", partial(_shard_frames, str(path), entry, sample), sample.frames
        )
        for sample in entry.samples
    ]


def _shard_frames(path: str, shard: ShardEntry, sample: SampleEntry) -> Iterator[NDArray[np.uint8]]:
    reader = ShardReader()
    try:
        yield from eval_sample(reader.sample(path, shard, sample), SampleRules())["video"].numpy()
    finally:
        reader.close()
