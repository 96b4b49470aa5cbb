"""The options of `ssync-pl predict --input …`, and the configuration of a checkpoint's run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssync_pl.errors import ConfigError

__all__ = ["add_input_options", "describe_windows", "refuse_alone", "with_config"]

_CONFIG = "config.yaml"  # what `ssync-pl fit` saves its configuration as, in the folder of the run
_INPUT = (
    "Videos to predict instead of the data module's: video files (mp4, avi, mov, mkv, webm, gif), folders of frames "
    "(png, jpg), folders of videos, shards (tar). May come several times. The data module then only "
    "says how frames are resized, cropped and normalised, and which features the host reads. Runs on one device. "
    "Without --config, config.yaml of the checkpoint's run is taken."
)
_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "out": (
        str | None,
        None,
        "Folder of the predictions of --input: new, empty, or one of earlier predictions. Default: predictions in the "
        "run's log folder.",
    ),
    "clip_frames": (
        int,
        64,
        "Most frames that the host sees at once with --input. Longer videos are cut into windows that share a frame. "
        "Hosts that can start from given slots (SAVi, VideoSAUR, SlotContrast) carry them over; for all others slots "
        "are matched on the shared frame, so that an object may change its slot between windows.",
    ),
    "projection": (
        str | None,
        None,
        "With --input, projection.npz of the cached features that the host was trained on, where it is not in their "
        "folder.",
    ),
    "backbone_checkpoint": (
        str | None,
        None,
        "With --input, weights of the backbone of the cached features, where they are not the published ones.",
    ),
}


def add_input_options(parser: Any) -> None:
    """Adds `--input` and its companions to the parser of `predict`."""
    parser.add_argument("--input", nargs="+", action="extend", type=str, default=None, help=_INPUT)
    for name, (kind, default, text) in _OPTIONS.items():
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, type=kind, default=default, help=text)


def refuse_alone(options: Mapping[str, Any], has_writer: bool) -> None:
    """Refuses options that would have no effect: those of `--input` without it, `--out` beside a configured writer."""
    for name, (_, default, _) in _OPTIONS.items():
        if not options.get("input") and options.get(name) not in (None, default):
            raise ConfigError(f"Expected --{name} only with --input, but got it alone. Leave it out.")
    if has_writer and options.get("out") is not None:
        raise ConfigError(
            "Expected --out only without a prediction writer in the configuration, but there is one. Set its folder "
            "there, or leave the writer out."
        )


def with_config(words: Sequence[str]) -> list[str]:
    """Adds the run's configuration where there is `--input` and no `--config`, and says so on standard error."""
    names = [word.partition("=")[0] for word in words]
    if names[:1] != ["predict"] or "--input" not in names or {"-h", "--help", "--print_config"} & {*names}:
        return list(words)
    checkpoint = _value(words, "--ckpt_path")
    if checkpoint is not None and not Path(checkpoint).expanduser().exists():
        raise ConfigError(
            f"Expected --ckpt_path to be a checkpoint, but {checkpoint} does not exist. Give its path, such as "
            "runs/NAME/version_0/checkpoints/last.ckpt."
        )
    if any(name in ("--config", "-c") or name.startswith("--model") for name in names):
        return list(words)
    if checkpoint is None:
        raise ConfigError(
            "Expected --ckpt_path beside --input, or --config FILE, but got neither. Pass the checkpoint of a run: "
            "ssync-pl predict --ckpt_path runs/NAME/version_0/checkpoints/last.ckpt --input PATH."
        )
    folders = list(Path(checkpoint).expanduser().absolute().parents[:2])  # RUN/checkpoints/NAME.ckpt or RUN/NAME.ckpt
    found = next((folder / _CONFIG for folder in folders if (folder / _CONFIG).is_file()), None)
    if found is None:
        raise ConfigError(
            f"Expected {_CONFIG} in {' or '.join(map(str, folders))}, where `ssync-pl fit` saves it, but there is "
            "none. Pass the configuration that the checkpoint was trained with: --config FILE."
        )
    sys.stderr.write(f"ssync-pl: configuration: {found}\n")
    return [words[0], f"--config={found}", *words[1:]]


def _value(words: Sequence[str], name: str) -> str | None:
    found = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word.startswith(f"{name}="):
            found = word.partition("=")[2]
        elif word == name:
            found = following
    return found


def describe_windows(videos: Sequence[Any], carried: bool) -> str:
    """Says how slots were kept over the windows of long videos; empty where no video was cut."""
    cut = [f"{video.key} ({video.windows})" for video in videos if video.windows > 1]
    if not cut:
        return ""
    names = ", ".join(cut[:5]) + (f", … ({len(cut)} videos)" if len(cut) > 5 else "")
    how = "carried over from window to window" if carried else "matched by window: an object may change its slot"
    return f"windows: {names}. Slots are {how}.\n"
