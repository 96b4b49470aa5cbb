"""Options and words of `ssync-pl predict --input …`, made ready for LightningCLI."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssync_pl.errors import ConfigError

__all__ = ["INPUT_OPTIONS", "describe_windows", "find_config", "gather_inputs", "refuse_alone", "with_config"]

_CONFIG = "config.yaml"  # what `ssync-pl fit` saves its configuration as, in the folder of the run
_INPUT = "--input"


class InputOption(NamedTuple):
    """Name, type, default and help of an option that `predict` has and the other verbs have not."""

    name: str
    kind: Any
    default: Any
    help: str


INPUT_OPTIONS = (
    InputOption(
        "input",
        list[str] | None,
        None,
        "Videos to predict instead of the data module's: video files (mp4, avi, mov, mkv, webm, gif), folders of "
        "frames (png, jpg), folders of videos, shards (tar; braces and globs). May come several times. The data module "
        "then only says how frames are resized, cropped and normalised, and which features the host reads. Runs on one "
        "device. Without --config, config.yaml of the checkpoint's run is taken.",
    ),
    InputOption(
        "out",
        str | None,
        None,
        "Folder of the predictions of --input: new, empty, or one of earlier predictions. Default: predictions in the "
        "run's log folder.",
    ),
    InputOption(
        "clip_frames",
        int,
        64,
        "Most frames that the host sees at once with --input. Longer videos are cut into windows that share a frame. "
        "Hosts that can start from given slots (SAVi, VideoSAUR, SlotContrast) carry them over; for all others slots "
        "are matched on the shared frame, so that an object may change its slot between windows.",
    ),
    InputOption(
        "projection",
        str | None,
        None,
        "With --input, projection.npz of the cached features that the host was trained on, where it is not in their "
        "folder.",
    ),
    InputOption(
        "backbone_checkpoint",
        str | None,
        None,
        "With --input, weights of the backbone of the cached features, where they are not the published ones.",
    ),
)


def refuse_alone(options: Mapping[str, Any], has_writer: bool) -> None:
    """Refuses options that would have no effect: those of `--input` without it, `--out` beside a configured writer."""
    if not options.get("input"):
        for option in INPUT_OPTIONS[1:]:
            if options.get(option.name) not in (None, option.default):
                raise ConfigError(f"Expected --{option.name} only with --input, but got it alone. Leave it out.")
    elif has_writer and options.get("out") is not None:
        raise ConfigError(
            "Expected --out only without a prediction writer in the configuration, but there is one. Set its folder "
            "there, or leave the writer out."
        )


def gather_inputs(words: Sequence[str]) -> list[str]:
    """Joins all inputs into one option, and spells options with underscores as LightningCLI does.

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
            spelled = name.replace("-", "_").replace("__", "--", 1) if name.startswith(("--clip", "--back")) else name
            rest.append(spelled + equals + value)
    if not inputs:
        return list(words)
    return [*rest, f"{_INPUT}={json.dumps(inputs, ensure_ascii=False)}"]


def with_config(words: list[str]) -> list[str]:
    """Adds the run's configuration to the words where there is `--input` and no `--config`, and says so on stderr.

    Raises:
        ConfigError: There is no configuration to be found, or no checkpoint that exists.
    """
    asks = any(word in ("-h", "--help") or word.startswith("--print_config") for word in words)
    if words[:1] != ["predict"] or _option(words, _INPUT) is None or asks:
        return list(words)
    checkpoint = _option(words, "--ckpt_path")
    named = any(word in ("--config", "-c") or word.startswith(("--config=", "-c=", "--model")) for word in words)
    if named:
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


def find_config(checkpoint: str) -> Path:
    """Finds `config.yaml` of the run of a checkpoint `RUN/checkpoints/NAME.ckpt` or `RUN/NAME.ckpt`."""
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise ConfigError(
            f"Expected --ckpt_path to be a checkpoint, but {checkpoint} does not exist. Give its path, such as "
            "runs/NAME/version_0/checkpoints/last.ckpt."
        )
    folders = list(dict.fromkeys([path.absolute().parent, path.absolute().parent.parent]))
    for folder in folders:
        if (folder / _CONFIG).is_file():
            return folder / _CONFIG
    raise ConfigError(
        f"Expected {_CONFIG} in {' or '.join(map(str, folders))}, where `ssync-pl fit` saves it, but there is none. "
        "Pass the configuration that the checkpoint was trained with: --config FILE."
    )


def describe_windows(videos: Sequence[Any], carried: bool) -> str:
    """Says how slots were kept over the windows of long videos; empty where no video was cut."""
    cut = [f"{video.key} ({video.windows})" for video in videos if video.windows > 1]
    if not cut:
        return ""
    names = ", ".join(cut[:5]) + (f", … ({len(cut)} videos)" if len(cut) > 5 else "")
    how = (
        "Slots are carried over from window to window."
        if carried
        else "Slots are matched by window: an object may change its slot between windows."
    )
    return f"windows: {names}. {how}\n"


def _option(words: Sequence[str], name: str) -> str | None:
    found = None
    for number, word in enumerate(words):
        if word.startswith(f"{name}="):
            found = word[len(name) + 1 :]
        elif word == name and number + 1 < len(words):
            found = words[number + 1]
    return found
