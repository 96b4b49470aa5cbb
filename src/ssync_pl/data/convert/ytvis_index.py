"""YouTube-VIS annotation files: read once, cut into what each video needs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ssync_pl.data.convert.rle import compress_counts
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["Annotations", "find_annotations", "read_annotations"]


@dataclass(frozen=True)
class Annotations:
    """An annotation file, by video.

    Args:
        path: The file.
        videos: In the file's order; each is a dict of JSON values: `id`, `size` (height, width), `frames` (file
            names) and, where the file has annotations, `objects` (`id`, `category`, `masks`, one a frame).
        categories: Category id → name.
        annotated: Whether the file has annotations at all; those of the hidden test splits have none.
        strangers: Annotations of videos that the file does not list, in words.
        crowds: Annotations of crowds, which are left out.

    Example:
        >>> Annotations(Path("train.json"), [], {1: "person"}).annotated
        False
    """

    path: Path
    videos: list[dict[str, Any]]
    categories: dict[int, str]
    annotated: bool = False
    strangers: list[str] = field(default_factory=list)
    crowds: int = 0


def find_annotations(root: Path, split: str) -> Path:
    """Find the annotation file of a split.

    Args:
        root: Folder of the set.
        split: Name of the split's folder.

    Returns:
        `<root>/<split>/instances.json`, `<root>/<split>/<split>.json` or `<root>/<split>.json`.

    Raises:
        ConfigError: There is none.

    Example:
        >>> find_annotations(Path("/nowhere"), "train")
        Traceback (most recent call last):
        ssync_pl.errors.ConfigError: Expected the annotations of split `train` at /nowhere/train/instances.json or ...
    """
    places = [root / split / "instances.json", root / split / f"{split}.json", root / f"{split}.json"]
    for path in places:
        if path.is_file():
            return path
    here = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else None
    got = "no such folder" if here is None else f"only {', '.join(here) or 'nothing'} in {root}"
    raise ConfigError(
        f"Expected the annotations of split `{split}` at {' or '.join(map(str, places))}, but got {got}. Unpack the "
        "set there, or name the splits that you have with --splits."
    )


def read_annotations(path: Path) -> Annotations:
    """Read an annotation file.

    Run lengths are packed into COCO's compressed strings while the file is parsed: as lists of Python numbers, those
    of the whole set would take gigabytes.

    Args:
        path: The JSON file.

    Returns:
        Its content, by video.

    Raises:
        ShardError: The file is no JSON, or not in YouTube-VIS's format.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(prefix="ssync-doctest-")) / "train.json"
        >>> video = {"id": 1, "file_names": ["a/0.jpg"], "length": 1, "height": 2, "width": 2}
        >>> _ = path.write_text(json.dumps({"videos": [video], "categories": [], "annotations": []}))
        >>> read_annotations(path).videos
        [{'id': 1, 'size': [2, 2], 'frames': ['a/0.jpg']}]
    """
    try:
        content = json.loads(path.read_bytes(), object_hook=_pack)
    except (ValueError, RecursionError) as error:
        raise ShardError(
            f"Expected {path} to be a JSON file, but reading it failed ({error}). Download it again."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("videos"), list):
        got = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise ShardError(
            f"Expected {path} to hold `videos`, `categories` and `annotations`, but got {got or 'nothing'}. Take the "
            "annotation file of YouTube-VIS 2019 or 2021."
        )
    annotations = content.get("annotations") or []
    videos: dict[Any, dict[str, Any]] = {}
    for number, video in enumerate(content["videos"]):
        entry = _video(video, f"{path}, video {number}")
        if entry["id"] in videos:
            raise ShardError(f"Expected each video of {path} once, but got id {entry['id']} twice. Repair the file.")
        videos[entry["id"]] = {**entry, "objects": []} if annotations else entry
    strangers, crowds = [], 0
    for annotation in annotations:
        thing = _object(annotation, path)
        video_id = annotation.get("video_id")
        if annotation.get("iscrowd"):
            crowds += 1
        elif video_id in videos:
            videos[video_id]["objects"].append(thing)
        else:
            strangers.append(f"annotation {thing['id']} of the unknown video {video_id}")
    return Annotations(path, list(videos.values()), _categories(content, path), bool(annotations), strangers, crowds)


def _pack(value: dict[str, Any]) -> dict[str, Any]:
    if isinstance(value.get("counts"), list):
        # Damaged counts stay as they are: the video's worker refuses them, and names the video.
        with contextlib.suppress(ShardError):
            value["counts"] = compress_counts(value["counts"])
    return value


def _video(video: Any, where: str) -> dict[str, Any]:
    names = video.get("file_names") if isinstance(video, dict) else None
    if names is None or "id" not in video or not all(_is_count(video.get(key)) for key in ("height", "width")):
        raise ShardError(
            f"Expected {where} to have `id`, `file_names`, `height` and `width`, but got "
            f"{', '.join(video) if isinstance(video, dict) else type(video).__name__}. Repair the file."
        )
    unsafe = [n for n in names if not isinstance(n, str) or n.startswith("/") or ".." in PurePosixPath(n).parts]
    if unsafe:
        raise ShardError(
            f"Expected the file names of {where} to be relative paths below the split's folder, but got {unsafe[0]!r}. "
            "Do not convert annotation files of unknown origin."
        )
    if "length" in video and video["length"] != len(names):
        raise ShardError(
            f"Expected {where} (id {video['id']}) to list {video['length']} files as its `length` says, but got "
            f"{len(names)}. Repair the file."
        )
    return {"id": video["id"], "size": [video["height"], video["width"]], "frames": names}


def _object(annotation: Any, path: Path) -> dict[str, Any]:
    if not isinstance(annotation, Mapping) or not isinstance(annotation.get("segmentations"), list):
        raise ShardError(
            f"Expected each annotation of {path} to have a list `segmentations`, but got "
            f"{', '.join(annotation) if isinstance(annotation, Mapping) else type(annotation).__name__}. Take the "
            "annotation file of YouTube-VIS 2019 or 2021."
        )
    masks = [
        {"size": mask.get("size"), "counts": mask.get("counts")} if isinstance(mask, dict) else mask
        for mask in annotation["segmentations"]
    ]
    return {"id": annotation.get("id"), "category": annotation.get("category_id"), "masks": masks}


def _categories(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    try:
        return {int(category["id"]): str(category["name"]) for category in content.get("categories") or []}
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(
            f"Expected each of the `categories` of {path} to have `id` and `name`, but got {error!r}. Repair the file."
        ) from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
