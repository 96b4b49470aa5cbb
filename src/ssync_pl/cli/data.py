"""`ssync-pl data`: generates, checks, draws and converts shards, and stores features of their frames."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssync_pl.cli import key_values, size
from ssync_pl.errors import require

__all__ = ["data"]

_SHARDS = "shards: paths, globs, braces or URLs"


def _generate(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Generate videos of rigid bodies that fall and collide, with exact masks. Equal seeds give equal videos."""
    add = parser.add_argument
    change = "change a setting of the preset, e.g. resolution=64, frames=12 or zoom=1.5; may be repeated"
    add("--preset", default="a", help="look of the scenes: a, a_zoom or c (default: %(default)s)")
    add("--out", required=True, type=Path, help="folder in which the data set gets its own folder")
    add("--train", type=int, default=440, help="number of training videos (default: %(default)s)")
    add("--validation", type=int, default=48, help="number of validation videos (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of all videos (default: %(default)s)")
    add("--workers", type=int, help="processes; 0 uses this one only")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help=change)
    options = parser.parse_args(words)
    from ssync_pl.data.synthetic import generate
    from ssync_pl.data.synthetic.config import preset

    counts = {"train": options.train, "validation": options.validation}
    valid = min(counts.values()) >= 0 and any(counts.values())
    require(valid, "--train or --validation to be above 0 and none below", counts)
    config = preset(options.preset, **key_values(options.changes, "--set"))
    splits = {name: count for name, count in counts.items() if count}
    folder = generate(options.out, config, splits=splits, seed=options.seed, num_workers=options.workers)
    for name, count in splits.items():
        sys.stdout.write(f"{name}: {folder / f'{config.name}-{name}-*.tar'} (videos: {count})\n")
    return 0


def _check(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Report what shards hold and what is wrong with them: damage, duplicates, videos of training in validation.

    Exit status: 0 clean, 1 problems found, 2 wrong usage.
    """
    add = parser.add_argument
    patterns = f"{_SHARDS}; give training and validation to find videos that are in both"
    add("patterns", nargs="+", metavar="PATTERN", help=patterns)
    add("--workers", type=int, metavar="N", help="processes; 0 uses this one only (default: by size)")
    add("--json", type=Path, metavar="FILE", help="write the whole report as JSON as well")
    options = parser.parse_args(words)
    from ssync_pl.data.check import check_shards, group_shards, render_report
    from ssync_pl.tools.owned import refuse_foreign, write_owned_json

    if options.json is not None:
        refuse_foreign(options.json)  # before work begins
    sets = group_shards(options.patterns)
    report = check_shards(sets, num_workers=options.workers, progress=sys.stderr.isatty())
    if options.json is not None:
        write_owned_json(options.json, report.to_json())
    sys.stdout.write(render_report(report) + "\n")
    return 0 if report.clean else 1


def _preview(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Draw frames of videos in shards, and below them the same frames with their object masks, as one PNG."""
    add = parser.add_argument
    add("patterns", nargs="+", metavar="PATTERN", help=_SHARDS)
    add("--out", required=True, type=Path, metavar="FILE.png", help="a new picture, or an earlier one of this command")
    add("--videos", type=int, default=8, help="number of videos (default: %(default)s)")
    add("--frames", type=int, default=6, help="frames per video, evenly spaced (default: %(default)s)")
    add("--cell", type=int, default=112, help="longer side of a frame on the sheet, in pixels (default: %(default)s)")
    options = parser.parse_args(words)
    from ssync_pl.data.files import write_bytes
    from ssync_pl.data.patterns import expand_shards
    from ssync_pl.tools.owned import refuse_foreign
    from ssync_pl.tools.preview import draw_preview
    from ssync_pl.tools.viz import encode_png

    require(options.out.suffix.lower() == ".png", "--out to end in .png", repr(str(options.out)))
    refuse_foreign(options.out)
    shards = expand_shards(options.patterns, "patterns")
    sheet, videos, skipped = draw_preview(shards, options.videos, options.frames, options.cell)
    sys.stderr.write("".join(f"left out: {problem}\n" for problem in skipped))
    write_bytes(options.out, encode_png(sheet))
    sys.stdout.write(f"{options.out} (videos: {videos})\n")
    return 0


def _convert(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Convert a data set or own videos to shards. A run that was stopped goes on where it was."""
    from ssync_pl.data.convert.commands import add_sources

    add_sources(parser.add_subparsers(dest="source", required=True, metavar="SOURCE"))
    options = parser.parse_args(words)
    return int(options.run(options))


def _cache_features(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Run a frozen backbone over every frame and store its features in shards of the same names.

    Give the folder as `features` to the data module. A run that was stopped goes on where it was; of several runs for
    a folder, one works and the others wait. With --components, run it for the training shards first: the projection is
    fitted to the first run's shards, kept in the folder, and taken by every later run with the same --out (validation,
    test).
    """
    add = parser.add_argument
    add("shards", nargs="+", help="local shards of videos: paths or patterns")
    add("--backbone", required=True, help="efficientnet_lite0, or a model of timm")
    add("--image-size", required=True, type=size, help="size of the frames: 224, or HEIGHTxWIDTH")
    add("--out", required=True, type=Path, help="folder of the features")
    add("--layer", help="layer, or several joined by +; each backbone has a default")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", choices=("pretrained", "none"), help="published or random weights")
    source.add_argument("--checkpoint", type=Path, help="file of weights (PyTorch or safetensors)")
    add("--flips", action="store_true", help="store features of mirrored frames too")
    add("--components", type=int, help="store this many principal components of standardised channels")
    add("--resize-mode", choices=("bicubic", "bilinear"), default="bicubic", help="how frames resize")
    add("--crop", choices=("none", "center"), default="none", help="how frames are cropped")
    add("--batch-size", type=int, default=32, help="frames per call of the backbone, on the GPU where there is one")
    add("--on-bad-sample", choices=("raise", "skip"), default="raise", help="unreadable videos")
    options = vars(parser.parse_args(words))
    import torch

    from ssync_pl.data.features.cache import cache_features
    from ssync_pl.data.features.projection import describe_projection
    from ssync_pl.data.patterns import expand_shards
    from ssync_pl.hosts.nn.backbones import load_backbone

    shards = expand_shards(options.pop("shards"))
    backbone = load_backbone(*(options.pop(name) for name in ("backbone", "layer", "weights", "checkpoint")))
    report = cache_features(shards, backbone, device="cuda" if torch.cuda.is_available() else "cpu", **options)
    rows, columns = report.recipe.grid
    kind = f"{backbone.name} {backbone.layer} ({rows}x{columns} patches, {backbone.dim} channels)"
    kind += f"; {describe_projection(report.projection)}" if report.projection is not None else ""
    wrote = f"{report.written} written, {report.kept} kept"
    lines = [f"features: {kind}", f"shards:   {wrote}", *(f"skipped:  {message}" for message in report.skipped)]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


data = {
    "generate": _generate,
    "check": _check,
    "preview": _preview,
    "convert": _convert,
    "cache-features": _cache_features,
}
