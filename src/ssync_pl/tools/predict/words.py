"""The words of `ssync-pl predict --input …`, made ready for LightningCLI."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ssync_pl.errors import ConfigError

__all__ = ["CONFIG_NAME", "find_config", "gather_inputs", "option_value", "with_config"]

CONFIG_NAME = "config.yaml"
"""What `ssync-pl fit` saves its configuration as, in the folder of the run."""

_INPUT = "--input"


def gather_inputs(words: Sequence[str]) -> list[str]:
    """Join all inputs into one option, and spell options with underscores as LightningCLI does.

    Args:
        words: Words after the program's name. `--input` may come several times, with one path or several.

    Returns:
        The words with one `--input=[…]` at the end; unchanged for other verbs, and without `--input`.

    Example:
        >>> gather_inputs(["predict", "--input", "a.mp4", "b.mp4", "--clip-frames", "8", "--input=c"])
        ['predict', '--clip_frames', '8', '--input=["a.mp4", "b.mp4", "c"]']
    """
    if not words or words[0] != "predict":
        return list(words)
    inputs: list[str] = []
    rest: list[str] = []
    waiting = False
    for word in words:
        name, equals, value = word.partition("=")
        if waiting and not word.startswith("-"):
            inputs.append(word)
            continue
        waiting = word == _INPUT
        if name == _INPUT and equals:
            inputs.append(value)
        elif not waiting:
            spelled = {"--clip-frames": "--clip_frames", "--backbone-checkpoint": "--backbone_checkpoint"}
            rest.append(spelled.get(name, name) + equals + value)
    if not inputs:
        return list(words)
    return [*rest, f"{_INPUT}={json.dumps(inputs, ensure_ascii=False)}"]


def option_value(words: Sequence[str], name: str) -> str | None:
    """Find the value of an option.

    Args:
        words: Words of the command line.
        name: The option, with its dashes.

    Returns:
        The last value; None where the option is not there.

    Example:
        >>> option_value(["--a=1", "--a", "2"], "--a"), option_value(["--a=1"], "--b")
        ('2', None)
    """
    found = None
    for number, word in enumerate(words):
        if word.startswith(f"{name}="):
            found = word[len(name) + 1 :]
        elif word == name and number + 1 < len(words):
            found = words[number + 1]
    return found


def find_config(checkpoint: str) -> Path:
    """Find the configuration of the run that a checkpoint comes from.

    Args:
        checkpoint: Path of the checkpoint: `RUN/checkpoints/NAME.ckpt`, or `RUN/NAME.ckpt`.

    Returns:
        `config.yaml` in the checkpoint's folder or the one above.

    Raises:
        ConfigError: There is none, or no such checkpoint.

    Example:
        >>> find_config("/nowhere/last.ckpt")
        Traceback (most recent call last):
        ssync_pl.errors.ConfigError: Expected --ckpt_path to be a checkpoint, but /nowhere/last.ckpt does not exist. ...
    """
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise ConfigError(
            f"Expected --ckpt_path to be a checkpoint, but {checkpoint} does not exist. Give its path, such as "
            "runs/NAME/version_0/checkpoints/last.ckpt."
        )
    # A sharded checkpoint is a folder.
    folders = list(dict.fromkeys([path.absolute().parent, path.absolute().parent.parent]))
    for folder in folders:
        if (folder / CONFIG_NAME).is_file():
            return folder / CONFIG_NAME
    raise ConfigError(
        f"Expected {CONFIG_NAME} in {' or '.join(map(str, folders))}, where `ssync-pl fit` saves it, but there is "
        "none. Pass the configuration that the checkpoint was trained with: --config FILE."
    )


def with_config(words: list[str]) -> list[str]:
    """Add the run's configuration to the words where they name none.

    Args:
        words: What `gather_inputs` returned.

    Returns:
        The words, with `--config` where there was `--input` and no `--config`. Which one was taken is said on stderr.

    Raises:
        ConfigError: There is no configuration to be found, or no checkpoint that exists.

    Example:
        >>> with_config(["predict", "--config", "a.yaml"])
        ['predict', '--config', 'a.yaml']
    """
    asks = any(word in ("-h", "--help") or word.startswith("--print_config") for word in words)
    if words[:1] != ["predict"] or option_value(words, _INPUT) is None or asks:
        return list(words)
    checkpoint = option_value(words, "--ckpt_path")
    named = any(word == "--config" or word == "-c" or word.startswith(("--config=", "-c=")) for word in words)
    if named or any(word.startswith("--model") for word in words):
        if checkpoint is not None and not Path(checkpoint).expanduser().exists():
            find_config(checkpoint)  # refuses it by name
        return list(words)
    if checkpoint is None:
        raise ConfigError(
            "Expected --ckpt_path beside --input, or --config FILE, but got neither. Pass the checkpoint of a run: "
            "ssync-pl predict --ckpt_path runs/NAME/version_0/checkpoints/last.ckpt --input PATH."
        )
    config = find_config(checkpoint)
    sys.stderr.write(f"ssync-pl: configuration: {config}\n")
    return [words[0], f"--config={config}", *words[1:]]
