"""The command `lightning`: training verbs go to `ssync-pl`, all else to the command of `lightning-sdk`."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

__all__ = ["main"]

_VERBS = ("fit", "validate", "test", "predict")
_HELP = """usage: lightning {fit,validate,test,predict} [OPTIONS]

These verbs are those of ssync-pl: `lightning fit --config FILE` is `ssync-pl fit --config FILE`.
All other commands belong to the package lightning-sdk, which is not installed: run `pip install lightning-sdk`.
"""


def main() -> Any:
    """Runs `lightning WORDS...`, with the words of `sys.argv`."""
    words = sys.argv[1:]
    if words and words[0] in _VERBS:
        from ssync_pl import cli

        return cli.main(words)
    try:
        entries = metadata.distribution("lightning-sdk").entry_points
    except metadata.PackageNotFoundError:
        entries = metadata.EntryPoints()
    for entry in entries:
        if (entry.group, entry.name) == ("console_scripts", "lightning"):
            return entry.load()()
    asks = not words or words[0] in ("-h", "--help")
    error = f"lightning: error: Expected a verb ({', '.join(_VERBS)}), but got {' '.join(words)!r}.\n"
    (sys.stdout if asks else sys.stderr).write(_HELP if asks else error + _HELP)
    return 0 if asks else 2
