"""What several commands do with their words."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssync_pl.errors import ConfigError, require

__all__ = ["Command", "choose_command", "key_values", "refuse_existing", "run_command"]

Command = Callable[[argparse.ArgumentParser, list[str]], int]
"""Adds options to a parser, parses words, runs, and returns the exit status; its docstring is the help."""


def run_command(program: str, command: Command, words: list[str]) -> int:
    """Runs a command that is called `program` on the command line."""
    text, raw = inspect.getdoc(command), argparse.RawDescriptionHelpFormatter
    return command(argparse.ArgumentParser(program, description=text, formatter_class=raw, allow_abbrev=False), words)


def choose_command(program: str, commands: Mapping[str, Command], words: list[str]) -> int:
    """Runs the command that the first word names."""
    lines = [f"  {name:<15} {(inspect.getdoc(command) or '').splitlines()[0]}" for name, command in commands.items()]
    epilog, raw = "\n".join(["commands:", *lines]), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(program, epilog=epilog, formatter_class=raw)
    parser.add_argument("command", choices=commands, metavar="COMMAND", help="see below, and COMMAND --help")
    name = parser.parse_args(words[:1]).command
    return run_command(f"{program} {name}", commands[name], words[1:])


def key_values(words: Sequence[str], option: str) -> dict[str, Any]:
    """Reads words like `num_slots=7`, whose values are YAML."""
    import yaml

    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        valid = bool(equals) and name.isidentifier()
        require(valid, f"{option} NAME=VALUE, such as {option} num_slots=7", repr(word))
        try:
            values[name] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise ConfigError(f"Expected {option} {name}= with a YAML value, but got {text!r}.") from error
    return values


def refuse_existing(path: Path, option: str, force: bool) -> None:
    """Refuses a file that exists, unless it is one and may be replaced."""
    free = not path.exists() or (force and path.is_file())
    require(free, f"{option} to be a new file", f"{path}, which exists", advice="Add --force to replace a file.")
