"""The command `ssync-pl`: training verbs of LightningCLI, the data generator and the packaged configuration."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from ssync_pl import __version__
from ssync_pl.errors import SSyncError

__all__ = ["main"]

DEBUG_VARIABLE = "SSYNC_DEBUG"

_TRAINER_VERBS = {
    "fit": "train a host model, with SSync when the callback is in the configuration",
    "validate": "evaluate one pass over the validation videos",
    "test": "evaluate one pass over the test videos",
    "predict": "run the host over videos and write overlay videos and labels of their slots",
}
_OTHER_VERBS = {
    "data": "generate, convert, check, preview shards, cache features: `ssync-pl data --help`",
    "doctor": "say whether SSync can be used with a model, and what to write: `ssync-pl doctor --help`",
    "compare": "train variants, seeds, slot counts and sets, and say what differs: `ssync-pl compare --help`",
    "config": "print a packaged configuration: `ssync-pl config ssync`; convert a public one: `… config convert`",
    "checkpoint": "convert public checkpoints of VideoSAUR, SlotContrast, SRL, SSync: `ssync-pl checkpoint --help`",
}


def _help() -> str:
    verbs = {**_TRAINER_VERBS, **_OTHER_VERBS}
    lines = [f"  {verb:<10} {text}" for verb, text in verbs.items()]
    return "\n".join(
        [
            "usage: ssync-pl COMMAND [OPTIONS]",
            "",
            "SSync for video object-centric models on PyTorch Lightning.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  -h, --help   show this text; `ssync-pl COMMAND --help` shows the options of a command",
            "  --version    print the version",
            f"  --debug      show tracebacks of configuration errors, as {DEBUG_VARIABLE}=1 does",
            "",
            "example:",
            "  ssync-pl fit --config examples/savi_synthetic.yaml",
            "",
        ]
    )


def main(args: list[str] | None = None) -> int:
    """Run the command line of the package."""
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words, debug)
    except SystemExit as stop:  # argument parsers exit by themselves, callers of `main` get a status
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, without a code: `fit && next` must not go on
            return 143
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        sys.stderr.write(f"{stop.code}\n")
        return 1
    except KeyboardInterrupt:
        again = " The same command goes on where this one was stopped." if _goes_on(words) else ""
        sys.stderr.write(f"\nssync-pl: stopped.{again}\n")
        return 130
    except (SSyncError, OSError, UnicodeDecodeError) as error:
        if debug:
            traceback.print_exc()
        kind = "" if isinstance(error, SSyncError) else f"{type(error).__name__}: "
        sys.stderr.write(f"ssync-pl: error: {kind}{error}\n")
        return 2


def _goes_on(words: list[str]) -> bool:
    return words[:2] == ["data", "convert"] or words[:1] == ["compare"]


def _dispatch(words: list[str], debug: bool) -> int:
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0 if words else 2
    if words[0] == "--version":
        sys.stdout.write(f"ssync-pl {__version__}\n")
        return 0
    if words[0] in _OTHER_VERBS:
        return _other_commands()[words[0]](words[1:])
    if words[0] in _TRAINER_VERBS or words[0].startswith("-"):
        from ssync_pl.cli.trainer import run_trainer

        run_trainer(words, debug=debug)
        return 0
    known = ", ".join({**_TRAINER_VERBS, **_OTHER_VERBS})
    sys.stderr.write(f"ssync-pl: error: Expected a command ({known}), but got {words[0]!r}. See ssync-pl --help.\n")
    return 2


def _other_commands() -> dict[str, Callable[[list[str]], int]]:
    # Lightning takes seconds to import, and these commands do not need it.
    from ssync_pl.cli.checkpoint_command import run_checkpoint
    from ssync_pl.cli.compare_command import run_compare
    from ssync_pl.cli.config_command import run_config
    from ssync_pl.cli.data_commands import run_data
    from ssync_pl.cli.doctor_command import run_doctor

    return {
        "data": run_data,
        "doctor": run_doctor,
        "compare": run_compare,
        "config": run_config,
        "checkpoint": run_checkpoint,
    }
