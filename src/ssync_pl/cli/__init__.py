"""The command `ssync-pl`: the verbs of LightningCLI, and the package's other commands."""

from __future__ import annotations

import io
import os
import sys
import traceback
from importlib import import_module

from ssync_pl import __version__
from ssync_pl.errors import SSyncError

__all__ = ["main"]

_TRAINER_VERBS = {
    "fit": "train a host model, with SSync when the callback is in the configuration",
    "validate": "evaluate one pass over the validation videos",
    "test": "evaluate one pass over the test videos",
    "predict": "run the host over videos and write overlay videos and labels of their slots",
}
_OTHER_VERBS = {
    "data": "generate, convert, check, preview shards, cache features",
    "doctor": "say whether SSync can be used with a model, and what to write",
    "compare": "train variants, seeds, slot counts and sets, and say what differs",
    "config": "print a packaged configuration: `ssync-pl config ssync`; convert a public one: `… config convert`",
    "checkpoint": "convert public checkpoints of VideoSAUR, SlotContrast, SRL, SSync",
}
_VERBS = {**_TRAINER_VERBS, **_OTHER_VERBS}
_MODULES = {"config": "official", "checkpoint": "official"}
_HELP = f"""usage: ssync-pl COMMAND [OPTIONS]

SSync for video object-centric models on PyTorch Lightning.

commands:
{chr(10).join(f"  {name:<10} {text}" for name, text in _VERBS.items())}

options:
  -h, --help   show this text; `ssync-pl COMMAND --help` shows the options of a command
  --version    print the version
  --debug      show tracebacks of configuration errors, as SSYNC_DEBUG=1 does

example:
  ssync-pl fit --config examples/savi_synthetic.yaml
"""


def main(args: list[str] | None = None) -> int:
    """Runs the command line of the package, and returns its exit status."""
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words or os.environ.get("SSYNC_DEBUG", "") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a name that the terminal cannot show must not end what works
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
        resumes = words[:2] == ["data", "convert"] or words[:1] == ["compare"]
        again = " The same command goes on where this one was stopped." if resumes else ""
        sys.stderr.write(f"\nssync-pl: stopped.{again}\n")
        return 130
    except (SSyncError, OSError, UnicodeDecodeError) as error:
        if debug:
            traceback.print_exc()
        kind = "" if isinstance(error, SSyncError) else f"{type(error).__name__}: "
        sys.stderr.write(f"ssync-pl: error: {kind}{error}\n")
        return 2


def _dispatch(words: list[str], debug: bool) -> int:
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help", "--version"):
        sys.stdout.write(f"ssync-pl {__version__}\n" if verb == "--version" else _HELP)
        return 0 if words else 2
    # Lightning takes seconds to import, and only some commands need it.
    if verb in _OTHER_VERBS:
        return int(getattr(import_module(f"ssync_pl.cli.{_MODULES.get(verb, verb)}"), f"run_{verb}")(words[1:]))
    if verb not in _TRAINER_VERBS and not verb.startswith("-"):
        sys.stderr.write(f"ssync-pl: error: Expected a command ({', '.join(_VERBS)}), but got {verb!r}.\n")
        return 2
    if words == [verb] and verb in _TRAINER_VERBS:
        sys.stderr.write(f"ssync-pl {verb}: error: Expected --config FILE or options. See ssync-pl {verb} --help.\n")
        return 2
    if sys.stderr.isatty():
        sys.stderr.write("ssync-pl: loading PyTorch and Lightning\n")
    from ssync_pl.cli.trainer import run_trainer

    run_trainer(words, debug=debug)
    return 0
