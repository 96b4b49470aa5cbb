"""`ssync-pl data convert davis`: DAVIS 2017 from its pictures and palette masks.

Source: https://davischallenge.org/davis2017/code.html (folders, palette ids, 255 = void).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.convert.media import read_frames
from ssync_pl.data.convert.options import add_common, add_resize, check_common, encode_video, print_report
from ssync_pl.data.convert.pictures import list_pictures, pair_masks, read_ids, resize_ids, stack_frames
from ssync_pl.data.convert.writer import Item, convert
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["DavisDecode", "add_parser"]

_PREFIXES = {"train": "train", "val": "validation", "test-dev": "test-dev", "test-challenge": "test-challenge"}
_VOID = 255
_FPS = 24


@dataclass(frozen=True)
class DavisDecode:
    """Make the members of one DAVIS video.

    `video.npy` (F, h, w, 3) uint8; where every frame is annotated `segmentations.npy.gz` (F, h, w, 1) uint8 ids, 0 =
    background; where only the first is (test-dev), `first_segmentation.npy.gz` (1, h, w, 1), so that no score takes
    the other frames for empty; `info.json`. Void pixels (255) become background, and `info.json` counts them.
    """

    pictures: Path
    annotations: Path
    short_side: int | None = None
    resample: str = "bicubic"
    video_format: str = "npy"

    def __call__(self, item: Item) -> dict[str, Any]:
        """Read, choose and resize; `ShardError` names what is damaged or does not fit."""
        name, frames, masks = item.source["video"], item.source["frames"], item.source["masks"]
        where = f"video {name} ({self.pictures / name})"
        shown = read_frames(self.pictures / name, frames, None, None, where)
        video, stored = stack_frames(shown, self.short_side, self.resample, where)
        members = encode_video(video, self.video_format, where, fps=_FPS)
        info: dict[str, Any] = {"video": name, "file_names": list(frames), "original_size": list(stored)}
        if masks:
            if [Path(mask).stem for mask in masks] != [Path(frame).stem for frame in frames[:1]]:
                masks = pair_masks(frames, masks, where, self.annotations / name)
            ids = np.stack([read_ids(self.annotations / name / file, where, stored) for file in masks])
            if ids.max() > _VOID:
                raise ShardError(f"Expected ids from 0 to 255 in the masks of {where}, but got {ids.max()}.")
            stack = np.stack([resize_ids(one, video.shape[1:3]) for one in np.where(ids == _VOID, 0, ids)])
            member = "segmentations" if len(masks) == len(frames) else "first_segmentation"
            members[f"{member}.npy.gz"] = stack[..., None].astype(np.uint8)
            info["void_pixels"] = int((ids == _VOID).sum())
            info["object_ids"] = sorted(set(np.unique(ids).tolist()) - {0, _VOID})
        return {**members, "info.json": info}


def add_parser(commands: Any) -> None:
    """Add `davis` to the commands of `ssync-pl data convert`."""
    text = (
        "Convert DAVIS 2017: <root>/JPEGImages/480p/<video>/00000.jpg, <root>/Annotations/480p/<video>/00000.png and "
        "<root>/ImageSets/2017/<split>.txt. Masks are ids; void pixels (255) become background. Videos whose first "
        "frame alone is annotated get `first_segmentation.npy.gz` instead of `segmentations.npy.gz`."
    )
    parser = commands.add_parser("davis", help="DAVIS 2017", description=text)
    parser.add_argument("--root", required=True, type=Path, help="folder that holds JPEGImages and ImageSets")
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=tuple(_PREFIXES),
        default=["train", "val"],
        help="shards of `val` are called davis-validation (default: train val)",
    )
    parser.add_argument("--resolution", default="480p", help="folder below JPEGImages (default: 480p)")
    parser.add_argument(
        "--annotations",
        default="Annotations",
        help="folder of the masks, e.g. Annotations_unsupervised (default: Annotations)",
    )
    add_resize(parser, default=None)
    add_common(parser)
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    settings = check_common(options)
    pictures = options.root / "JPEGImages" / options.resolution
    annotations = options.root / options.annotations / options.resolution
    for folder, option in ((pictures, "--resolution"), (annotations, "--annotations")):
        if not folder.is_dir():
            raise ConfigError(
                f"Expected a folder {folder}, but there is none. Check --root and {option}, or unpack the set there."
            )
    decode = DavisDecode(pictures, annotations, options.short_side, options.resample, options.video_format)
    items = {}
    for split in dict.fromkeys(options.splits):
        sources = [
            {
                "video": name,
                "frames": list_pictures(pictures / name),
                "masks": list_pictures(annotations / name, (".png",)),
            }
            for name in _names(options.root / "ImageSets" / "2017" / f"{split}.txt")
        ]
        items[split] = [Item(f"{number:06d}", source) for number, source in enumerate(sources)]
    for split, found in items.items():
        recipe = {
            "format": "davis2017",
            "split": split,
            "resolution": options.resolution,
            "annotations": options.annotations,
            "short_side": options.short_side,
            "resample": options.resample,
            "video_format": options.video_format,
            "void": "background",
        }
        print_report(convert(found, decode, options.out, f"davis-{_PREFIXES[split]}", recipe=recipe, **settings))
    return 0


def _names(path: Path) -> list[str]:
    if not path.is_file():
        raise ConfigError(
            f"Expected the videos' names in {path}, but there is no such file. Check --root and --splits; DAVIS 2017 "
            "has the splits train and val, and test-dev and test-challenge in files of their own."
        )
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    odd = [name for name in names if name in (".", "..") or any(mark in name for mark in "/\\")]
    if odd or not names or len(set(names)) < len(names):
        got = repr(odd[0]) if odd else f"{len(names)} names, {len(set(names))} of them different"
        raise ConfigError(f"Expected one name of a video per line in {path}, each once, but got {got}.")
    return names
