"""`ssync-pl data convert davis`: DAVIS 2017 from its pictures and palette masks.

Source: https://davischallenge.org/davis2017/code.html (folders, palette ids, 255 = void).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssync_pl.data.convert.pictures import (
    PICTURE_EXTENSIONS,
    Resample,
    natural_key,
    read_ids,
    read_picture,
    resize_frame,
    resize_ids,
    short_side_size,
)
from ssync_pl.data.convert.sizes import add_resize, check_short_side
from ssync_pl.errors import ConfigError, ShardError

if TYPE_CHECKING:
    from ssync_pl.data.convert.engine import Item

__all__ = ["DavisDecode", "add_parser"]

_PREFIXES = {"train": "train", "val": "validation", "test-dev": "test-dev", "test-challenge": "test-challenge"}
_VOID = 255
_FPS = 24


@dataclass(frozen=True)
class DavisDecode:
    """Make the members of one DAVIS video.

    `video.npy` (F, h, w, 3) uint8; where every frame is annotated `segmentations.npy.gz` (F, h, w, 1) uint8 ids, 0 =
    background; where only the first is (test-dev), `first_segmentation.npy.gz` (1, h, w, 1), so that no score takes
    the other frames for empty; `info.json`. Void pixels (255) become background, which scores of objects leave out;
    `info.json` counts them.

    Args:
        pictures: Folder of the videos' folders.
        annotations: The same for masks.
        short_side: Pixels of the shorter side; None keeps the size.
        resample: How frames are resized; masks always go to the nearest pixel.
        video_format: `npy` or `mp4`.

    Example:
        >>> DavisDecode(Path("JPEGImages/480p"), Path("Annotations/480p")).video_format
        'npy'
    """

    pictures: Path
    annotations: Path
    short_side: int | None = None
    resample: Resample = "bicubic"
    video_format: str = "npy"

    def __call__(self, item: Item) -> dict[str, Any]:
        """Read and resize.

        Args:
            item: `source` has the `video`, its `frames` and its `masks` (file names).

        Returns:
            Members of the sample.

        Raises:
            ShardError: Frames are missing, damaged or of different sizes, or only some are annotated.
        """
        from ssync_pl.data.convert.options import encode_video

        name, frames, masks = item.source["video"], item.source["frames"], item.source["masks"]
        where = f"video {name}"
        if not frames:
            raise ShardError(
                f"Expected frames of {where} in {self.pictures / name}, but got none. Unpack the set again, or take "
                "the name out of ImageSets."
            )
        stems, drawn = [Path(frame).stem for frame in frames], [Path(mask).stem for mask in masks]
        if drawn not in (stems, stems[:1], []):
            raise ShardError(
                f"Expected a mask for each of the {len(stems)} frames of {where}, or for the first alone, or none, but "
                f"got {len(drawn)} in {self.annotations / name}"
                f"{_difference(stems, drawn)}. Unpack the annotations again."
            )
        stored = read_picture(self.pictures / name / frames[0], where).shape[:2]
        size = short_side_size((stored[0], stored[1]), self.short_side)
        video = np.empty((len(frames), *size, 3), np.uint8)
        for index, file in enumerate(frames):
            frame = read_picture(self.pictures / name / file, where)
            _check_size(frame, stored, self.pictures / name / file, where)
            video[index] = resize_frame(frame, size, self.resample)
        members = encode_video(video, self.video_format, where, fps=_FPS)
        info: dict[str, Any] = {"video": name, "file_names": list(frames), "original_size": list(stored)}
        if masks:
            member = "segmentations.npy.gz" if len(masks) == len(frames) else "first_segmentation.npy.gz"
            members[member], facts = self._read_masks(name, masks, stored, size, where)
            info.update(facts)
        return {**members, "info.json": info}

    def _read_masks(
        self, name: str, masks: list[str], stored: tuple[int, ...], size: tuple[int, int], where: str
    ) -> tuple[np.ndarray, dict[str, Any]]:
        stack = np.empty((len(masks), *size, 1), np.uint8)
        void, found = 0, set()
        for index, file in enumerate(masks):
            ids = read_ids(self.annotations / name / file, where)
            _check_size(ids, stored, self.annotations / name / file, where)
            if ids.max() > _VOID:
                raise ShardError(
                    f"Expected ids from 0 to 255 in mask {self.annotations / name / file} of {where}, but got "
                    f"{ids.max()}. Unpack the annotations again."
                )
            void += int((ids == _VOID).sum())
            found |= set(np.unique(ids).tolist())
            stack[index, :, :, 0] = resize_ids(np.where(ids == _VOID, 0, ids), size)
        return stack, {"void_pixels": void, "object_ids": sorted(found - {0, _VOID})}


def _check_size(picture: np.ndarray, stored: tuple[int, ...], path: Path, where: str) -> None:
    if picture.shape[:2] != stored:
        raise ShardError(
            f"Expected all frames and masks of {where} to be {stored[0]} x {stored[1]} (height x width) like the first "
            f"frame, but {path} is {picture.shape[0]} x {picture.shape[1]}. Take pictures and masks of one resolution."
        )


def add_parser(commands: Any) -> None:
    """Add `davis` to the commands of `ssync-pl data convert`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_parser(parser.add_subparsers())
        >>> parser.parse_args(["davis", "--root", "DAVIS", "--out", "shards"]).resolution
        '480p'
    """
    from ssync_pl.data.convert.options import add_common

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
    from ssync_pl.data.convert.engine import Item, convert
    from ssync_pl.data.convert.options import common, print_report

    settings = common(options)
    check_short_side(options.short_side)
    pictures = options.root / "JPEGImages" / options.resolution
    annotations = options.root / options.annotations / options.resolution
    for folder, option in ((pictures, "--resolution"), (annotations, "--annotations")):
        if not folder.is_dir():
            raise ConfigError(
                f"Expected a folder {folder}, but there is none. Check --root and {option}, or unpack the set there."
            )
    decode = DavisDecode(pictures, annotations, options.short_side, options.resample, options.video_format)
    plans = []
    for split in dict.fromkeys(options.splits):
        names = _names(options.root / "ImageSets" / "2017" / f"{split}.txt")
        sources = [
            {
                "video": name,
                "frames": _files(pictures / name, PICTURE_EXTENSIONS),
                "masks": _files(annotations / name, (".png",)),
            }
            for name in names
        ]
        plans.append((split, [Item(f"{number:06d}", source) for number, source in enumerate(sources)]))
    for split, items in plans:
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
        print_report(convert(items, decode, options.out, f"davis-{_PREFIXES[split]}", recipe=recipe, **settings))
    return 0


def _names(path: Path) -> list[str]:
    if not path.is_file():
        raise ConfigError(
            f"Expected the videos' names in {path}, but there is no such file. Check --root and --splits; DAVIS 2017 "
            "has the splits train and val, and test-dev and test-challenge in files of their own."
        )
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise ConfigError(f"Expected a video's name a line in {path}, but it is empty. Download it again.")
    for name in names:
        if name in (".", "..") or any(mark in name for mark in "/\\"):
            raise ConfigError(f"Expected a video's name a line in {path}, but got {name!r}. Take the 2017 lists.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"Expected each video once in {path}, but got {twice!r} twice. Remove one.")
    return names


def _files(folder: Path, extensions: tuple[str, ...]) -> list[str]:
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir() if path.suffix.lower() in extensions)
    return sorted((name for name in names if not name.startswith(".")), key=natural_key)


def _difference(stems: list[str], drawn: list[str]) -> str:
    odd = [stem for stem in stems if stem not in drawn] + [stem for stem in drawn if stem not in stems]
    return f" (first difference: {odd[0]})" if odd else ""
