"""`ssync-pl config`: the packaged configurations, and public ones converted."""

from __future__ import annotations

import argparse
import sys
from importlib import resources
from pathlib import Path

from ssync_pl.errors import ConfigError

__all__ = ["packaged_config", "packaged_configs", "run_config"]


def packaged_configs() -> dict[str, Path]:
    """List the configurations that come with the package."""
    folder = Path(str(resources.files("ssync_pl") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def packaged_config(name: str) -> Path:
    """Find a configuration that comes with the package."""
    configs = packaged_configs()
    if name not in configs:
        raise ConfigError(f"Expected the name of a packaged configuration ({', '.join(configs)}), but got {name!r}.")
    return configs[name]


def run_config(args: list[str]) -> int:
    """Print a packaged configuration, its path, or the names there are; or convert a public configuration."""
    if args[:1] == ["convert"]:
        return _convert(args[1:])
    parser = argparse.ArgumentParser(
        prog="ssync-pl config",
        description="Print a packaged configuration, e.g. `ssync-pl config ssync > ssync.yaml`. "
        "It goes after your own: `python train.py fit --config mine.yaml --config ssync.yaml`. "
        "`ssync-pl config convert --help` is about public configurations of the VideoSAUR family.",
    )
    parser.add_argument("name", nargs="?", help="name of the configuration; without it, the names are listed")
    parser.add_argument("--path", action="store_true", help="print the path of the file instead of its text")
    options = parser.parse_args(args)
    if options.name is None:
        sys.stdout.write("\n".join(packaged_configs()) + "\n")
        return 0
    path = packaged_config(options.name)
    sys.stdout.write(f"{path}\n" if options.path else path.read_text(encoding="utf-8"))
    return 0


def _convert(args: list[str]) -> int:
    from ssync_pl.data.files import write_bytes
    from ssync_pl.tools.official.convert import convert_config

    parser = argparse.ArgumentParser(
        prog="ssync-pl config convert",
        description="Translate a public configuration of VideoSAUR, SlotContrast, SRL or SSync into one for "
        "`ssync-pl fit --config`. What has no counterpart is listed, above the result and on the screen.",
    )
    parser.add_argument("file", type=Path, metavar="OFFICIAL.yaml", help="the public configuration")
    parser.add_argument("--out", type=Path, metavar="FILE.yaml", help="where the result goes (default: the screen)")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--with-ssync", action="store_true", help="add SSync, with the published settings where the file has none"
    )
    choice.add_argument("--without-ssync", action="store_true", help="leave SSync out (default: as the file does)")
    parser.add_argument("--data-root", metavar="DIR", help="folder or URL that the shards lie below")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="change a value of the public file first, in its own keys, e.g. globals.NUM_SLOTS=7; may be repeated",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="KEY",
        help="leave out a key that is not known; may be repeated",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE.yaml if it exists")
    options = parser.parse_args(args)
    if options.out is not None and options.out.exists() and not (options.force and options.out.is_file()):
        raise ConfigError(f"Expected --out to be a new file, but {options.out} exists. Add --force to replace it.")
    converted = convert_config(
        options.file,
        ssync=True if options.with_ssync else False if options.without_ssync else None,
        root=options.data_root,
        changes=options.changes,
        ignore=options.ignore,
    )
    for key, reason in converted.left_out.items():
        sys.stderr.write(f"not converted: {key}: {reason}\n")
    if options.out is None:
        sys.stdout.write(converted.to_yaml())
        return 0
    write_bytes(options.out, converted.to_yaml().encode("utf-8"))
    sys.stdout.write(f"converted: {options.out}\n")
    return 0
