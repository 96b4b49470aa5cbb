"""`ssync-pl data convert SOURCE`: the options of each source, and the report of what was written."""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssync_pl.data.convert.movi import plan_movi
from ssync_pl.data.convert.videos import plan_davis, plan_videos
from ssync_pl.data.convert.writer import Split, convert
from ssync_pl.data.convert.ytvis import plan_ytvis
from ssync_pl.errors import printable

_SOURCES: dict[str, tuple[str, Callable[..., list[Split]]]] = {
    "movi": ("MOVi-a to MOVi-f, TFRecord files", plan_movi),
    "ytvis2019": ("YouTube-VIS 2019", plan_ytvis),
    "ytvis2021": ("YouTube-VIS 2021", plan_ytvis),
    "davis": ("DAVIS 2017", plan_davis),
    "videos": ("own videos, files or folders of frames", plan_videos),
}


def _pixels(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 8192:
        raise argparse.ArgumentTypeError(f"expected a number of pixels from 1 to 8192 or `none`, but got {text!r}")
    return int(text)


# Each source has those that its function takes, with the defaults that stand there.
_OPTIONS: dict[str, dict[str, Any]] = {
    "splits": {"nargs": "+", "metavar": "SPLIT", "help": "which parts to convert (default: all that are named above)"},
    "holdout": {"type": int, "metavar": "N", "help": "size of `validation` (default: %(default)s, as published)"},
    "annotations": {"help": "folder of the masks, e.g. Annotations_unsupervised (default: %(default)s)"},
    "prefix": {"help": "start of the shards' names, e.g. videos-train (default: %(default)s)"},
    "clip_frames": {"type": int, "metavar": "N", "help": "cut videos into clips of N frames; the rest is dropped"},
    "short_side": {"type": _pixels, "metavar": "N", "help": "shorter side in pixels, or none (default: %(default)s)"},
}


def add_sources(commands: Any) -> None:
    """Add movi, ytvis2019, ytvis2021, davis and videos to the commands of `ssync-pl data convert`."""
    for source, (title, plan) in _SOURCES.items():
        parser = commands.add_parser(source, help=title, description=inspect.cleandoc(plan.__doc__ or ""))
        add = parser.add_argument
        add("--root", required=True, type=Path, help="folder of the videos")
        add("--out", required=True, type=Path, help="folder of the shards; made when absent")
        add("--workers", type=int, metavar="N", help="processes; 0 uses this one only (default: one per CPU)")
        add("--samples-per-shard", type=int, default=32, metavar="N", help="videos per shard (default: 32)")
        help = "stop at the first bad video, or leave it out and name it (default: raise)"
        add("--on-bad-sample", choices=("raise", "skip"), default="raise", help=help)
        add("--no-progress", action="store_true", help="show no progress bar on a terminal either")
        for name, parameter in inspect.signature(plan).parameters.items():
            if name != "root":
                add("--" + name.replace("_", "-"), default=parameter.default, **_OPTIONS[name])
        parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    _, plan = _SOURCES[options.source]
    given = {name: getattr(options, name) for name in inspect.signature(plan).parameters}
    splits = plan(**given)
    for name in ("root", "splits", "prefix"):  # they decide where videos are found, and not what is made of them
        given.pop(name, None)
    how = {"samples_per_shard": options.samples_per_shard, "num_workers": options.workers}
    how |= {"on_bad_sample": options.on_bad_sample, "progress": not options.no_progress}
    recipe = {"source": options.source, **given}
    for split in splits:
        report = convert(split.sources, split.decode, options.out, split.prefix, recipe=recipe, **how)
        size = sum(shard.size for shard in report.shards) / 1e6
        shards = f"shards: {len(report.shards)} ({report.kept} were there before), {size:.1f} MB"
        lines = [f"{split.prefix}: videos: {report.videos}, {shards}"]
        lines += [f"  shards: {options.out / f'{split.prefix}-[0-9]*.tar'}", *(f"  {note}" for note in split.notes)]
        lines += [f"  skipped: {len(report.skipped)}"] if report.skipped else []
        lines += [f"    {key}: {reason}" for key, reason in sorted(report.skipped.items())]
        sys.stdout.write("".join(f"{printable(line)}\n" for line in lines))
    return 0
