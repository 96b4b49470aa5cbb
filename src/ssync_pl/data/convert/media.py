"""Frames of video files, GIFs and folders of pictures, read one after the other."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.convert.pictures import read_picture
from ssync_pl.data.decode import decode_video, open_video, to_rgb
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["VIDEO_EXTENSIONS", "Timeline", "read_frames", "read_timeline", "select_frames"]

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
"""Files that are taken for videos."""

# Containers that store when each frame is shown. AVI does not, and what is guessed for it is off by some frames.
_STAMPED = ("mp4", "matroska")
# Headers that count no frames say a duration, which some writers round.
_SLACK, _SLACK_SECONDS = 0.1, 0.25


@dataclass(frozen=True)
class Timeline:
    """When each frame of a video is shown.

    Args:
        times: Seconds from the first frame on, in order; None where nothing says (a folder of pictures).
        frames: Number of frames.
        rate: Frames a second on average; None where nothing says.
        stamps: The container's own time stamps, for seeking; None where they are missing or not unique.
        missing: What the file lacks by its own header; None when it is whole.

    Example:
        >>> Timeline((Fraction(0), Fraction(1, 10)), 2, Fraction(10)).frames
        2
    """

    times: tuple[Fraction, ...] | None
    frames: int
    rate: Fraction | None
    stamps: tuple[int, ...] | None = None
    missing: str | None = None


def select_frames(timeline: Timeline, fps: Fraction, where: str) -> list[int]:
    """Choose frames at a constant rate: at k / fps seconds, the frame that is nearest in time.

    Args:
        timeline: The video's.
        fps: Wanted frames a second. More than the video has repeats frames.
        where: The video, for the message.

    Returns:
        Frame numbers, in order.

    Raises:
        ConfigError: Nothing says when frames are shown.

    Example:
        >>> times = tuple(Fraction(i, 30) for i in range(9))
        >>> select_frames(Timeline(times, 9, Fraction(30)), Fraction(10), "a video")
        [0, 3, 6]
    """
    times = timeline.times
    if times is None:
        raise ConfigError(
            f"Expected a frame rate for {where}, which is a folder of pictures, to choose frames by --fps or "
            "--clip-seconds, but nothing says it. Give it with --frames-fps."
        )
    if len(times) < 2:
        return list(range(len(times)))
    end = times[-1] + (times[-1] - times[0]) / (len(times) - 1) / 2
    chosen = []
    for number in range(int(end * fps) + 1):
        time = number / fps
        if time >= end:
            break
        after = bisect.bisect_left(times, time)
        before = max(after - 1, 0)
        nearer = after < len(times) and times[after] - time < time - times[before]
        chosen.append(after if nearer or after == 0 else before)
    return chosen


def read_timeline(path: Path, names: Sequence[str] | None, rate: Fraction | None, where: str) -> Timeline:
    """Find when each frame is shown, without decoding pictures.

    Args:
        path: The video file, or the folder of pictures.
        names: Files in the folder, in order; None for a video file.
        rate: Frames a second of the folder; None when nothing says.
        where: The video, for messages.

    Returns:
        The timeline.

    Raises:
        ShardError: The file is damaged, or no video.
        ConfigError: PyAV is missing.

    Example:
        >>> read_timeline(Path("frames"), ["0.png", "1.png"], Fraction(5), "frames").times
        (Fraction(0, 1), Fraction(1, 5))
    """
    if names is not None:
        return Timeline(_regular(len(names), rate), len(names), rate)
    if path.suffix.lower() == ".gif":
        return _gif_timeline(path, where)
    with open_video(path, where) as (container, stream):
        stored = [packet for packet in container.demux(stream) if packet.size]
        packets = [packet for packet in stored if not packet.is_discard]
        missing = _missing(container, stream, stored)
        average = stream.average_rate or stream.guessed_rate
        base = stream.time_base
        exact = any(name in container.format.name for name in _STAMPED)
    stamps = [packet.pts for packet in packets]
    if not exact or any(stamp is None for stamp in stamps) or len(set(stamps)) < len(stamps):
        return Timeline(_regular(len(packets), average), len(packets), average, None, missing)
    stamps.sort()
    times = tuple((stamp - stamps[0]) * base for stamp in stamps)
    return Timeline(times, len(times), average, tuple(stamps), missing)


def read_frames(
    path: Path, names: Sequence[str] | None, wanted: Sequence[int] | None, stamp: int | None, where: str
) -> Iterator[np.ndarray]:
    """Read frames one after the other, upright (rotation notes and EXIF orientation are followed).

    Args:
        path: The video file, or the folder of pictures.
        names: Files in the folder, in order; None for a video file.
        wanted: Frame numbers, not falling; None for all.
        stamp: The container's time stamp of the first wanted frame, to seek to; None reads from the start.
        where: The video, for messages.

    Yields:
        (h, w, 3) uint8 each, all of one size.

    Raises:
        ShardError: The file is damaged or ends early, or frames differ in size.
        ConfigError: PyAV is missing.

    Example:
        >>> next(read_frames(Path("gone"), ["0.png"], None, None, "video gone"))
        Traceback (most recent call last):
        ssync_pl.errors.ShardError: Expected frame gone/0.png of video gone to be there, but it is missing. ...
    """
    source: Iterator[tuple[int, np.ndarray]]
    if names is not None:
        numbers = range(len(names)) if wanted is None else sorted(set(wanted))
        source = ((number, read_picture(path / names[number], where, upright=True)) for number in numbers)
    elif path.suffix.lower() == ".gif":
        source = _gif_frames(path, where)
    else:
        yield from decode_video(path, where, wanted, stamp=stamp)
        return
    size: tuple[int, ...] | None = None
    place = 0
    seen = 0
    for number, frame in source:
        size = size or frame.shape
        if frame.shape != size:
            raise ShardError(
                f"Expected all frames of {where} to have one size, but the first has {size[0]} x {size[1]} and frame "
                f"{number}{f' ({names[number]})' if names else ''} has {frame.shape[0]} x {frame.shape[1]} (height x "
                "width). Resize the frames, or split the video where its size changes."
            )
        seen = number + 1
        if wanted is None:
            yield frame
            continue
        while place < len(wanted) and wanted[place] == number:
            yield frame
            place += 1
        if place == len(wanted):
            return
    if wanted is not None or not seen:
        need = f"at least {wanted[-1] + 1} frames" if wanted else "frames"
        raise ShardError(
            f"Expected {where} to have {need}, but only {seen} can be decoded. The file is damaged or cut off: copy or "
            "encode it again, or take fewer frames with --max-frames."
        )


def _missing(container: Any, stream: Any, packets: Sequence[Any]) -> str | None:
    """Say what a file lacks by its own header; None when it is whole, or when nothing tells."""
    if stream.frames:
        # Edited files hide some of their packets, so the hidden ones count too.
        lacks = len(packets) < stream.frames
        return f"its header says {stream.frames} frames and it ends after {len(packets)}" if lacks else None
    stamps = [packet.pts for packet in packets if packet.pts is not None]
    if not stamps or len(container.streams) > 1 or not container.duration:
        return None  # the duration may be that of the sound
    last = max(packets, key=lambda packet: -math.inf if packet.pts is None else packet.pts)
    still = (last.duration or 0) or (last.pts - min(stamps)) / max(1, len(stamps) - 1)
    end, promised = float((last.pts + still) * stream.time_base), container.duration / 1e6
    if promised - end <= max(_SLACK_SECONDS, _SLACK * promised):
        return None
    return f"its header says {promised:.2f} seconds and it ends after {end:.2f}, {len(packets)} frames"


def _gif_timeline(path: Path, where: str) -> Timeline:
    times, now = [], Fraction(0)
    for picture in _gif_pictures(path, where):
        times.append(now)
        now += Fraction(int(picture.info.get("duration") or 100), 1000)
    return Timeline(tuple(times), len(times), len(times) / now)


def _gif_frames(path: Path, where: str) -> Iterator[tuple[int, np.ndarray]]:
    for number, picture in enumerate(_gif_pictures(path, where)):
        yield number, to_rgb(picture, where)


def _gif_pictures(path: Path, where: str) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(path, formats=["GIF"]) as picture:
            for number in range(getattr(picture, "n_frames", 1)):
                picture.seek(number)
                picture.load()
                yield picture
    except ShardError:
        raise
    except Exception as error:
        got = "an empty file" if path.is_file() and not path.stat().st_size else f"a damaged one ({error})"
        raise ShardError(
            f"Expected {where} to be a whole GIF, but got {got}. Export it again, or leave such videos out with "
            "--on-bad-sample skip."
        ) from error


def _regular(frames: int, rate: Fraction | None) -> tuple[Fraction, ...] | None:
    return None if rate is None else tuple(Fraction(number) / rate for number in range(frames))
