"""`ssync-pl data convert`: shards from the original files of known data sets, or from a user's own videos."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["add_parser"]

_SOURCES = ("movi", "ytvis", "davis", "videos")


def add_parser(commands: Any) -> None:
    """Add `convert` to the commands of `ssync-pl data`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.

    Example:
        >>> import argparse
        >>> parser = argparse.ArgumentParser()
        >>> add_parser(parser.add_subparsers())
        >>> parser.parse_args(["convert", "movi", "--root", "tfds", "--out", "shards"]).workers is None
        True
    """
    text = "Convert a data set to shards. A run that was stopped goes on where it was when it is started again."
    parser = commands.add_parser("convert", help="convert a data set, or own videos, to shards", description=text)
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name in _SOURCES:
        importlib.import_module(f"ssync_pl.data.convert.{name}").add_parser(sources)
