"""What the commands of `ssync-pl data convert` have in common: options, video formats and the printed report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.convert.engine import ConversionReport
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["VIDEO_FORMATS", "add_common", "common", "encode_video", "print_report"]

VIDEO_FORMATS = ("npy", "mp4")
"""How videos can be stored: exact arrays, or lossy H.264."""


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that every conversion has.

    Args:
        parser: Parser of one command.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_common(parser)
        >>> parser.parse_args(["--out", "shards"]).samples_per_shard
        32
    """
    parser.add_argument("--out", required=True, type=Path, help="folder of the shards; made when absent")
    parser.add_argument(
        "--workers", type=int, default=None, help="processes; 0 uses this one only (default: one a CPU)"
    )
    parser.add_argument("--samples-per-shard", type=int, default=32, help="videos a shard (default: 32)")
    parser.add_argument(
        "--on-bad-sample",
        choices=("raise", "skip"),
        default="raise",
        help="stop at the first bad video, or leave it out and name it (default: raise)",
    )
    parser.add_argument(
        "--video-format",
        choices=VIDEO_FORMATS,
        default="npy",
        help="npy: exact pixels, fastest to read; mp4: H.264, far smaller, but lossy, and needs PyAV (default: npy)",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def common(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `convert` that the common options stand for.

    The folder (`options.out`) and `options.video_format`, which belongs into the recipe, are left to the command.

    Args:
        options: What a parser with the common options returned.

    Returns:
        Keyword arguments of `convert`.

    Raises:
        ConfigError: An option is out of range.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_common(parser)
        >>> common(parser.parse_args(["--out", "shards", "--workers", "0"]))["num_workers"]
        0
    """
    if options.workers is not None and options.workers < 0:
        raise ConfigError(f"Expected --workers to be 0 or more, but got {options.workers}.")
    if options.samples_per_shard < 1:
        raise ConfigError(f"Expected --samples-per-shard to be at least 1, but got {options.samples_per_shard}.")
    return {
        "samples_per_shard": options.samples_per_shard,
        "num_workers": options.workers,
        "on_bad_sample": options.on_bad_sample,
        "progress": not options.no_progress,
    }


def encode_video(video: np.ndarray, video_format: str, where: str, fps: int = 12) -> dict[str, Any]:
    """Return the member that holds a video.

    Args:
        video: (F, h, w, 3) uint8, RGB.
        video_format: `npy` keeps every pixel; `mp4` is lossy.
        where: Source of the video, for the message.
        fps: Frames a second of an mp4.

    Returns:
        Member name → array or bytes.

    Raises:
        ConfigError: The format is unknown, or PyAV is not installed.
        ShardError: H.264 cannot store the size.

    Example:
        >>> list(encode_video(np.zeros((2, 8, 8, 3), np.uint8), "npy", "clip.avi"))
        ['video.npy']
    """
    if video_format not in VIDEO_FORMATS:
        raise ConfigError(f"Expected the video format to be one of {', '.join(VIDEO_FORMATS)}, but got {video_format}.")
    if video_format == "npy":
        return {"video.npy": video}
    from ssync_pl.data.video import encode_mp4, mp4_available

    if not mp4_available():
        raise ConfigError(
            'Expected PyAV for --video-format mp4, but it is missing. Run `pip install "ssync-pl[video]"`, or take npy.'
        )
    height, width = video.shape[1:3]
    if height % 2 or width % 2:
        raise ShardError(
            f"Expected an even height and width for --video-format mp4, but {where} has {height} x {width}, and a "
            "padded video would not fit its masks. Take --video-format npy, or resize to even numbers."
        )
    return {"video.mp4": encode_mp4(video, fps=fps)}


def print_report(report: ConversionReport) -> None:
    """Print what a conversion wrote: counts, how to load it, and what was left out.

    Args:
        report: What `convert` returned.

    Example:
        >>> print_report(ConversionReport((Path("out/train-000000.tar"),), 3, 0, {"000001": "No frames."}, 72, 123_000))
        train: 3 videos, 72 frames, 0.1 MB in 1 shard
          shards: out/train-000000.tar
          skipped 1 video:
            000001: No frames.
    """
    head, first = report.shards[0].stem.rsplit("-", 1)
    last = report.shards[-1].stem.rsplit("-", 1)[1]
    kept = f", of which {report.kept} were there already" if report.kept else ""
    lines = [
        f"{head}: {_many(report.videos, 'video')}, {_many(report.frames, 'frame')}, {report.bytes / 1e6:.1f} MB in "
        f"{_many(len(report.shards), 'shard')}{kept}"
    ]
    contiguous = int(last) - int(first) + 1 == len(report.shards)
    number = first if len(report.shards) == 1 else f"{{{first}..{last}}}" if contiguous else "*"
    lines.append(f"  shards: {report.shards[0].with_name(f'{head}-{number}.tar')}")
    if report.skipped:
        lines.append(f"  skipped {_many(len(report.skipped), 'video')}:")
        lines.extend(f"    {key}: {reason}" for key, reason in sorted(report.skipped.items()))
    sys.stdout.write("\n".join(lines) + "\n")


def _many(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")
