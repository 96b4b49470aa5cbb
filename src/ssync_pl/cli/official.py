"""`ssync-pl config` and `ssync-pl checkpoint`: packaged configurations, and public ones with their checkpoints."""

from __future__ import annotations

import argparse
import sys
from importlib import resources
from pathlib import Path

from ssync_pl.cli.words import choose_command, refuse_existing, run_command
from ssync_pl.errors import require

__all__ = ["packaged_config", "run_checkpoint", "run_config"]


def packaged_config(name: str) -> Path:
    """Finds a configuration that comes with the package."""
    configs = _packaged_configs()
    require(name in configs, f"the name of a packaged configuration ({', '.join(configs)})", repr(name))
    return configs[name]


def _packaged_configs() -> dict[str, Path]:
    folder = Path(str(resources.files("ssync_pl") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def run_config(words: list[str]) -> int:
    """Prints a packaged configuration, its path, or the names there are; or converts a public configuration."""
    if words[:1] == ["convert"]:
        return run_command("ssync-pl config convert", _convert_config, words[1:])
    return run_command("ssync-pl config", _config, words)


def run_checkpoint(words: list[str]) -> int:
    """Converts a public checkpoint; returns the exit status."""
    return choose_command("ssync-pl checkpoint", {"convert": _convert_checkpoint}, words)


def _config(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Print a packaged configuration, e.g. `ssync-pl config ssync > ssync.yaml`.

    It goes after your own: `python train.py fit --config mine.yaml --config ssync.yaml`. `ssync-pl config convert
    --help` is about public configurations of the VideoSAUR family.
    """
    parser.add_argument("name", nargs="?", help="name of the configuration; without it, the names are listed")
    parser.add_argument("--path", action="store_true", help="print the path of the file instead of its text")
    options = parser.parse_args(words)
    if options.name is None:
        sys.stdout.write("\n".join(_packaged_configs()) + "\n")
        return 0
    path = packaged_config(options.name)
    sys.stdout.write(f"{path}\n" if options.path else path.read_text(encoding="utf-8"))
    return 0


def _convert_config(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Translate a public configuration of VideoSAUR, SlotContrast, SRL or SSync into one for `ssync-pl fit --config`.

    What has no counterpart is listed, above the result and on the screen.
    """
    change = "change a value of the public file first, in its own keys, e.g. globals.NUM_SLOTS=7, or leave a key out "
    change += "(KEY=null); may be repeated"
    parser.add_argument("file", type=Path, metavar="OFFICIAL.yaml", help="the public configuration")
    parser.add_argument("--out", type=Path, metavar="FILE.yaml", help="where the result goes (default: the screen)")
    parser.add_argument("--data-root", metavar="DIR", help="folder or URL that the shards lie below")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help=change)
    parser.add_argument("--force", action="store_true", help="replace FILE.yaml if it exists")
    options = parser.parse_args(words)
    from ssync_pl.data.files import write_bytes
    from ssync_pl.tools.official.convert import convert_config

    if options.out is not None:
        refuse_existing(options.out, "--out", options.force)
    converted = convert_config(options.file, root=options.data_root, changes=options.changes)
    for key, reason in converted.left_out.items():
        sys.stderr.write(f"not converted: {key}: {reason}\n")
    if options.out is None:
        sys.stdout.write(converted.to_yaml())
    else:
        write_bytes(options.out, converted.to_yaml().encode("utf-8"))
        sys.stdout.write(f"converted: {options.out}\n")
    return 0


def _convert_checkpoint(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Write the tensors of a public checkpoint as one for `ssync-pl validate|test|predict --ckpt_path`.

    It goes beside the configuration of `ssync-pl config convert`. Only tensors and plain values are read: nothing in
    the file can run.
    """
    parser.add_argument("file", type=Path, metavar="OFFICIAL.ckpt", help="file of Lightning, PyTorch or safetensors")
    parser.add_argument("out", type=Path, metavar="OUT.ckpt", help="where the result goes")
    parser.add_argument("--force", action="store_true", help="replace OUT.ckpt if it exists")
    options = parser.parse_args(words)
    from ssync_pl.tools.official.checkpoints import convert_checkpoint

    refuse_existing(options.out, "OUT.ckpt", options.force)
    for name in convert_checkpoint(options.file, options.out):
        sys.stderr.write(f"left out: {name}: a part of another training that no host has\n")
    sys.stdout.write(f"converted: {options.out}\n")
    return 0
