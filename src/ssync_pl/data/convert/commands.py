"""`ssync-pl data convert SOURCE`: the options of each source, and the report of what was written."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ssync_pl.data.convert.davis import Davis
from ssync_pl.data.convert.movi import Movi
from ssync_pl.data.convert.videos import Videos
from ssync_pl.data.convert.writer import ConversionReport, Item, convert
from ssync_pl.data.convert.ytvis import Ytvis

__all__ = ["add_sources"]

_PLACES = ("root", "splits", "prefix")  # they decide where videos are found, and not what is made of them


def add_sources(commands: Any) -> None:
    """Add movi, ytvis2019, ytvis2021, davis and videos to the commands of `ssync-pl data convert`."""
    add = _add_source(commands, "movi", Movi, "MOVi-a to MOVi-f, TFRecord files")
    add("--splits", nargs="+", metavar="SPLIT", help="e.g. train validation (default: all there are)")
    for name in ("ytvis2019", "ytvis2021"):
        add = _add_source(commands, name, Ytvis, f"YouTube-VIS {name[-4:]}")
        splits = ("train", "validation", "valid", "test")
        help = (
            "train and validation share the official training videos, see --holdout; valid and test are the official "
            "ones, whose annotations are not public, so they get no masks (default: train validation)"
        )
        add("--splits", nargs="+", choices=splits, default=splits[:2], help=help)
        help = "the last N official training videos become `validation` (default: 300, as in the published shards)"
        add("--holdout", type=int, default=300, metavar="N", help=help)
        _add_resize(add, 320)
    add = _add_source(commands, "davis", Davis, "DAVIS 2017")
    help = "shards of `val` are called davis-validation (default: train val)"
    add("--splits", nargs="+", choices=("train", "val"), default=("train", "val"), help=help)
    add("--resolution", default="480p", help="folder below JPEGImages (default: 480p)")
    add("--annotations", default="Annotations", help="folder of the masks, e.g. Annotations_unsupervised")
    _add_resize(add, None)
    add = _add_source(commands, "videos", Videos, "own videos, files or folders of frames")
    add("--prefix", default="videos", help="start of the shards' names, e.g. videos-train (default: videos)")
    help = "cut each video into clips of N frames; the rest is dropped, shorter videos stay whole"
    add("--clip-frames", type=int, metavar="N", help=help)
    _add_resize(add, None)


def _add_source(commands: Any, name: str, kind: type, title: str) -> Callable[..., Any]:
    parser = commands.add_parser(name, help=title, description=inspect.cleandoc(kind.__doc__ or ""))
    add = parser.add_argument
    add("--root", required=True, type=Path, help="folder of the videos")
    add("--out", required=True, type=Path, help="folder of the shards; made when absent")
    add("--workers", type=int, metavar="N", help="processes; 0 uses this one only (default: one per CPU)")
    add("--samples-per-shard", type=int, default=32, metavar="N", help="videos per shard (default: 32)")
    help = "stop at the first bad video, or leave it out and name it (default: raise)"
    add("--on-bad-sample", choices=("raise", "skip"), default="raise", help=help)
    add("--no-progress", action="store_true", help="show no progress bar")
    parser.set_defaults(run=_convert, kind=kind)
    return add


def _add_resize(add: Callable[..., Any], default: int | None) -> None:
    help = f"shorter side of frames and masks; `none` keeps the size (default: {str(default).lower()})"
    add("--short-side", type=_pixels, default=default, metavar="PIXELS", help=help)


def _pixels(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 8192:
        raise argparse.ArgumentTypeError(f"expected a number of pixels from 1 to 8192 or `none`, but got {text!r}")
    return int(text)


def _convert(options: argparse.Namespace) -> int:
    source = options.kind(**{field.name: getattr(options, field.name) for field in fields(options.kind)})
    recipe = {field.name: getattr(source, field.name) for field in fields(source) if field.name not in _PLACES}
    for split in source.plan():
        report = convert(
            [Item(f"{number:06d}", one) for number, one in enumerate(split.sources)],
            source,
            options.out,
            split.prefix,
            recipe={"source": options.source, **recipe},
            samples_per_shard=options.samples_per_shard,
            num_workers=options.workers,
            on_bad_sample=options.on_bad_sample,
            progress=not options.no_progress,
        )
        sys.stdout.write("\n".join(_describe(split.prefix, report, split.notes)) + "\n")
    return 0


def _describe(prefix: str, report: ConversionReport, notes: Sequence[str]) -> list[str]:
    """Say what a conversion wrote, how to load it, and what was left out."""
    numbers = [path.stem[len(prefix) + 1 :] for path in report.shards]
    contiguous = int(numbers[-1]) - int(numbers[0]) + 1 == len(numbers)
    number = numbers[0] if len(numbers) == 1 else f"{{{numbers[0]}..{numbers[-1]}}}" if contiguous else "*"
    kept = f", of which {report.kept} were there already" if report.kept else ""
    frames = f", {_many(report.frames, 'frame')}" if report.frames else ""
    size = f"{report.bytes / 1e6:.1f} MB in {_many(len(report.shards), 'shard')}"
    lines = [
        f"{prefix}: {_many(report.videos, 'video')}{frames}, {size}{kept}",
        f"  shards: {report.shards[0].with_name(f'{prefix}-{number}.tar')}",
        *(f"  {note}" for note in notes),
    ]
    if report.skipped:
        lines.append(f"  skipped {_many(len(report.skipped), 'video')}:")
        lines += [f"    {key}: {reason}" for key, reason in sorted(report.skipped.items())]
    return lines


def _many(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")
