"""Folders of frames and masks: their names, which mask belongs to which frame, and their sizes in the shards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssync_pl.data.decode import decode_picture
from ssync_pl.errors import ConfigError, ShardError

__all__ = [
    "PICTURE_EXTENSIONS",
    "is_mask_folder",
    "list_frames",
    "list_pictures",
    "natural_key",
    "pair_masks",
    "read_ids",
    "resize_frame",
    "resize_ids",
    "short_side_size",
    "stack_frames",
]

PICTURE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp")
"""Files that are taken for frames."""

_MASK_ENDINGS = ("_masks", "_mask")
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_MAX_BYTES = 1 << 32  # arrays of one sample; a tar member ends at 8 GiB, and a worker has to hold it


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key that takes digits for numbers: `frame2` comes before `frame10`; different names have different keys."""
    parts = re.split(r"([0-9]+)", name.lower())
    return (*(int(part) if number % 2 else part for number, part in enumerate(parts)), name)


def is_mask_folder(name: str) -> bool:
    """Whether a folder beside videos holds masks: `masks`, `mask`, or any name that ends in `_masks` or `_mask`."""
    return name in ("masks", "mask") or name.endswith(_MASK_ENDINGS)


def list_pictures(folder: Path, extensions: tuple[str, ...] = PICTURE_EXTENSIONS) -> list[str]:
    """Names of the pictures in a folder, in natural order; none when there is no such folder."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else iter(())
    kept = (name for name in names if name.lower().endswith(extensions) and not name.startswith("."))
    return sorted(kept, key=natural_key)


def list_frames(folder: Path) -> list[str]:
    """Names of the frames in a folder; `ConfigError` where two pictures share a name, as frames and their masks do."""
    names = list_pictures(folder)
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(Path(name).stem, name)
        if other != name:
            raise ConfigError(
                f"Expected one picture per frame in {folder}, but got {other} and {name}. If one of them is a mask, "
                f"move the masks to {folder}_masks."
            )
    return names


def pair_masks(frames: Sequence[str] | None, masks: Sequence[str], where: str, folder: Path) -> list[str]:
    """Find the mask of each frame by name, or by the last number in the name; never by position.

    Frames of a file have no names: their masks are numbered from 0 or from 1 on.
    """
    if frames is None:
        numbers = [_number(mask) for mask in masks]
        first = numbers[0] if numbers and numbers[0] in (0, 1) else 0
        for mask, number, wanted in zip(masks, numbers, range(first, first + len(masks)), strict=False):
            if number != wanted:
                raise ShardError(
                    f"Expected the masks of {where} in {folder} to be numbered without a gap, from 0 or 1 on, but got "
                    f"{mask} in place of number {wanted}. Name each mask after its frame."
                )
        return list(masks)
    found = []
    for key in (lambda name: Path(name).stem, _number):
        by_frame, by_mask = {key(name): name for name in frames}, {key(name): name for name in masks}
        unique = len(by_frame) == len(frames) and len(by_mask) == len(masks)
        if unique and by_frame.keys() == by_mask.keys():
            return [by_mask[key(name)] for name in frames]
        lonely = [name for name in frames if key(name) not in by_mask]
        found.append((lonely, [name for name in masks if key(name) not in by_frame]))
    lonely, strays = min(found, key=lambda pair: len(pair[0]) + len(pair[1]))
    raise ShardError(
        f"Expected a mask for each of the {len(frames)} frames of {where}, but got {len(masks)} in {folder}: first "
        f"frame without a mask {next(iter(lonely), 'none')}, first mask without a frame {next(iter(strays), 'none')}. "
        "Name each mask after its frame."
    )


def _number(name: str) -> int | None:
    found = re.findall(r"[0-9]+", Path(name).stem)
    return int(found[-1]) if found else None


def read_ids(path: Path, where: str, size: tuple[int, int]) -> np.ndarray:
    """Read one id mask (h, w), a grey or palette picture, of the size that its frames have."""
    ids = decode_picture(path, f"mask {path} of {where}", ids=True)
    if ids.shape != size:
        raise ShardError(
            f"Expected the masks of {where} to be {size[0]} x {size[1]} (height x width) like its frames, but {path} "
            f"is {ids.shape[0]} x {ids.shape[1]}. Export them at the video's size."
        )
    return ids


def stack_frames(
    frames: Iterable[np.ndarray], short_side: int | tuple[int, int] | None, resample: str, where: str
) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize frames while they are read; return them (F, H, W, 3) and the height and width that they had.

    `short_side` may also be a height and width, whatever the proportions; None keeps the size.
    """
    kept: list[np.ndarray] = []
    original = size = (0, 0)
    for frame in frames:
        original = (frame.shape[0], frame.shape[1])
        size = short_side if isinstance(short_side, tuple) else short_side_size(original, short_side)
        kept.append(resize_frame(frame, size, resample))
        check_bytes(len(kept) * kept[-1].nbytes, len(kept), where)
    if not kept:
        raise ShardError(f"Expected {where} to have frames, but got none. Unpack or export it again.")
    return np.stack(kept), original


def check_bytes(size: int, frames: int, where: str) -> None:
    """Refuse a sample that would not fit into memory."""
    if size > _MAX_BYTES:
        raise ShardError(
            f"Expected a sample of {where} to take at most {_MAX_BYTES >> 30} GiB, but its first {frames} frames take "
            "more. Cut the video with --clip-frames, or take fewer or smaller frames."
        )


def short_side_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """Height and width of the same proportions; the long side is rounded down, as in published shards."""
    if short_side is None:
        return size
    height, width = size
    if height <= width:
        return short_side, max(short_side, width * short_side // height)
    return max(short_side, height * short_side // width), short_side


def resize_frame(frame: np.ndarray, size: tuple[int, int], resample: str = "bicubic") -> np.ndarray:
    """Resize one frame (h, w, 3) with Pillow's anti-aliased filters, or `nearest` as `resize_ids` does."""
    if frame.shape[:2] == size:
        return frame
    if resample == "nearest":
        return resize_ids(frame, size)
    return np.asarray(Image.fromarray(frame).resize(size[::-1], _FILTERS[resample]))


def resize_ids(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize masks (h, w, ...) to the pixel under each target pixel's centre ("nearest-exact")."""
    if ids.shape[:2] == size:
        return ids
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, ids.shape, strict=False))
    return ids[rows[:, None], columns]
