"""What `--input` names: video files, folders of frames, folders of videos, shards. Checked before anything runs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssync_pl.data.convert.media import VIDEO_EXTENSIONS, read_frames, read_timeline
from ssync_pl.data.convert.pictures import PICTURE_EXTENSIONS, is_mask_folder, list_frames, natural_key
from ssync_pl.data.index import SampleEntry, ShardEntry, load_shards
from ssync_pl.data.patterns import expand_braces, is_remote
from ssync_pl.data.samples import SampleRules, eval_sample
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["FileVideo", "InputVideo", "ShardVideo", "find_videos"]

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_ORIENTATION = 0x0112  # the EXIF tag; from 5 on width and height change places


@dataclass(frozen=True)
class FileVideo:
    """A video file, or a folder of frames.

    Args:
        key: Its name.
        path: The file or folder.
        names: Frames in the folder, in order; None for a file.
        total: Number of frames by the file's own account.
        rate: Frames a second; None for a folder.

    Example:
        >>> FileVideo("a", Path("a"), ("0.png",), 1, None).source
        'a'
    """

    key: str
    path: Path
    names: tuple[str, ...] | None
    total: int | None
    rate: float | None

    @property
    def source(self) -> str:
        """Where the video comes from."""
        return str(self.path)

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Decode one frame after the other.

        Yields:
            uint8 (H, W, 3) each.

        Raises:
            ShardError: The file is damaged.
        """
        return read_frames(self.path, self.names, None, None, f"video {self.path}")


@dataclass(frozen=True)
class ShardVideo:
    """A video in a shard.

    Args:
        key: Its key.
        path: The shard.
        shard: The shard's index entry.
        sample: The video's entry.

    Example:
        >>> ShardVideo("7", "a.tar", ShardEntry("a.tar", 0, ()), SampleEntry("7", {})).source
        'a.tar, key 7'
    """

    key: str
    path: str
    shard: ShardEntry
    sample: SampleEntry
    rate: float | None = None

    @property
    def source(self) -> str:
        """Where the video comes from."""
        return f"{self.path}, key {self.key}"

    @property
    def total(self) -> int | None:
        """Number of frames, where the index says it."""
        return self.sample.frames

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Read the video.

        Yields:
            uint8 (H, W, 3) each.

        Raises:
            ShardError: The sample is damaged, or holds no video.
        """
        reader = ShardReader()
        try:
            sample = eval_sample(reader.sample(self.path, self.shard, self.sample), SampleRules())
            yield from sample["video"].numpy()
        finally:
            reader.close()


InputVideo = FileVideo | ShardVideo


def find_videos(inputs: Sequence[str]) -> list[InputVideo]:
    """Find the videos that some inputs name, and look into each.

    Args:
        inputs: Paths of video files (mp4, avi, mov, mkv, webm, gif), folders of frames (png, jpg, bmp), folders of such
            videos, shards (tar); braces (`{0..9}`) and globs (`*`) are expanded.

    Returns:
        The videos, in the order of the inputs, those of a folder in natural order.

    Raises:
        ConfigError: An input does not exist, or is none of these.
        ShardError: A video cannot be read, is empty, or its frames differ in size.

    Example:
        >>> find_videos(["/nowhere/a.mp4"])
        Traceback (most recent call last):
        ssync_pl.errors.ConfigError: Expected --input to be there, but /nowhere/a.mp4 does not exist. Check the path.
    """
    videos: list[InputVideo] = []
    for text in inputs:
        for path in _expand(text):
            videos += _look_into(path)
    if not videos:
        raise ConfigError(f"Expected --input to name at least one video, but got {list(inputs)}.")
    return videos


def _expand(text: str) -> list[Path]:
    if is_remote(text):
        raise ConfigError(
            f"Expected --input to be on this machine, but got {text!r}. Download it, or read remote shards through "
            "--data.predict."
        )
    if os.path.exists(os.path.expanduser(text)):  # names may hold brackets
        return [Path(text).expanduser()]
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
        return [_file(path)]
    if path.name.lower().endswith(_TARS):
        return _shard(path)
    if path.suffix.lower() in PICTURE_EXTENSIONS:
        raise ConfigError(
            f"Expected --input to be a video, but {path} is one picture. Name the folder that holds the frames."
        )
    raise ConfigError(
        f"Expected --input to be a video file ({', '.join(VIDEO_EXTENSIONS)}), a folder of frames "
        f"({', '.join(PICTURE_EXTENSIONS)}), a folder of videos, or shards (.tar), but {path} is none of them."
    )


def _folder(path: Path) -> list[InputVideo]:
    names = sorted((item.name for item in path.iterdir() if not item.name.startswith(".")), key=natural_key)
    frames = [name for name in names if _is(path / name, PICTURE_EXTENSIONS)]
    files = [name for name in names if _is(path / name, VIDEO_EXTENSIONS)]
    shards = [name for name in names if _is(path / name, _TARS)]
    kinds = {"frames": frames, "video files": files, "shards": shards}
    found = [f"{len(some)} {kind} ({some[0]}, …)" for kind, some in kinds.items() if some]
    if len(found) > 1:
        raise ConfigError(
            f"Expected folder {path} to hold one kind of input, but got {' and '.join(found)}. Name the files "
            "themselves, or move one kind into a folder of its own."
        )
    if frames:
        return [_frames(path, list_frames(path))]
    if shards:
        return [video for name in shards for video in _shard(path / name)]
    # Masks beside videos are named so for the converter.
    folders = {name: list_frames(path / name) for name in names if (path / name).is_dir() and not is_mask_folder(name)}
    videos: list[tuple[str, InputVideo]] = [(name, _file(path / name)) for name in files]
    videos += [(name, _frames(path / name, inner)) for name, inner in folders.items() if inner]
    if not videos:
        raise ConfigError(
            f"Expected folder {path} to hold frames ({', '.join(PICTURE_EXTENSIONS)}), video files "
            f"({', '.join(VIDEO_EXTENSIONS)}), sub-folders of frames, or shards (.tar), but got "
            f"{', '.join(names[:5]) + (', …' if len(names) > 5 else '') if names else 'nothing'}."
        )
    return [video for _, video in sorted(videos, key=lambda pair: natural_key(pair[0]))]


def _is(path: Path, endings: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(endings) and not path.name.startswith(".") and path.is_file()


def _file(path: Path) -> FileVideo:
    where = f"video {path}"
    try:
        timeline = read_timeline(path, None, None, where)
        if timeline.frames:
            next(read_frames(path, None, [0], None, where))
    except ShardError as error:  # whose advice is the converter's
        empty = not path.stat().st_size
        reason = "an empty file" if empty else str(error.__cause__ or error).splitlines()[0]
        raise ShardError(
            f"Expected --input to be a video that can be read, but {path} cannot ({reason}). Copy or encode it again."
        ) from error
    if timeline.missing is not None:
        raise ShardError(f"Expected {where} to be whole, but {timeline.missing}. Copy or encode it again.")
    if not timeline.frames:
        raise ShardError(f"Expected {where} to have frames, but it has none. Encode it again.")
    rate = None if timeline.rate is None else float(timeline.rate)
    return FileVideo(path.stem, path, None, timeline.frames, rate)


def _frames(path: Path, names: list[str]) -> FileVideo:
    first: tuple[int, int] | None = None
    for name in names:
        try:
            with Image.open(path / name) as picture:  # reads the header only
                turned = picture.getexif().get(_ORIENTATION, 1) >= 5
                size = picture.size[::-1] if not turned else picture.size
        except Exception as error:  # Pillow raises almost anything on damaged files
            raise ShardError(
                f"Expected {path / name} to be a picture, but reading it failed ({error}). Export it again, or take "
                "it out of the folder."
            ) from error
        first = first or (size[0], size[1])
        if size != first:
            raise ShardError(
                f"Expected all frames of {path} to have one size, but {names[0]} has {first[0]} x {first[1]} and "
                f"{name} has {size[0]} x {size[1]} (height x width). Resize the frames, or split the folder."
            )
    return FileVideo(path.name or path.resolve().name, path, tuple(names), len(names), None)


def _shard(path: Path) -> list[InputVideo]:
    entry = load_shards([str(path)], save=False)[0]
    if not entry.samples:
        raise ShardError(f"Expected shard {path} to hold videos, but it is empty. Build it again.")
    return [ShardVideo(sample.key, str(path), entry, sample) for sample in entry.samples]
