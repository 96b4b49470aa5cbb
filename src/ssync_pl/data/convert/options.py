"""What the commands of `ssync-pl data convert` have in common: options, encoding, extras and the printed report."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssync_pl.errors import ConfigError, ShardError

if TYPE_CHECKING:
    from ssync_pl.data.convert.writer import ConversionReport

__all__ = ["VIDEO_FORMATS", "add_common", "add_resize", "check_common", "encode_video", "print_report", "require"]

VIDEO_FORMATS = ("npy", "mp4")
"""How videos can be stored: exact arrays, or lossy H.264."""


def require(extra: str, *modules: str) -> None:
    """Refuse to start without the packages of an extra, in one line."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f'Expected {", ".join(missing)} to be installed, but it is missing. Run `pip install "ssync-pl[{extra}]"`.'
        )


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that every conversion has."""
    parser.add_argument("--out", required=True, type=Path, help="folder of the shards; made when absent")
    parser.add_argument(
        "--workers", type=int, default=None, help="processes; 0 uses this one only (default: one per CPU)"
    )
    parser.add_argument("--samples-per-shard", type=int, default=32, help="videos per shard (default: 32)")
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


def add_resize(parser: argparse.ArgumentParser, default: int | None) -> None:
    """Add `--short-side` and `--resample`."""
    parser.add_argument(
        "--short-side",
        type=_pixels_or_none,
        default=default,
        metavar="PIXELS",
        help="resize frames and masks to this shorter side, keeping proportions; `none` keeps the size "
        f"(default: {'none' if default is None else default})",
    )
    parser.add_argument(
        "--resample",
        choices=("bicubic", "bilinear", "nearest"),
        default="bicubic",
        help="filter for frames: bicubic and bilinear are anti-aliased when frames shrink; nearest takes the pixel "
        "under each centre; masks always go to the nearest pixel (default: bicubic)",
    )


def check_common(options: argparse.Namespace) -> dict[str, Any]:
    """Check the common options, and return the arguments of `convert` that they stand for."""
    if options.workers is not None and options.workers < 0:
        raise ConfigError(f"Expected --workers to be 0 or more, but got {options.workers}.")
    if options.samples_per_shard < 1:
        raise ConfigError(f"Expected --samples-per-shard to be at least 1, but got {options.samples_per_shard}.")
    if options.video_format == "mp4":
        require("video", "av")
    return {
        "samples_per_shard": options.samples_per_shard,
        "num_workers": options.workers,
        "on_bad_sample": options.on_bad_sample,
        "progress": not options.no_progress,
    }


def encode_video(video: np.ndarray, video_format: str, where: str, fps: int = 12) -> dict[str, Any]:
    """Return the member that holds a video (F, h, w, 3) uint8."""
    if video_format == "npy":
        return {"video.npy": video}
    from ssync_pl.data.video import encode_mp4

    height, width = video.shape[1:3]
    if height % 2 or width % 2:
        raise ShardError(
            f"Expected an even height and width for --video-format mp4, but {where} has {height} x {width}, and a "
            "padded video would not fit its masks. Take --video-format npy, or resize to even numbers."
        )
    return {"video.mp4": encode_mp4(video, fps=fps)}


def print_report(report: ConversionReport) -> None:
    """Print what a conversion wrote: counts, how to load it, and what was left out."""
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


def _pixels_or_none(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 8192:
        raise argparse.ArgumentTypeError(f"expected a number of pixels from 1 to 8192 or `none`, but got {text!r}")
    return int(text)
