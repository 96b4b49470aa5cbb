"""A folder of videos: which entries are videos, which are their masks, and what is neither."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.convert.media import VIDEO_EXTENSIONS
from ssync_pl.data.convert.pictures import PICTURE_EXTENSIONS, natural_key, read_ids
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["Folder", "Masks", "scan_folder"]

_ARRAYS = (".masks.npy", ".masks.npz")
_MASK_PICTURES = (".png", ".bmp")
_KEYS = ("segmentations", "masks")


@dataclass(frozen=True)
class Folder:
    """What a folder of videos holds.

    Args:
        videos: JSON values of each video, in natural order: `video` (name below the root), `names` (of its frames; null
            for a file), `bytes` (of a file), `masks` (null, or `path`, `names` and `bytes`).
        ignored: Reason → names of what is no video.

    Example:
        >>> Folder([{"video": "a.mp4"}]).ignored
        {}
    """

    videos: list[dict[str, Any]]
    ignored: dict[str, list[str]] = field(default_factory=dict)


def scan_folder(root: Path) -> Folder:
    """Sort the entries of a folder.

    Args:
        root: The folder.

    Returns:
        Its videos with their masks, and what was ignored.

    Raises:
        ConfigError: There is no video, or masks cannot be told to belong to one video.

    Example:
        >>> scan_folder(Path("/nowhere"))
        Traceback (most recent call last):
        ssync_pl.errors.ConfigError: Expected --root to be a folder of videos, but /nowhere is none. ...
    """
    if not root.is_dir():
        raise ConfigError(
            f"Expected --root to be a folder of videos, but {root} is none. Name the folder that holds the video "
            "files, or one sub-folder of frames a video."
        )
    ignored: dict[str, list[str]] = {}
    videos: dict[str, dict[str, Any]] = {}
    masks: dict[str, list[dict[str, Any]]] = {}
    folders: dict[str, list[str]] = {}
    for path in sorted(root.iterdir(), key=lambda path: natural_key(path.name)):
        name = path.name
        if name.startswith("."):
            ignored.setdefault("hidden", []).append(name)
        elif path.is_dir():
            folders[name] = [] if name == "masks" else _pictures(path, PICTURE_EXTENSIONS)
        elif name.lower().endswith(_ARRAYS):
            masks.setdefault(name[: -len(_ARRAYS[0])], []).append(_mask_file(path, name))
        elif path.suffix.lower() in VIDEO_EXTENSIONS:
            videos[name] = {"video": name, "names": None, "bytes": path.stat().st_size}
        else:
            ignored.setdefault("no media", []).append(name)
    for name, names in folders.items():
        if name.endswith("_masks"):
            masks.setdefault(name[: -len("_masks")], []).append(_mask_folder(root / name, name))
        elif names:
            videos[name] = {"video": name, "names": names, "bytes": None}
        elif name != "masks":
            ignored.setdefault("folders without frames", []).append(name)
    if "masks" in folders:
        for path in sorted((root / "masks").iterdir(), key=lambda path: natural_key(path.name)):
            if path.is_dir() and not path.name.startswith("."):
                masks.setdefault(path.name, []).append(_mask_folder(path, f"masks/{path.name}"))
            else:
                ignored.setdefault("no masks", []).append(f"masks/{path.name}")
    if not videos:
        raise _no_videos(root, ignored)
    _match(root, videos, masks)
    ordered = sorted(videos, key=natural_key)
    return Folder([videos[name] for name in ordered], ignored)


@dataclass(frozen=True)
class Masks:
    """Masks of one video, frame by frame.

    Args:
        root: Folder of the videos.
        source: `masks` of an entry of `Folder.videos`.
        where: The video, for messages.

    Example:
        >>> Masks(Path("videos"), {"path": "a_masks", "names": ["0.png", "1.png"]}, "a.mp4").names
        ['0.png', '1.png']
    """

    root: Path
    source: dict[str, Any]
    where: str

    @property
    def names(self) -> list[str] | None:
        """Names of the pictures; None for an array file."""
        return self.source["names"]

    def load(self) -> np.ndarray | None:
        """Open the array file, and leave its elements on the disk where that is possible (`.npy`).

        Returns:
            (F, h, w, N) integers, or None for a folder of pictures.

        Raises:
            ShardError: The file is damaged, holds objects, or has another shape.
        """
        if self.names is not None:
            return None
        path = self.root / self.source["path"]
        try:
            if path.suffix.lower() == ".npy":
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            else:
                with np.load(path, allow_pickle=False) as archive:
                    keys = [key for key in _KEYS if key in archive] or list(archive)
                    if len(keys) != 1:
                        raise ValueError(f"it holds the arrays {', '.join(keys) or 'none'}, not one called `masks`")
                    array = archive[keys[0]]
        except Exception as error:  # NumPy raises almost anything on damaged files
            raise ShardError(
                f"Expected masks {path} of {self.where} to be an array of numbers, but reading it failed ({error}). "
                "Save integers (frames, height, width) with numpy.save."
            ) from error
        array = array[..., None] if array.ndim == 3 else array
        if array.ndim != 4 or array.dtype.kind not in "uib" or array.shape[-1] < 1:
            raise ShardError(
                f"Expected masks {path} of {self.where} to be integers (frames, height, width) of ids, or (frames, "
                f"height, width, objects), but got {array.dtype} {array.shape}. Save them so."
            )
        return array

    def read(self, number: int, loaded: np.ndarray | None) -> np.ndarray:
        """Read the masks of one frame.

        Args:
            number: The frame.
            loaded: What `load` returned.

        Returns:
            (h, w, N) integers.

        Raises:
            ShardError: The picture is missing or damaged.
        """
        if loaded is not None:
            return np.asarray(loaded[number])
        name = self.source["names"][number]
        return read_ids(self.root / self.source["path"] / name, self.where)[..., None]


def _pictures(folder: Path, extensions: tuple[str, ...]) -> list[str]:
    names = (path.name for path in folder.iterdir() if path.suffix.lower() in extensions)
    return sorted((name for name in names if not name.startswith(".")), key=natural_key)


def _mask_file(path: Path, name: str) -> dict[str, Any]:
    return {"path": name, "names": None, "bytes": path.stat().st_size}


def _mask_folder(path: Path, name: str) -> dict[str, Any]:
    return {"path": name, "names": _pictures(path, _MASK_PICTURES), "bytes": None}


def _match(root: Path, videos: dict[str, dict[str, Any]], masks: dict[str, list[dict[str, Any]]]) -> None:
    by_stem: dict[str, list[str]] = {}
    for name, video in videos.items():
        by_stem.setdefault(name if video["names"] is not None else Path(name).stem, []).append(name)
        video["masks"] = None
    for stem, found in masks.items():
        owners = by_stem.get(stem, [])
        if len(owners) != 1:
            got = f"the videos {', '.join(owners)}" if owners else "no such video"
            raise ConfigError(
                f"Expected the masks {root / found[0]['path']} to belong to one video called {stem!r}, but got {got}. "
                "Rename the masks or the videos, or move the masks out of the folder."
            )
        if len(found) > 1:
            raise ConfigError(
                f"Expected one place with masks of {owners[0]}, but got {', '.join(one['path'] for one in found)} in "
                f"{root}. Keep one."
            )
        videos[owners[0]]["masks"] = found[0]


def _no_videos(root: Path, ignored: dict[str, list[str]]) -> ConfigError:
    pictures = [name for name in ignored.get("no media", []) if Path(name).suffix.lower() in PICTURE_EXTENSIONS]
    if pictures:
        got = f"{len(pictures)} pictures ({pictures[0]}, …). Move the frames of each video into a sub-folder of its own"
    else:
        found = [f"{len(names)} {reason} ({names[0]}, …)" for reason, names in ignored.items()]
        got = (", ".join(found) or "nothing") + ". Name the folder that holds the videos themselves"
    return ConfigError(
        f"Expected videos ({', '.join(VIDEO_EXTENSIONS)}) or sub-folders of frames ({', '.join(PICTURE_EXTENSIONS)}) "
        f"in {root}, but got {got}."
    )
