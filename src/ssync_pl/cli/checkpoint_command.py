"""`ssync-pl checkpoint`: public checkpoints of the VideoSAUR family for the hosts of this package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssync_pl.errors import ConfigError

if TYPE_CHECKING:
    from ssync_pl.tools.official.checkpoints import ConvertedCheckpoint

__all__ = ["run_checkpoint"]


def run_checkpoint(args: list[str]) -> int:
    """Converts a public checkpoint, or shows what it holds; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="ssync-pl checkpoint",
        description="Public checkpoints of VideoSAUR, SlotContrast, SRL and SSync for the hosts of this package.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    convert = commands.add_parser(
        "convert",
        help="write a checkpoint that `ssync-pl validate|test|predict --ckpt_path` and `load_from_checkpoint` take",
        description="Find the host from names and shapes of the tensors, load it strictly, and write a checkpoint of "
        "it. Only tensors and plain values are read: nothing in the file can run.",
    )
    show = commands.add_parser(
        "show",
        help="tell host and options of a public checkpoint",
        description="Find the host from names and shapes of the tensors and load it strictly; nothing is written.",
    )
    for command in (convert, show):
        command.add_argument(
            "file", type=Path, metavar="OFFICIAL.ckpt", help="file of Lightning, PyTorch or safetensors"
        )
    convert.add_argument("out", type=Path, metavar="OUT.ckpt", help="where the result goes")
    for command in (convert, show):
        command.add_argument(
            "--config",
            type=Path,
            metavar="OFFICIAL.yaml",
            help="public configuration of the training, for what no shape tells",
        )
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="OPTION=VALUE",
            dest="changes",
            help="an option of the host, e.g. num_slots=11; may be repeated",
        )
    convert.add_argument("--force", action="store_true", help="replace OUT.ckpt if it exists")
    return _convert(parser.parse_args(args))


def _convert(options: argparse.Namespace) -> int:
    import yaml

    from ssync_pl.tools.official.checkpoints import convert_checkpoint
    from ssync_pl.tools.official.convert import host_options

    out: Path | None = getattr(options, "out", None)
    if out is not None and out.exists() and not (options.force and out.is_file()):
        raise ConfigError(f"Expected OUT.ckpt to be a new file, but {out} exists. Add --force to replace it.")
    own = {}
    for change in options.changes:
        name, sign, value = change.partition("=")
        if not sign or not name:
            raise ConfigError(f"Expected --set OPTION=VALUE such as num_slots=7, but got {change!r}.")
        try:
            own[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise ConfigError(f"Expected a value that YAML can read in --set {change!r}, but got another.") from error
    described = host_options(options.config) if options.config is not None else None
    done = convert_checkpoint(options.file, out, described=described, options=own)
    sys.stdout.write("\n".join(_report(done)) + "\n")
    if out is not None:
        sys.stdout.write(f"converted: {out}\n")
    return 0


def _report(done: ConvertedCheckpoint) -> list[str]:
    lines = [f"host:      {done.host}"]
    lines += [f"  {name}: {_plain(value)}" for name, value in sorted(done.options.items())]
    lines.append(f"tensors:   {done.tensors}, loaded strictly")
    if done.assumed:
        lines.append(f"assumed:   {', '.join(sorted(done.assumed))}: no shape tells, published values; change by --set")
    if done.dropped:
        lines.append(f"dropped:   {', '.join(done.dropped)}: parts of another training that the host does not need")
    return lines


def _plain(value: Any) -> str:
    return "null" if value is None else str(value)
