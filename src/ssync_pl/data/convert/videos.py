"""`ssync-pl data convert videos`: a user's own videos, with masks where there are any."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.convert.media import VIDEO_EXTENSIONS, Timeline, read_frames, read_timeline, select_frames
from ssync_pl.data.convert.options import add_common, add_resize, check_common, encode_video, print_report, require
from ssync_pl.data.convert.pictures import (
    PICTURE_EXTENSIONS,
    check_bytes,
    is_mask_folder,
    list_frames,
    list_pictures,
    natural_key,
    pair_masks,
    read_ids,
    resize_ids,
    stack_frames,
)
from ssync_pl.data.convert.writer import Item, convert
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["Folder", "VideosDecode", "add_parser", "scan_folder"]

_ARRAYS = (".masks.npy", ".masks.npz")
_MP4_FPS = 12


@dataclass(frozen=True)
class VideosDecode:
    """Make the members of one sample: a whole video, or a part of one.

    `video.npy` (F, h, w, 3) uint8; where there are masks `segmentations.npy.gz` (F, h, w, 1) uint8 ids, numbered from
    1 on in the order of the source's ids, or (F, h, w, N) channels of 0 and 1; `info.json`.
    """

    root: Path
    fps: Fraction | None = None  # frames per second to choose; None keeps all
    frames_fps: Fraction | None = None  # of folders of pictures
    max_frames: int | None = None
    size: int | tuple[int, int] | None = None  # short side, or height and width
    resample: str = "bicubic"
    video_format: str = "npy"

    def __call__(self, item: Item) -> dict[str, Any]:
        """Read, choose and resize; `ShardError` names what is damaged or does not fit."""
        source = item.source
        path = self.root / source["video"]
        where = f"video {path}"
        if "error" in source:
            raise ShardError(source["error"])
        total, rate, wanted, stamp = (source.get(name) for name in ("total", "rate", "frames", "stamp"))
        if wanted is None:
            timeline = self.timeline(source)
            total, rate = timeline.frames, None if timeline.rate is None else float(timeline.rate)
            chosen = self.choose(timeline, where)
            wanted = None if self.fps is None and self.max_frames is None else chosen
        frames = read_frames(path, source["names"], wanted, stamp, where)
        video, original = stack_frames(frames, self.size, self.resample, where)
        if wanted is None and len(video) < (total or 0):
            raise _not_whole(where, f"only {len(video)} of its {total} frames can be decoded", len(video))
        # Only a reading of the whole counts what is really there.
        total = len(video) if wanted is None else total
        numbers = list(range(len(video))) if wanted is None else list(wanted)
        fps = rate if self.fps is None else float(self.fps)
        members = encode_video(video, self.video_format, where, fps=max(1, round(fps or _MP4_FPS)))
        info = {
            "video": source["video"],
            "frames": numbers,
            "source_frames": total,
            "fps": fps,
            "original_size": list(original),
        }
        if source["masks"] is not None:
            members["segmentations.npy.gz"], info["object_ids"] = self._masks(
                source, numbers, total, original, video.shape[1:3], where
            )
        return {**members, "info.json": info}

    def timeline(self, source: dict[str, Any]) -> Timeline:
        """Find when the frames of a video are shown."""
        path = self.root / source["video"]
        return read_timeline(path, source["names"], self.frames_fps, f"video {path}")

    def choose(self, timeline: Timeline, where: str) -> list[int]:
        """Number the frames that are taken of a video, by `fps` and `max_frames`."""
        chosen = list(range(timeline.frames)) if self.fps is None else select_frames(timeline, self.fps, where)
        if timeline.missing is not None and (self.max_frames is None or len(chosen) < self.max_frames):
            raise _not_whole(where, timeline.missing, len(chosen))
        return chosen[: self.max_frames]

    def _masks(
        self,
        source: dict[str, Any],
        numbers: list[int],
        total: int,
        original: tuple[int, int],
        size: tuple[int, ...],
        where: str,
    ) -> tuple[np.ndarray, list[int]]:
        path, names = self.root / source["masks"]["path"], source["masks"]["names"]
        if names is not None:
            names = pair_masks(source["names"], names, where, path)
        array = None if names is not None else _load_masks(path, where)
        count = len(names if names is not None else array)  # type: ignore[arg-type]
        if count != total:
            raise ShardError(
                f"Expected as many masks as frames for {where}, but got {count} masks in {path} and {total} frames. "
                "Export both from the same frames."
            )
        stack: list[np.ndarray] = []
        for number in numbers:
            mask = array[number] if array is not None else read_ids(path / names[number], where, original)[..., None]
            if mask.shape[:2] != original or (mask.dtype != np.bool_ and mask.min() < 0):
                raise ShardError(
                    f"Expected the masks of {where} to hold ids from 0 on and to be {original[0]} x {original[1]} "
                    f"(height x width) like its frames, but mask {number} of {path} is {mask.shape[0]} x "
                    f"{mask.shape[1]} and its least id is {mask.min()}. Export them at the video's size."
                )
            stack.append(resize_ids(np.asarray(mask), (size[0], size[1])))
            check_bytes(len(stack) * stack[-1].nbytes, len(stack), where)
        ids = np.stack(stack)
        if ids.shape[-1] > 1:
            return (ids != 0).astype(np.uint8), list(range(ids.shape[-1]))
        # Numbered from 1 on: masks of 0 and 255, say, show one object, not 255.
        found = [int(number) for number in np.unique(ids) if number]
        if len(found) > 255:
            raise ShardError(
                f"Expected at most 255 objects in the masks of {where}, but got {len(found)}. The masks may be "
                "pictures with smooth shades instead of ids: export them without anti-aliasing and as PNG."
            )
        return np.searchsorted(np.array([0, *found]), ids.astype(np.int64)).astype(np.uint8), found


def _load_masks(path: Path, where: str) -> np.ndarray:
    """Open an array file as (F, h, w, N); elements of `.npy` stay on the disk."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.lib.npyio.NpzFile):
            keys = [key for key in ("segmentations", "masks") if key in array] or list(array)
            if len(keys) != 1:
                raise ValueError(f"it holds the arrays {', '.join(keys) or 'none'}, not one called `masks`")
            array = array[keys[0]]
        array = array[..., None] if array.ndim == 3 else array
        if array.ndim != 4 or array.dtype.kind not in "uib" or array.shape[-1] < 1:
            raise ValueError(f"it holds {array.dtype} {array.shape}")
    except Exception as error:  # NumPy raises almost anything on damaged files
        raise ShardError(
            f"Expected masks {path} of {where} to be integers (frames, height, width) of ids, or (frames, height, "
            f"width, objects), but reading it failed ({error}). Save them with numpy.save."
        ) from error
    return array


@dataclass(frozen=True)
class Folder:
    """What a folder of videos holds.

    Attributes:
        videos: JSON values of each video, in natural order: `video` (name below the root), `names` (of its frames; null
            for a file), `bytes` (of a file), `masks` (null, or `path`, `names` and `bytes`).
        ignored: Reason → names of what is no video.
    """

    videos: list[dict[str, Any]]
    ignored: dict[str, list[str]] = field(default_factory=dict)


def scan_folder(root: Path) -> Folder:
    """Sort the entries of a folder into videos, their masks, and the rest.

    Raises:
        ConfigError: There is no video, or masks cannot be told from frames or to belong to one video.
    """
    if not root.is_dir():
        raise ConfigError(
            f"Expected --root to be a folder of videos, but {root} is none. Name the folder that holds the video "
            "files, or one sub-folder of frames per video."
        )
    ignored: dict[str, list[str]] = {}
    videos: dict[str, dict[str, Any]] = {}
    masks: dict[str, list[dict[str, Any]]] = {}
    entries = sorted(root.iterdir(), key=lambda path: natural_key(path.name))
    for path in [*entries, *(inner for name in ("masks", "mask") for inner in _inside(root / name))]:
        name = str(path.relative_to(root))
        inner = path.parent != root
        if path.name.startswith("."):
            ignored.setdefault("hidden", []).append(name)
        elif not path.exists():
            ignored.setdefault("dangling links", []).append(name)
        elif path.is_dir() and (inner or is_mask_folder(name)):
            if inner or name not in ("masks", "mask"):
                found = {"path": name, "names": list_pictures(path, (".png", ".bmp")), "bytes": None}
                masks.setdefault(path.name if inner else name.rpartition("_")[0], []).append(found)
        elif inner:
            ignored.setdefault("no masks", []).append(name)
        elif path.is_dir():
            frames = list_frames(path)
            if frames:
                videos[name] = {"video": name, "names": frames, "bytes": None}
            else:
                ignored.setdefault("folders without frames", []).append(name)
        elif name.lower().endswith(_ARRAYS):
            one = {"path": name, "names": None, "bytes": path.stat().st_size}
            masks.setdefault(name[: -len(_ARRAYS[0])], []).append(one)
        elif path.suffix.lower() in VIDEO_EXTENSIONS:
            videos[name] = {"video": name, "names": None, "bytes": path.stat().st_size}
        else:
            ignored.setdefault("no media", []).append(name)
    if not videos:
        got = ", ".join(f"{len(names)} {reason} ({names[0]}, …)" for reason, names in ignored.items()) or "nothing"
        raise ConfigError(
            f"Expected videos ({', '.join(VIDEO_EXTENSIONS)}) or sub-folders of frames "
            f"({', '.join(PICTURE_EXTENSIONS)}) in {root}, but got {got}. Name the folder that holds the videos "
            "themselves, with the frames of each in a sub-folder of its own."
        )
    _match(root, videos, masks)
    return Folder([videos[name] for name in sorted(videos, key=natural_key)], ignored)


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: natural_key(path.name)) if folder.is_dir() else []


def _match(root: Path, videos: dict[str, dict[str, Any]], masks: dict[str, list[dict[str, Any]]]) -> None:
    by_stem: dict[str, list[str]] = {}
    for name, video in videos.items():
        by_stem.setdefault(name if video["names"] is not None else Path(name).stem, []).append(name)
        video["masks"] = None
    for stem, found in masks.items():
        owners = by_stem.get(stem, [])
        if len(owners) != 1 or len(found) != 1:
            got = f"the videos {', '.join(owners)}" if owners else "no such video"
            raise ConfigError(
                f"Expected one video called {stem!r} for the masks in one place, but got {got} and the masks "
                f"{', '.join(one['path'] for one in found)} in {root}. Rename or move the masks or the videos."
            )
        videos[owners[0]]["masks"] = found[0]


def _plan(folder: Folder, decode: VideosDecode, options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Cut videos into sources of samples; also return how many frames were left out at the ends."""
    if options.clip_frames is None and options.clip_seconds is None:
        return list(folder.videos), 0
    samples, dropped = [], 0
    for source in folder.videos:
        where = f"video {decode.root / source['video']}"
        try:
            timeline = decode.timeline(source)
            chosen = decode.choose(timeline, where)
        except ShardError as error:
            samples.append({**source, "error": str(error)})  # the worker raises it or skips the video, as the user asks
            continue
        rate = decode.fps or timeline.rate
        if options.clip_frames is None and rate is None:
            raise ConfigError(
                f"Expected a frame rate for {where}, to cut clips by --clip-seconds, but nothing says it. Give it with "
                "--frames-fps, or cut by --clip-frames."
            )
        length = options.clip_frames or max(1, round(float(rate or 0) * options.clip_seconds))
        parts = [chosen[start : start + length] for start in range(0, len(chosen), length)] or [[]]
        # A video shorter than one sample is always kept.
        if len(parts) > 1 and len(parts[-1]) < length and options.rest == "drop":
            dropped += len(parts.pop())
        for part in parts:
            stamp = timeline.stamps[part[0]] if timeline.stamps and part else None
            average = None if timeline.rate is None else float(timeline.rate)
            samples.append({**source, "frames": part, "stamp": stamp, "total": timeline.frames, "rate": average})
    return samples, dropped


def add_parser(commands: Any) -> None:
    """Add `videos` to the commands of `ssync-pl data convert`."""
    text = (
        "Convert own videos: each mp4, avi, mov, mkv, webm or gif file of --root is a video, and so is each sub-folder "
        "of frames (jpg, png, bmp). Masks of a video called NAME are found in NAME_masks/*.png, masks/NAME/*.png (grey "
        "or palette pictures of ids, named after their frames), NAME.masks.npy or NAME.masks.npz, one per frame."
    )
    parser = commands.add_parser("videos", help="own videos, files or folders of frames", description=text)
    parser.add_argument("--root", required=True, type=Path, help="folder of the videos")
    parser.add_argument("--prefix", default="videos", help="start of the shards' names (default: videos)")
    parser.add_argument("--split-name", help="added to the prefix, e.g. train for videos-train-000000.tar")
    parser.add_argument(
        "--fps", type=_rate, metavar="RATE", help="take this many frames per second, e.g. 12 or 30000/1001"
    )
    parser.add_argument("--frames-fps", type=_rate, metavar="RATE", help="frames per second of sub-folders of frames")
    add_resize(parser, default=None)
    parser.add_argument("--size", type=_size, metavar="HxW", help="resize to this size, whatever the proportions")
    parser.add_argument("--max-frames", type=int, help="take the first frames of each video only")
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument(
        "--clip-frames", type=int, help="cut each video into samples of this many frames; shorter ones are kept whole"
    )
    cut.add_argument("--clip-seconds", type=float, help="cut each video into samples of this duration")
    parser.add_argument(
        "--rest",
        choices=("drop", "keep"),
        default="drop",
        help="what becomes of the frames after a video's last whole clip (default: drop)",
    )
    add_common(parser)
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    settings = check_common(options)
    if options.size is not None and options.short_side is not None:
        raise ConfigError("Expected one of --size and --short-side, but got both. Leave one out.")
    for name in ("max_frames", "clip_frames", "clip_seconds"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"Expected --{name.replace('_', '-')} to be above 0, but got {value}.")
    folder = scan_folder(options.root)
    if any(video["names"] is None and not video["video"].lower().endswith(".gif") for video in folder.videos):
        require("video", "av")
    decode = VideosDecode(
        options.root,
        options.fps,
        options.frames_fps,
        options.max_frames,
        options.size or options.short_side,
        options.resample,
        options.video_format,
    )
    samples, dropped = _plan(folder, decode, options)
    names = ("fps", "frames_fps", "max_frames", "short_side", "size", "resample", "clip_frames", "clip_seconds", "rest")
    recipe = {name: getattr(options, name) for name in (*names, "video_format")}
    recipe.update(format="videos", **{name: str(recipe[name]) for name in names[:2] if recipe[name] is not None})
    prefix = options.prefix if options.split_name is None else f"{options.prefix}-{options.split_name}"
    items = [Item(f"{number:06d}", sample) for number, sample in enumerate(samples)]
    print_report(convert(items, decode, options.out, prefix, recipe=recipe, **settings))
    masked = sum(video["masks"] is not None for video in folder.videos)
    lines = [f"  masks: {masked} of {len(folder.videos)} videos have some"]
    if dropped:
        lines.append(f"  left out {dropped} frames after the last whole clips (--rest keep keeps them)")
    lines.extend(
        f"  ignored {len(names)} ({reason}): {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for reason, names in folder.ignored.items()
    )
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(
            f"expected frames per second, such as 12 or 30000/1001, got {text!r}"
        ) from error
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"expected frames per second above 0 and up to 1000, got {text!r}")
    return rate


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,4})(?:x([0-9]{1,4}))?", text.lower())
    if not found or not int(found[1]) or not int(found[2] or found[1]):
        raise argparse.ArgumentTypeError(f"expected height x width, such as 128 or 240x320, but got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def _not_whole(where: str, got: str, frames: int) -> ShardError:
    start = f", or take its start with --max-frames {frames}" if frames else ""
    return ShardError(f"Expected {where} to be whole, but {got}. Copy or encode it again{start}.")
