"""The command `lightning`: training verbs go to `ssync-pl`, all else to the command of `lightning-sdk`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

__all__ = ["main"]

TRAINER_VERBS = ("fit", "validate", "test", "predict")
SDK = "lightning-sdk"

_HELP = """usage: lightning {fit,validate,test,predict} [OPTIONS]

These verbs are those of ssync-pl: `lightning fit --config FILE` is `ssync-pl fit --config FILE`.
All other commands belong to the package lightning-sdk, which is not installed: run `pip install lightning-sdk`.
"""


def _sdk_command() -> Callable[[], Any] | None:
    try:
        entry_points = metadata.distribution(SDK).entry_points
    except metadata.PackageNotFoundError:
        return None
    for entry_point in entry_points:
        if entry_point.group == "console_scripts" and entry_point.name == "lightning":
            command: Callable[[], Any] = entry_point.load()
            return command
    return None


def main() -> Any:
    """Run `lightning WORDS...`, with the words of `sys.argv`."""
    words = sys.argv[1:]
    if words and words[0] in TRAINER_VERBS:
        from ssync_pl import cli

        return cli.main(words)
    command = _sdk_command()
    if command is not None:
        return command()
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_HELP)
        return 0
    sys.stderr.write(
        f"lightning: error: `lightning {words[0]}` belongs to the package {SDK}, which is not installed. "
        f"Run `pip install {SDK}`. This command is ssync-pl's and runs {', '.join(TRAINER_VERBS)}.\n"
    )
    return 2
