"""When the frames of a video file, a GIF or a folder of pictures are shown, and the frames themselves."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.decode import decode_picture, decode_video, open_video, to_rgb
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

    Attributes:
        times: Seconds from the first frame on, in order; None where nothing says (a folder of pictures).
        frames: Number of frames.
        rate: Frames per second on average; None where nothing says.
        stamps: The container's own time stamps, for seeking; None where they are missing or not unique.
        missing: What the file lacks by its own header; None when it is whole.
    """

    times: tuple[Fraction, ...] | None
    frames: int
    rate: Fraction | None
    stamps: tuple[int, ...] | None = None
    missing: str | None = None


def select_frames(timeline: Timeline, fps: Fraction, where: str) -> list[int]:
    """Choose the frame nearest in time to k / fps seconds, for each k; more than the video has repeats frames."""
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
    for number in range(math.ceil(end * fps)):
        time = number / fps
        after = bisect.bisect_left(times, time)
        before = max(after - 1, 0)
        nearer = after < len(times) and times[after] - time < time - times[before]
        chosen.append(after if nearer or after == 0 else before)
    return chosen


def read_timeline(path: Path, names: Sequence[str] | None, rate: Fraction | None, where: str) -> Timeline:
    """Find when each frame is shown, without decoding pictures.

    `names` are the files of a folder of pictures, in order, which are shown at `rate`; None for a video file.
    """
    if names is not None:
        return Timeline(_regular(len(names), rate), len(names), rate)
    if path.suffix.lower() == ".gif":
        shown = [Fraction(int(picture.info.get("duration") or 100), 1000) for picture in _gif_pictures(path, where)]
        ends = tuple(accumulate(shown))
        return Timeline((Fraction(0), *ends[:-1]), len(ends), len(ends) / ends[-1])
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
    """Read frames (h, w, 3) uint8 of one size, one after the other, as they are shown.

    Args:
        path: The video file, or the folder of pictures.
        names: Files in the folder, in order; None for a video file.
        wanted: Frame numbers, not falling; None for all.
        stamp: The container's time stamp of the first wanted frame, to seek to; None reads from the start.
        where: The video, for messages.

    Raises:
        ShardError: The file is damaged or ends early, or frames differ in size.
        ConfigError: PyAV is missing.
    """
    if names is None and path.suffix.lower() != ".gif":
        yield from decode_video(path, where, wanted, stamp=stamp)
        return
    size: tuple[int, ...] | None = None
    last, number = None, -1
    pictures: Any = enumerate(_gif_pictures(path, where) if names is None else names)
    counts = Counter(wanted or ())
    for number, picture in pictures:
        times = 1 if wanted is None else counts[number]
        if not times:
            continue
        place = f"frame {path / picture} of {where}" if names is not None else where
        frame = decode_picture(path / picture, place) if names is not None else to_rgb(picture, place)
        size, last = size or frame.shape, number
        if frame.shape != size:
            raise ShardError(
                f"Expected all frames of {where} to have one size, but the first has {size[0]} x {size[1]} and frame "
                f"{number}{f' ({picture})' if names else ''} has {frame.shape[0]} x {frame.shape[1]} (height x width). "
                "Resize the frames, or split the video where its size changes."
            )
        for _ in range(times):
            yield frame
    if last is None or (wanted is not None and last != wanted[-1]):
        need = f"at least {wanted[-1] + 1} frames" if wanted else "frames"
        raise ShardError(f"Expected {where} to have {need}, but got {number + 1}. Copy or export it again.")


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
    except Exception as error:  # Pillow raises almost anything on damaged bytes
        got = "an empty file" if path.is_file() and not path.stat().st_size else f"a damaged one ({error})"
        raise ShardError(f"Expected {where} to be a whole GIF, but got {got}. Export it again.") from error


def _regular(frames: int, rate: Fraction | None) -> tuple[Fraction, ...] | None:
    return None if rate is None else tuple(Fraction(number) / rate for number in range(frames))
