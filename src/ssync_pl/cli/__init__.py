"""The command `ssync-pl`: the verbs of LightningCLI, and the package's other commands."""

import argparse
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ssync_pl import __version__
from ssync_pl.errors import SSyncError, printable, require, require_unpacked

_TRAINER = ("fit", "validate", "test", "predict")
_HELP = """usage: ssync-pl COMMAND [OPTIONS]

SSync for video object-centric models on PyTorch Lightning.

commands:
  fit        train a host model, with SSync when the callback is in the configuration
  validate   evaluate one pass over the validation videos
  test       evaluate one pass over the test videos
  predict    run the host over videos and write overlay videos and labels of their slots
  data       generate, convert, check, preview shards, cache features
  doctor     say whether SSync can be used with a model, and what to write
  compare    train variants, seeds and slot counts, and say what differs
  config     print a packaged configuration: `ssync-pl config ssync`; convert a public one: `… config convert`
  checkpoint convert public checkpoints of VideoSAUR, SlotContrast, SRL, SSync
  zoo        list public checkpoints and recipes with their scores, show or fetch one

`ssync-pl COMMAND --help` shows the options of a command, `ssync-pl --version` the version; with SSYNC_DEBUG=1 in the
environment, errors show their tracebacks.
"""
_VERBS = re.findall(r"^  (\w+) ", _HELP, re.MULTILINE)


def main(args: list[str] | None = None) -> int:
    """Runs the command line of the package, and returns its exit status."""
    try:
        return _dispatch(list(sys.argv[1:] if args is None else args))
    except BrokenPipeError:  # `| head` has read enough
        return 2
    except SystemExit as stop:  # argument parsers exit by themselves, callers of `main` get a status
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, without a code: `fit && next` must not go on
            return 143
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's way to end a training
            return 130
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
            return 1
        return stop.code or 0
    except KeyboardInterrupt:
        sys.stderr.write("\nssync-pl: stopped.\n")
        return 130
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        if os.environ.get("SSYNC_DEBUG", "") not in ("", "0"):
            traceback.print_exc()
        sys.stderr.write(f"ssync-pl: error: {reason}\n")
        return 2


def lightning() -> Any:
    """Runs the command `lightning`: its training verbs are those of `ssync-pl`, all others those of lightning-sdk."""
    words = sys.argv[1:]
    if words and words[0] in _TRAINER:
        return main(words)
    for entry in metadata.entry_points(group="console_scripts", name="lightning"):
        if entry.dist is not None and entry.dist.name.replace("_", "-") == "lightning-sdk":
            return entry.load()()
    asks = not words or words[0] in ("-h", "--help")
    text = f"lightning {{{','.join(_TRAINER)}}} is ssync-pl; all other commands need `pip install lightning-sdk`.\n"
    (sys.stdout if asks else sys.stderr).write(text)
    return 0 if asks else 2


def loading() -> None:
    """Says why the next seconds show nothing."""
    if "lightning" not in sys.modules:
        sys.stderr.write("ssync-pl: loading PyTorch\n")


def _dispatch(words: list[str]) -> int:
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help", "--version"):
        sys.stdout.write(f"ssync-pl {__version__}\n" if verb == "--version" else _HELP)
        return 0 if words else 2
    if verb in _VERBS and verb not in _TRAINER:
        from ssync_pl.cli import commands

        return run_command(f"ssync-pl {verb}", getattr(commands, verb), words[1:])
    known, alone = verb in _TRAINER or verb.startswith("-"), words == [verb] and verb in _TRAINER
    require(known, f"a command ({', '.join(_VERBS)})", repr(verb))
    require(not alone, "--config FILE or options", "none", advice=f"See ssync-pl {verb} --help.")
    words = with_config(words)
    loading()
    from ssync_pl.cli.trainer import run_trainer  # Lightning takes seconds to import, and only some commands need it

    run_trainer(words)
    return 0


def _reason(cause: BaseException | None) -> str | None:
    """Says in one line what users can mend; everything else is None, and keeps its traceback."""
    while cause is not None:
        if isinstance(cause, SSyncError):
            return str(cause)
        known = isinstance(cause, OSError | UnicodeDecodeError | ModuleNotFoundError) or "embedded null" in str(cause)
        if known or type(cause).__name__ == "MisconfigurationException":  # Lightning's, which takes seconds to import
            text = f"{type(cause).__name__}: {printable(' '.join(str(cause).split()))}"
            return text + ". Install it, or the extra of ssync-pl that has it." * isinstance(cause, ModuleNotFoundError)
        cause = cause.__cause__  # jsonargparse wraps what classes refuse
    return None


Command = Callable[[argparse.ArgumentParser, list[str]], int | None]
"""Adds options to a parser, parses words, runs, and returns the exit status (None: 0); its docstring is the help."""


def run_command(program: str, command: Command | Mapping[str, Command], words: list[str]) -> int:
    """Runs a command that is called `program` on the command line, or the one of several that the first word names."""
    raw: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    if callable(command):
        return command(argparse.ArgumentParser(program, description=inspect.getdoc(command), **raw), words) or 0
    lines = [f"  {name:<15} {(inspect.getdoc(one) or '').splitlines()[0]}" for name, one in command.items()]
    parser = argparse.ArgumentParser(program, epilog="\n".join(["commands:", *lines]), **raw)
    parser.add_argument("command", choices=command, metavar="COMMAND", help="see below, and COMMAND --help")
    name = parser.parse_args(words[:1]).command
    return run_command(f"{program} {name}", command[name], words[1:])


def size(text: str) -> tuple[int, int]:
    """Reads `24x32` or `24,32` as height and width; one number is both."""
    found = re.fullmatch(r"0*([1-9]\d*)(?:[x,]0*([1-9]\d*))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH or one number for both, but got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def with_config(words: list[str]) -> list[str]:
    """Checks the files of `--config`; without one, adds that of the run whose checkpoint is named, and says so."""
    from ssync_pl.compare.variants import read_yaml

    parser = argparse.ArgumentParser("ssync-pl", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    parser.add_argument("--ckpt_path", type=Path)
    given, rest = parser.parse_known_args(words)
    for file in given.config:
        read_yaml(file)  # jsonargparse refuses a bad file without its name
    if given.ckpt_path is not None and given.ckpt_path.exists() and not given.ckpt_path.is_dir():
        require_unpacked(given.ckpt_path, given.ckpt_path.stat().st_size)
    apart = any(word.startswith(("-h", "--help", "--print_config", "--model")) for word in rest)
    if given.config or apart or words[0] not in ("validate", "test", "predict"):
        return words
    folders = [] if given.ckpt_path is None else Path(os.path.expanduser(given.ckpt_path)).absolute().parents[:2]
    found = next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)
    expected = "--config FILE, or --ckpt_path of a run in whose folder `ssync-pl fit` saved config.yaml"
    require(found is not None, expected, given.ckpt_path or "neither")
    sys.stderr.write(f"ssync-pl: configuration: {found}\n")
    return [words[0], f"--config={found}", *words[1:]]
