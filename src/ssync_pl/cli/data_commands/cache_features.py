"""`ssync-pl data cache-features`: features of a frozen backbone, stored once for training without it."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from ssync_pl.errors import ConfigError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add `cache-features` to the commands of `ssync-pl data`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_parser(parser.add_subparsers())
        >>> words = "cache-features a.tar --backbone efficientnet_lite0 --image-size 128 --out features"
        >>> parser.parse_args(words.split()).dtype
        'bf16'
    """
    text = (
        "Run a frozen backbone over every frame and store its features in shards of the same names. Give the folder as "
        "`features` to the data module. A run that was stopped goes on where it was; several runs at once share the "
        "work. With --components, run it for the training shards first: the projection is fitted to the first run's "
        "shards, kept in the folder, and taken by every later run with the same --out (validation, test)."
    )
    parser = commands.add_parser(
        "cache-features",
        help="store the features of a frozen backbone",
        description=text,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", help="local shards of videos: paths or patterns")
    parser.add_argument("--backbone", required=True, help="efficientnet_lite0, or a model of timm")
    parser.add_argument("--image-size", required=True, help="size of the frames: 224, or HEIGHTxWIDTH")
    parser.add_argument("--out", required=True, type=Path, help="folder of the features")
    parser.add_argument("--layer", help="layer, or several joined by +; each backbone has a default")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", choices=("pretrained", "none"), help="published or random weights")
    source.add_argument("--checkpoint", type=Path, help="file of weights (PyTorch or safetensors)")
    parser.add_argument("--dtype", choices=("bf16", "int8"), default="bf16", help="how features are stored")
    parser.add_argument("--flips", action="store_true", help="store features of mirrored frames too")
    parser.add_argument("--components", type=int, help="store this many principal components of standardised channels")
    parser.add_argument("--resize-mode", choices=("bicubic", "bilinear"), default="bicubic", help="how frames resize")
    parser.add_argument("--crop", choices=("none", "center", "random"), default="none", help="random is refused")
    parser.add_argument("--batch-size", type=int, default=32, help="frames a call of the backbone")
    parser.add_argument("--device", default="auto", help="where it runs: auto, cpu, cuda, cuda:1, …")
    parser.add_argument("--on-bad-sample", choices=("raise", "skip"), default="raise", help="unreadable videos")
    parser.set_defaults(run=_cache_features)


def _cache_features(options: argparse.Namespace) -> int:
    from ssync_pl.data.features.cache import cache_features
    from ssync_pl.data.features.projection import PROJECTION_FILE, describe_projection, read_projection
    from ssync_pl.data.features.recipe import require_crop
    from ssync_pl.data.patterns import expand_shards
    from ssync_pl.hosts.nn.backbones import load_backbone

    size = _size(options.image_size)
    require_crop(options.crop)
    device = _device(options.device)
    shards = expand_shards(options.shards)
    backbone = load_backbone(options.backbone, options.layer, options.weights, options.checkpoint)
    report = cache_features(
        shards,
        backbone,
        options.out,
        image_size=size,
        resize_mode=options.resize_mode,
        crop=options.crop,
        dtype=options.dtype,
        flips=options.flips,
        batch_size=options.batch_size,
        device=device,
        on_bad_sample=options.on_bad_sample,
        components=options.components,
    )
    rows, columns = backbone.grid_for(*size)
    lines = [
        f"folder:   {options.out}",
        f"backbone: {backbone.name} {backbone.layer} ({rows}x{columns} patches, {backbone.dim} channels)",
        f"shards:   {report.written} written, {report.kept} kept",
        f"size:     {report.bytes / 1e6:.1f} MB ({options.dtype})",
    ]
    if (options.out / PROJECTION_FILE).exists():
        lines.insert(2, f"features: {describe_projection(read_projection(options.out / PROJECTION_FILE))}")
    if report.written:
        lines.append(f"speed:    {report.frames} frames, {report.frames_per_second:.1f} frames/s on {device}")
    lines += [f"skipped:  {message}" for message in report.skipped.values()]
    if report.busy:
        lines.append(f"left to another process: {', '.join(report.busy)}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if found is None or int(found.group(1)) < 1 or int(found.group(2) or 1) < 1:
        raise ConfigError(f"Expected --image-size to be a number of pixels or HEIGHTxWIDTH, but got {text!r}.")
    return int(found.group(1)), int(found.group(2) or found.group(1))


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"Expected --device to be a device of this machine, but got {name!r} ({str(error).splitlines()[0]})."
        ) from error
    return name
