"""Video files and folders of frames: their frames, which mask belongs to which frame, and their size in shards."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssync_pl.data.decode import decode_picture, decode_video
from ssync_pl.errors import ShardError, require, require_shard

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
PICTURE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp")
MAX_BYTES = 1 << 32  # of one sample's frames: a worker has to hold them


def read_frames(
    path: Path, names: Sequence[str] | None, wanted: range | None, stamp: int | None, where: str, least: int = 1
) -> Iterator[np.ndarray]:
    """Read frames (h, w, 3) uint8 of one size: `names` in a folder, or those of a file (see `decode_video`)."""
    if names is None:
        yield from decode_video(path, where, wanted, stamp=stamp, least=least)
        return
    size: tuple[int, ...] | None = None
    for name in names if wanted is None else names[wanted.start : wanted.stop]:
        frame = decode_picture(path / name, f"frame {path / name} of {where}")
        size = size or frame.shape
        expected = f"all frames of {where} to have the first one's size, {size[0]} x {size[1]} (height x width)"
        require_shard(frame.shape == size, expected, f"{frame.shape[0]} x {frame.shape[1]} in {name}")
        yield frame


def stack_frames(
    frames: Iterable[np.ndarray], short_side: int | None, where: str
) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize frames while they are read (published shards round the longer side down); also return their first size."""
    kept: list[np.ndarray] = []
    original = (0, 0)
    for frame in frames:
        original = (frame.shape[0], frame.shape[1])
        if short_side is not None and min(original) != short_side:
            height, width = (side * short_side // min(original) for side in original)
            frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        kept.append(frame)
        fits, advice = len(kept) * frame.nbytes <= MAX_BYTES, "Cut it with --clip-frames, or take a --short-side."
        require_shard(fits, f"the frames of {where} to take at most {MAX_BYTES} bytes", "more", advice=advice)
    require_shard(bool(kept), f"{where} to have frames", "none", advice="Unpack or export it again.")
    return np.stack(kept), original


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key that takes digits for numbers: `frame2` comes before `frame10`; different names have different keys."""
    parts = re.split(r"([0-9]+)", name.lower())
    return (*(int(part) if number % 2 else part for number, part in enumerate(parts)), name)


def mask_owner(path: Path) -> str | None:
    """Name of the video whose masks are called so: `a` for `a_masks`, empty for `masks`; None for what is no masks."""
    name = path.name if path.is_dir() else re.sub("[-_. ]?[0-9]*$", "", path.stem)  # a picture's may be numbered
    found = re.fullmatch(r"(?s:(.*)[-_. ])?(?:masks?|labels?|annotations?|segmentations?|gt)", name, re.IGNORECASE)
    return None if found is None else found[1] or ""


def list_pictures(folder: Path, extensions: tuple[str, ...] = PICTURE_EXTENSIONS) -> list[str]:
    """Names of the pictures in a folder, in natural order; none when there is no such folder."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else iter(())
    kept = (name for name in names if name.lower().endswith(extensions) and not name.startswith("."))
    return sorted(kept, key=natural_key)


def list_frames(folder: Path) -> list[str]:
    """Names of the frames in a folder; `ConfigError` where two pictures share their numbers, or a name without any, as
    frames and their masks do."""
    names = list_pictures(folder)
    first: dict[tuple[str, ...], str] = {}
    for name in names:
        stem, advice = Path(name).stem, f"Move masks to {folder}_masks."
        other = first.setdefault(tuple(number.lstrip("0") for number in re.findall("[0-9]+", stem)) or (stem,), name)
        fits = other == name and mask_owner(folder / name) is None
        require(fits, f"one picture per frame in {folder}, and no masks", *dict.fromkeys((other, name)), advice=advice)
    return names


def pair_masks(frames: Sequence[str] | None, masks: Sequence[str], where: str, folder: Path) -> list[str]:
    """Find the mask of each frame by name or last number, never by position; frames of a file count from 0 or 1 on."""
    if frames is None:
        first = 0 if 0 in map(_number, masks) else 1
        frames = [str(number) for number in range(first, first + len(masks))]
    found = []
    for key in (lambda name: Path(name).stem, _number):
        by_frame, by_mask = {key(name): name for name in frames}, {key(name): name for name in masks}
        lonely = [name for name in frames if key(name) not in by_mask or by_frame[key(name)] != name]
        strays = [name for name in masks if key(name) not in by_frame or by_mask[key(name)] != name]
        if not lonely and not strays:
            return [by_mask[key(name)] for name in frames]
        found.append((lonely, strays))
    lonely, strays = min(found, key=lambda pair: len(pair[0]) + len(pair[1]))
    raise ShardError(
        f"Expected a mask for each of the {len(frames)} frames of {where}, but got {len(masks)} in {folder}: first "
        f"frame without a mask {next(iter(lonely), 'none')}, first mask without a frame {next(iter(strays), 'none')}. "
        "Name each mask after its frame, or number both."
    )


def _number(name: str) -> int:
    found = re.findall(r"[0-9]+", Path(name).stem)
    return int(found[-1]) if found else -1


def read_ids(folder: Path, names: Sequence[str], where: str, size: tuple[int, int]) -> np.ndarray:
    """Read id masks (F, h, w), grey or palette pictures of the size that their frames have."""
    expected = f"the masks of {where} to be {size[0]} x {size[1]} (height x width) like its frames"
    kept = []
    for path in (folder / name for name in names):
        kept.append(decode_picture(path, f"mask {path} of {where}", ids=True))
        require_shard(kept[-1].shape == size, expected, f"{kept[-1].shape[0]} x {kept[-1].shape[1]} in {path}")
    return np.stack(kept)


def resize_ids(ids: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize masks (F, h, w, ...) to the pixel under each target pixel's centre ("nearest-exact")."""
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, ids.shape[1:3], strict=True))
    return ids[:, rows[:, None], columns]
