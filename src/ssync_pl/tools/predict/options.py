"""Options of `ssync-pl predict` that belong to `--input`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssync_pl.errors import ConfigError
from ssync_pl.tools.predictions import SlotPredictions

__all__ = ["INPUT_OPTIONS", "InputOption", "input_writer", "refuse_alone", "require_host"]

_CELL = 480  # users' videos are larger than those that hosts are trained on


@dataclass(frozen=True)
class InputOption:
    """An option of the command line.

    Args:
        name: Its name, without dashes.
        kind: Its type.
        default: Its default.
        help: What `--help` says.

    Example:
        >>> [option.name for option in INPUT_OPTIONS]
        ['input', 'out', 'clip_frames', 'projection', 'backbone_checkpoint']
    """

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
        "out", str | None, None, "Folder of the predictions of --input. Default: predictions in the run's log folder."
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
"""Options that `predict` has and the other verbs have not."""


def input_writer(options: Mapping[str, Any]) -> SlotPredictions:
    """Build the callback that writes predictions where the configuration names none.

    Args:
        options: Settings of `predict`.

    Returns:
        The callback; with `input` it also writes label pictures, and larger videos.

    Example:
        >>> input_writer({}).label_pngs, input_writer({"input": ["a.mp4"]}).label_pngs
        (False, True)
    """
    if not options.get("input"):
        return SlotPredictions()
    return SlotPredictions(options.get("out"), label_pngs=True, cell=_CELL)


def refuse_alone(options: Mapping[str, Any], has_writer: bool) -> None:
    """Refuse options that would have no effect.

    Args:
        options: Settings of `predict`.
        has_writer: Whether the configuration names a prediction writer.

    Raises:
        ConfigError: An option of `--input` stands without it, or `--out` beside a writer that has a folder of its own.

    Example:
        >>> refuse_alone({"out": "mine"}, has_writer=False)
        Traceback (most recent call last):
        ssync_pl.errors.ConfigError: Expected --out only with --input, but got it alone. Leave it out.
    """
    if not options.get("input"):
        for option in INPUT_OPTIONS[1:]:
            if options.get(option.name) not in (None, option.default):
                raise ConfigError(f"Expected --{option.name} only with --input, but got it alone. Leave it out.")
    elif has_writer and options.get("out") is not None:
        raise ConfigError(
            "Expected --out only without a prediction writer in the configuration, but there is one. Set its folder "
            "there, or leave the writer out."
        )


def require_host(wanted: str, found: str) -> None:
    """Refuse a checkpoint of another host than the configuration's.

    Args:
        wanted: Class of the configuration's model.
        found: Class of the checkpoint's.

    Raises:
        ConfigError: They differ.

    Example:
        >>> require_host("SAVi", "SAVi")
    """
    if wanted != found:
        raise ConfigError(
            f"Expected --ckpt_path to be a checkpoint of {wanted}, the model of the configuration, but it is one of "
            f"{found}. Take the configuration that it was trained with: config.yaml in the folder of its run."
        )
