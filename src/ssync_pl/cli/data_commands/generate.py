"""`ssync-pl data generate`: shards of synthetic video with exact masks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ssync_pl.errors import ConfigError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add `generate` to the commands of `ssync-pl data`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_parser(parser.add_subparsers())
        >>> parser.parse_args(["generate", "--out", "data"]).train
        440
    """
    text = "Generate videos of rigid bodies that fall and collide, with exact masks. Equal seeds give equal videos."
    parser = commands.add_parser(
        "generate",
        help="generate shards of synthetic video",
        description=text,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--preset", default="a", help="look of the scenes: a, a_zoom, c, e or cluttered")
    parser.add_argument("--out", required=True, type=Path, help="folder in which the data set gets its own folder")
    parser.add_argument("--train", type=int, default=440, help="number of training videos")
    parser.add_argument("--validation", type=int, default=48, help="number of validation videos")
    parser.add_argument("--resolution", type=int, default=argparse.SUPPRESS, help="height and width in pixels")
    parser.add_argument("--frames", type=int, default=argparse.SUPPRESS, help="frames a video")
    parser.add_argument("--seed", type=int, default=0, help="seed of all videos")
    parser.add_argument("--workers", type=int, default=argparse.SUPPRESS, help="processes; 0 uses this one only")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="change a setting of the preset, e.g. zoom=1.5; may be repeated",
    )
    parser.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    from ssync_pl.data.synthetic import generate
    from ssync_pl.data.synthetic.config import preset

    for name in ("train", "validation"):
        if getattr(options, name) < 0:
            raise ConfigError(f"Expected --{name} to be a number of videos, but got {getattr(options, name)}.")
    changes = dict(_change(text) for text in options.changes)
    changes.update({key: getattr(options, key) for key in ("resolution", "frames") if hasattr(options, key)})
    config = preset(options.preset, **changes)
    splits = {name: getattr(options, name) for name in ("train", "validation") if getattr(options, name)}
    if not splits:
        raise ConfigError("Expected --train or --validation to be above 0, but both are 0.")
    extra = {"num_workers": options.workers} if hasattr(options, "workers") else {}
    folder = Path(generate(options.out, config, splits=splits, seed=options.seed, **extra))
    sys.stdout.write(f"folder:     {folder}\n")
    for name, count in splits.items():
        videos = f"{count} video" + ("s" if count != 1 else "")
        sys.stdout.write(f"{name + ':':<11} {_pattern(folder, name)} ({videos})\n")
    return 0


def _change(text: str) -> tuple[str, Any]:
    import yaml

    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ConfigError(f"Expected --set KEY=VALUE, but got {text!r}. Write for example --set zoom=1.5.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"Expected --set {key}= to have a YAML value, but got {value!r}.") from error


def _pattern(folder: Path, split: str) -> str:
    files = sorted(path for path in folder.rglob("*.tar") if split in path.name)
    if not files:
        raise ConfigError(f"Expected shards of {split!r} in {folder}, but found none. Remove it and run again.")
    if len(files) == 1:
        return str(files[0])
    first, last = files[0].stem, files[-1].stem
    head = first.rstrip("0123456789")
    return str(files[0].with_name(f"{head}{{{first[len(head) :]}..{last[len(head) :]}}}.tar"))
