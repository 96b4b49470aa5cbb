"""`ssync-pl data convert videos`: a user's own videos, with masks where there are any."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssync_pl.data.convert.media import Timeline, read_frames, read_timeline, select_frames
from ssync_pl.data.convert.pictures import Resample, resize_frame, resize_ids, short_side_size
from ssync_pl.data.convert.sizes import add_resize, check_short_side
from ssync_pl.data.convert.video_sources import Folder, Masks, scan_folder
from ssync_pl.errors import ConfigError, ShardError

if TYPE_CHECKING:
    from ssync_pl.data.convert.engine import Item

__all__ = ["VideosDecode", "add_parser", "plan_samples"]

_MAX_BYTES = 1 << 32  # arrays of one sample; a tar member ends at 8 GiB, and a worker has to hold it
_MP4_FPS = 12


@dataclass(frozen=True)
class VideosDecode:
    """Make the members of one sample: a whole video, or a part of one.

    `video.npy` (F, h, w, 3) uint8; where there are masks `segmentations.npy.gz` (F, h, w, 1) uint8 ids, numbered from
    1 on in the order of the source's ids, or (F, h, w, N) channels of 0 and 1; `info.json`.

    Args:
        root: Folder of the videos.
        fps: Frames a second to choose; None keeps all.
        frames_fps: Frames a second of folders of pictures.
        max_frames: Frames taken from the start of a video; None for all.
        short_side: Pixels of the shorter side; None keeps the size.
        size: Height and width, whatever the proportions; None keeps them.
        resample: How frames are resized; masks always go to the nearest pixel.
        video_format: `npy` or `mp4`.

    Example:
        >>> VideosDecode(Path("videos"), fps=Fraction(12)).output_size((480, 640))
        (480, 640)
    """

    root: Path
    fps: Fraction | None = None
    frames_fps: Fraction | None = None
    max_frames: int | None = None
    short_side: int | None = None
    size: tuple[int, int] | None = None
    resample: Resample = "bicubic"
    video_format: str = "npy"

    def __call__(self, item: Item) -> dict[str, Any]:
        """Read, choose and resize, frame by frame.

        Args:
            item: `source` is an entry of `plan_samples`.

        Returns:
            Members of the sample.

        Raises:
            ShardError: The video or its masks are damaged, do not fit each other, or take too much memory.
        """
        from ssync_pl.data.convert.options import encode_video

        source = item.source
        where = f"video {self.root / source['video']}"
        if "error" in source:
            raise ShardError(source["error"])
        total, rate, wanted, stamp = source.get("total"), source.get("rate"), source.get("frames"), source.get("stamp")
        if wanted is None:
            timeline = self.timeline(source)
            total, rate = timeline.frames, None if timeline.rate is None else float(timeline.rate)
            chosen = self.choose(timeline, where)
            wanted = None if self.fps is None and self.max_frames is None else chosen
        video = self._read(source, wanted, stamp, where)
        if wanted is None and len(video) < (total or 0):
            raise _not_whole(where, f"only {len(video)} of its {total} frames can be decoded", len(video))
        # Only a reading of the whole counts what is really there.
        total = len(video) if wanted is None else total
        numbers = list(range(len(video))) if wanted is None else list(wanted)
        fps = rate if self.fps is None else float(self.fps)
        members = encode_video(video.array, self.video_format, where, fps=max(1, round(fps or _MP4_FPS)))
        info = {
            "video": source["video"],
            "frames": numbers,
            "source_frames": total,
            "fps": fps,
            "original_size": list(video.original),
        }
        if source["masks"] is not None:
            masks, ids = self._masks(Masks(self.root, source["masks"], where), numbers, total, video.original, where)
            members["segmentations.npy.gz"] = masks
            info["object_ids"] = ids
        return {**members, "info.json": info}

    def timeline(self, source: dict[str, Any]) -> Timeline:
        """Find when the frames of a video are shown.

        Args:
            source: An entry of `Folder.videos`.

        Returns:
            The timeline.
        """
        path = self.root / source["video"]
        return read_timeline(path, source["names"], self.frames_fps, f"video {path}")

    def choose(self, timeline: Timeline, where: str) -> list[int]:
        """Number the frames that are taken of a video, by `fps` and `max_frames`.

        Args:
            timeline: The video's.
            where: The video, for messages.

        Returns:
            Frame numbers, in order.

        Raises:
            ShardError: The file is cut off before its end, and `max_frames` does not stop before that.
        """
        chosen = list(range(timeline.frames)) if self.fps is None else select_frames(timeline, self.fps, where)
        if timeline.missing is not None and (self.max_frames is None or len(chosen) < self.max_frames):
            raise _not_whole(where, timeline.missing, len(chosen))
        return chosen[: self.max_frames]

    def output_size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the sample.

        Args:
            stored: Height and width of the source.

        Returns:
            Those after resizing.
        """
        return self.size or short_side_size(stored, self.short_side)

    def _read(self, source: dict[str, Any], wanted: list[int] | None, stamp: int | None, where: str) -> _Video:
        frames, original, size = [], (0, 0), (0, 0)
        for frame in read_frames(self.root / source["video"], source["names"], wanted, stamp, where):
            original = (frame.shape[0], frame.shape[1])
            size = self.output_size(original)
            frames.append(resize_frame(frame, size, self.resample))
            _check_bytes((len(frames), *size, 3), where)
        return _Video(np.stack(frames), original)

    def _masks(
        self, masks: Masks, numbers: list[int], total: int | None, original: tuple[int, int], where: str
    ) -> tuple[np.ndarray, list[int]]:
        loaded = masks.load()
        count = len(masks.names or ()) if loaded is None else len(loaded)
        if count != total:
            raise ShardError(
                f"Expected as many masks as frames for {where}, but got {count} masks in "
                f"{self.root / masks.source['path']} and {total} frames. Export both from the same frames."
            )
        size = self.output_size(original)
        stack = []
        for number in numbers:
            mask = masks.read(number, loaded)
            if mask.shape[:2] != original:
                raise ShardError(
                    f"Expected the masks of {where} to be {original[0]} x {original[1]} (height x width) like its "
                    f"frames, but mask {number} is {mask.shape[0]} x {mask.shape[1]}. Export them at the video's size."
                )
            if mask.dtype != np.bool_ and mask.min() < 0:
                raise ShardError(
                    f"Expected ids from 0 on in the masks of {where}, but mask {number} holds {mask.min()}. Give "
                    "unlabelled pixels the background's 0."
                )
            stack.append(resize_ids(mask, size))
            _check_bytes((len(stack), *size, mask.shape[-1] * mask.itemsize), where)
        array = np.stack(stack)
        if array.shape[-1] > 1:
            return (array != 0).astype(np.uint8), list(range(array.shape[-1]))
        return _renumber(array, where)


@dataclass(frozen=True)
class _Video:
    array: np.ndarray
    original: tuple[int, int]

    def __len__(self) -> int:
        return len(self.array)


def plan_samples(
    folder: Folder, decode: VideosDecode, *, clip_frames: int | None, clip_seconds: float | None, keep_rest: bool
) -> tuple[list[dict[str, Any]], int]:
    """Cut videos into samples.

    Args:
        folder: The videos.
        decode: How frames are chosen.
        clip_frames: Frames a sample, after choosing; None takes whole videos, or goes by `clip_seconds`.
        clip_seconds: Seconds a sample.
        keep_rest: Keep what is left at the end of a video as a shorter sample. A video shorter than one sample is
            always kept.

    Returns:
        Sources of the samples, and how many frames were left out at the ends.

    Raises:
        ConfigError: A duration is asked for, and nothing says the frame rate.

    Example:
        >>> folder = Folder([{"video": "a", "names": [f"{i}.png" for i in range(5)], "bytes": None, "masks": None}])
        >>> samples, rest = plan_samples(
        ...     folder, VideosDecode(Path(".")), clip_frames=2, clip_seconds=None, keep_rest=False
        ... )
        >>> [sample["frames"] for sample in samples], rest
        ([[0, 1], [2, 3]], 1)
    """
    if clip_frames is None and clip_seconds is None:
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
        if clip_frames is None and rate is None:
            raise ConfigError(
                f"Expected a frame rate for {where}, to cut clips by --clip-seconds, but nothing says it. Give it with "
                "--frames-fps, or cut by --clip-frames."
            )
        length = clip_frames or max(1, round(float(rate or 0) * float(clip_seconds or 0)))
        parts = [chosen[start : start + length] for start in range(0, len(chosen), length)] or [[]]
        if len(parts) > 1 and len(parts[-1]) < length and not keep_rest:
            dropped += len(parts.pop())
        for part in parts:
            stamp = timeline.stamps[part[0]] if timeline.stamps and part else None
            average = None if timeline.rate is None else float(timeline.rate)
            samples.append({**source, "frames": part, "stamp": stamp, "total": timeline.frames, "rate": average})
    return samples, dropped


def add_parser(commands: Any) -> None:
    """Add `videos` to the commands of `ssync-pl data convert`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_parser(parser.add_subparsers())
        >>> parser.parse_args(["videos", "--root", "mine", "--out", "shards"]).prefix
        'videos'
    """
    from ssync_pl.data.convert.options import add_common

    text = (
        "Convert own videos: each mp4, avi, mov, mkv, webm or gif file of --root is a video, and so is each sub-folder "
        "of frames (jpg, png, bmp). Masks of a video called NAME are found in NAME_masks/*.png, masks/NAME/*.png (grey "
        "or palette pictures of ids), NAME.masks.npy or NAME.masks.npz, one a frame."
    )
    parser = commands.add_parser("videos", help="own videos, files or folders of frames", description=text)
    parser.add_argument("--root", required=True, type=Path, help="folder of the videos")
    parser.add_argument("--prefix", default="videos", help="start of the shards' names (default: videos)")
    parser.add_argument(
        "--split-name", default=None, help="added to the prefix, e.g. train for videos-train-000000.tar"
    )
    parser.add_argument(
        "--fps", type=_rate, default=None, metavar="RATE", help="take this many frames a second, e.g. 12 or 30000/1001"
    )
    parser.add_argument(
        "--frames-fps", type=_rate, default=None, metavar="RATE", help="frames a second of sub-folders of frames"
    )
    add_resize(parser, default=None)
    parser.add_argument(
        "--size", type=_size, default=None, metavar="HxW", help="resize to this size, whatever the proportions"
    )
    parser.add_argument("--max-frames", type=int, default=None, help="take the first frames of each video only")
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument(
        "--clip-frames",
        type=int,
        default=None,
        help="cut each video into samples of this many frames; shorter videos are kept whole",
    )
    cut.add_argument("--clip-seconds", type=float, default=None, help="cut each video into samples of this duration")
    parser.add_argument(
        "--rest",
        choices=("drop", "keep"),
        default="drop",
        help="what becomes of the frames after a video's last whole clip (default: drop)",
    )
    add_common(parser)
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    from ssync_pl.data.convert.engine import Item, convert
    from ssync_pl.data.convert.options import common, print_report

    settings = common(options)
    _check(options)
    folder = scan_folder(options.root)
    decode = VideosDecode(
        options.root,
        options.fps,
        options.frames_fps,
        options.max_frames,
        options.short_side,
        options.size,
        options.resample,
        options.video_format,
    )
    samples, dropped = plan_samples(
        folder,
        decode,
        clip_frames=options.clip_frames,
        clip_seconds=options.clip_seconds,
        keep_rest=options.rest == "keep",
    )
    recipe = {
        "format": "videos",
        "fps": None if options.fps is None else str(options.fps),
        "frames_fps": None if options.frames_fps is None else str(options.frames_fps),
        "max_frames": options.max_frames,
        "short_side": options.short_side,
        "size": options.size,
        "resample": options.resample,
        "clip_frames": options.clip_frames,
        "clip_seconds": options.clip_seconds,
        "rest": options.rest,
        "video_format": options.video_format,
    }
    prefix = options.prefix if options.split_name is None else f"{options.prefix}-{options.split_name}"
    items = [Item(f"{number:06d}", sample) for number, sample in enumerate(samples)]
    print_report(convert(items, decode, options.out, prefix, recipe=recipe, **settings))
    _print_notes(folder, dropped)
    return 0


def _check(options: argparse.Namespace) -> None:
    check_short_side(options.short_side)
    if options.size is not None and options.short_side is not None:
        raise ConfigError("Expected one of --size and --short-side, but got both. Leave one out.")
    for name in ("max_frames", "clip_frames", "clip_seconds"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"Expected --{name.replace('_', '-')} to be above 0, but got {value}.")


def _print_notes(folder: Folder, dropped: int) -> None:
    masked = sum(video["masks"] is not None for video in folder.videos)
    lines = [f"  masks: {masked} of {len(folder.videos)} videos have some"]
    if dropped:
        lines.append(f"  left out {dropped} frames after the last whole clips (--rest keep keeps them)")
    lines.extend(
        f"  ignored {len(names)} ({reason}): {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for reason, names in folder.ignored.items()
    )
    sys.stdout.write("\n".join(lines) + "\n")


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"expected frames a second, such as 12 or 30000/1001, got {text!r}") from error
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"expected frames a second above 0 and up to 1000, got {text!r}")
    return rate


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,4})(?:x([0-9]{1,4}))?", text.lower())
    if not found or not int(found[1]) or not int(found[2] or found[1]):
        raise argparse.ArgumentTypeError(f"expected height x width, such as 128 or 240x320, but got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def _renumber(ids: np.ndarray, where: str) -> tuple[np.ndarray, list[int]]:
    """Number the objects from 1 on: masks of 0 and 255, say, show one object, not 255."""
    found = [number for number in np.unique(ids).tolist() if number]
    if len(found) > 255:
        raise ShardError(
            f"Expected at most 255 objects in the masks of {where}, but got {len(found)}. The masks may be pictures "
            "with smooth shades instead of ids: export them without anti-aliasing and as PNG."
        )
    ranks = np.searchsorted(np.array([0, *found]), ids.astype(np.int64))
    return ranks.astype(np.uint8), [int(number) for number in found]


def _not_whole(where: str, got: str, frames: int) -> ShardError:
    start = f", or take its start with --max-frames {frames}" if frames else ""
    return ShardError(f"Expected {where} to be whole, but {got}. Copy or encode it again{start}.")


def _check_bytes(shape: Iterable[int], where: str) -> None:
    sizes = list(shape)
    if int(np.prod(sizes, dtype=np.int64)) > _MAX_BYTES:
        raise ShardError(
            f"Expected a sample of {where} to take at most {_MAX_BYTES >> 30} GiB, but its first {sizes[0]} frames of "
            f"{sizes[1]} x {sizes[2]} take more. Cut the video with --clip-frames, or take fewer or smaller frames "
            "with --max-frames, --fps or --short-side."
        )
