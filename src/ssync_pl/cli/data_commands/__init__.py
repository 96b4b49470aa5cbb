"""The commands of `ssync-pl data`, one a module."""

from __future__ import annotations

import argparse
import importlib

__all__ = ["run_data"]

_COMMANDS = ("generate", "check", "preview", "convert", "cache_features")


def run_data(args: list[str]) -> int:
    """Run one of the data commands.

    Args:
        args: Words after `ssync-pl data`.

    Returns:
        The exit status.

    Raises:
        ConfigError: A setting is unknown or out of range.

    Example:
        >>> import tempfile
        >>> words = "generate --resolution 16 --frames 1 --train 1 --validation 1 --workers 0 --set antialias=1"
        >>> run_data([*words.split(), "--out", tempfile.mkdtemp(prefix="ssync-doctest-")])  # doctest: +ELLIPSIS
        folder:     ...
        train:      ...-train-000000.tar (1 video)
        validation: ...-validation-000000.tar (1 video)
        0
    """
    parser = argparse.ArgumentParser(prog="ssync-pl data", description="Data sets.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        importlib.import_module(f"ssync_pl.cli.data_commands.{name}").add_parser(commands)
    options = parser.parse_args(args)
    return int(options.run(options))
