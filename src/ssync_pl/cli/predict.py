"""The options of `ssync-pl predict --input …`, and the configuration of a checkpoint's run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssync_pl.errors import require

__all__ = ["add_input_options", "describe_windows", "refuse_alone", "with_config"]

_CONFIG = "config.yaml"  # what `ssync-pl fit` saves its configuration as, in the folder of the run
_INPUT = (
    "Videos to predict instead of the data module's: video files, folders of frames (png, jpg), folders of videos, "
    "shards. May come several times. The data module then only says how frames are resized, cropped and normalised, "
    "and which features the host reads. Without --config, config.yaml of the checkpoint's run is taken."
)
_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "out": (str | None, None, "Folder of the predictions of --input. Default: predictions in the run's log folder."),
    "clip_frames": (
        int,
        64,
        "Most frames that the host sees at once with --input. Longer videos are cut into windows that share a frame.",
    ),
    "projection": (
        str | None,
        None,
        "With --input, projection.npz of the cached features of the training, where it is not in their folder.",
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
        alone = not options.get("input") and options.get(name) not in (None, default)
        require(not alone, f"--{name} only with --input", "it alone", advice="Leave it out.")
    expected = "--out only without a prediction writer in the configuration"
    require(not has_writer or options.get("out") is None, expected, "both", advice="Set the writer's folder instead.")


def with_config(words: Sequence[str]) -> list[str]:
    """Adds the run's configuration where there is `--input` and no `--config`, and says so on standard error."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--input", nargs="*")
    parser.add_argument("--ckpt_path", type=Path)
    given, rest = parser.parse_known_args(words)
    names = {word.partition("=")[0] for word in rest}
    if words[:1] != ["predict"] or given.input is None or {"-h", "--help", "--print_config"} & names:
        return list(words)
    path = None if given.ckpt_path is None else given.ckpt_path.expanduser().absolute()
    require(path is None or path.exists(), "--ckpt_path to be a checkpoint", f"{path}, which does not exist")
    if any(name in ("--config", "-c") or name.startswith("--model") for name in names):
        return list(words)
    advice = "Pass --ckpt_path runs/NAME/version_0/checkpoints/last.ckpt, or the configuration as well: --config FILE."
    require(path is not None, "--ckpt_path beside --input", "none", advice=advice)
    assert path is not None
    folders = list(path.parents[:2])  # RUN/checkpoints/NAME.ckpt or RUN/NAME.ckpt
    found = next((folder / _CONFIG for folder in folders if (folder / _CONFIG).is_file()), None)
    where = f"{_CONFIG} in {' or '.join(map(str, folders))}, where `ssync-pl fit` saves it"
    require(found is not None, where, "none", advice="Pass the configuration of the training: --config FILE.")
    sys.stderr.write(f"ssync-pl: configuration: {found}\n")
    return [words[0], f"--config={found}", *words[1:]]


def describe_windows(videos: Sequence[Any], carried: bool) -> str:
    """Says how slots were kept over the windows of long videos; empty where no video was cut."""
    cut = [f"{video.key} ({video.windows})" for video in videos if video.windows > 1]
    if not cut:
        return ""
    names = ", ".join(cut[:5]) + (f", … ({len(cut)} videos)" if len(cut) > 5 else "")
    how = "carried over from window to window" if carried else "matched by window: an object may change its slot"
    return f"windows: {names}. Slots are {how}.\n"
