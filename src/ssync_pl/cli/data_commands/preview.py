"""`ssync-pl data preview`: a contact sheet of the videos in shards."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ssync_pl.errors import ConfigError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add `preview` to the commands of `ssync-pl data`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_parser(parser.add_subparsers())
        >>> parser.parse_args(["preview", "data/train-*.tar", "--out", "sheet.png"]).videos
        8
    """
    text = "Draw videos of shards, each frame beside the same frame with its object masks, as one PNG."
    parser = commands.add_parser(
        "preview",
        help="draw a contact sheet of the videos in shards",
        description=text,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="shards: paths, globs, braces or URLs")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="the picture")
    parser.add_argument("--videos", type=int, default=8, help="number of videos")
    parser.add_argument("--frames", type=int, default=6, help="frames a video, evenly spaced")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--seed", type=int, default=0, help="seed of the choice of videos")
    choice.add_argument("--first", action="store_true", help="take the first videos instead of random ones")
    parser.add_argument("--cell", type=int, default=112, help="longer side of a frame on the sheet, in pixels")
    parser.add_argument("--mp4", action="store_true", help="write FILE.mp4 with all frames as well; needs PyAV")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.set_defaults(run=_preview)


def _preview(options: argparse.Namespace) -> int:
    from ssync_pl.data.files import write_bytes
    from ssync_pl.data.patterns import expand_shards
    from ssync_pl.data.video import encode_mp4, mp4_available
    from ssync_pl.tools.preview import compose_preview, draw_preview, pick_videos
    from ssync_pl.tools.viz import encode_png

    if options.out.suffix.lower() != ".png":
        raise ConfigError(f"Expected --out to end in .png, but got {str(options.out)!r}.")
    targets = [options.out, *([options.out.with_suffix(".mp4")] if options.mp4 else [])]
    for target in targets:
        if target.exists() and not (options.force and target.is_file()):
            raise ConfigError(f"Expected --out to be a new file, but {target} exists. Add --force to replace files.")
    if options.mp4 and not mp4_available():
        raise ConfigError("Expected PyAV for --mp4, but it is not installed. Run `pip install av`, or leave out --mp4.")
    shards = expand_shards(options.patterns, "patterns")
    videos, skipped = pick_videos(shards, options.videos, seed=None if options.first else options.seed)
    for problem in skipped:
        sys.stderr.write(f"left out: {problem}\n")
    write_bytes(targets[0], encode_png(draw_preview(videos, frames=options.frames, cell=options.cell)))
    if options.mp4:
        write_bytes(targets[1], encode_mp4(compose_preview(videos, cell=options.cell)))
    count = len(videos)
    sys.stdout.write(f"{count} video{'s' * (count != 1)}: {', '.join(str(target) for target in targets)}\n")
    return 0
