"""`ssync-pl data convert ytvis2019` and `ytvis2021`: YouTube-VIS from its pictures and annotation file.

Source: https://youtube-vos.org/dataset/vis/ (folders and JSON), and the shards that the field made of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ssync_pl.data.convert.media import read_frames
from ssync_pl.data.convert.options import add_common, add_resize, check_common, encode_video, print_report, require
from ssync_pl.data.convert.pictures import resize_ids, stack_frames
from ssync_pl.data.convert.writer import Item, convert
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["YtvisDecode", "add_parser"]

_SPLITS = ("train", "validation", "valid", "test")
_HOLDOUT = 300  # the published shards evaluate on these: the official validation masks are not public
_FPS = 6  # every fifth frame of 30 per second
_FARTHEST = 1e5  # pixels; a polygon with a point beyond would take all memory

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class YtvisDecode:
    """Make the members of one YouTube-VIS video.

    `video.npy` (F, h, w, 3) uint8; where the split has annotations `segmentations.npy.gz` (F, h, w, N) uint8, one
    channel per instance, the value is its category id, channels may overlap, and there is no background channel (a
    video without instances has one empty channel); `info.json`.
    """

    folder: Path
    categories: dict[int, str] = field(default_factory=dict)
    short_side: int | None = None
    resample: str = "bicubic"
    masks: bool = True
    video_format: str = "npy"

    def __call__(self, item: Item) -> dict[str, Any]:
        """Read, choose and resize; `ShardError` names what is damaged or does not fit."""
        source = item.source
        names, stored = source["frames"], (source["size"][0], source["size"][1])
        where = f"video {source['id']} ({names[0].rpartition('/')[0] if names else 'no frames'})"
        frames = read_frames(self.folder, names, None, None, where)
        video, original = stack_frames(frames, self.short_side, self.resample, where)
        if original != stored:
            raise ShardError(
                f"Expected the frames of {where} to be {stored[0]} x {stored[1]} (height x width) as the annotation "
                f"file says, but got {original[0]} x {original[1]}. The pictures and the annotation file are of "
                "different releases: download both again."
            )
        members = encode_video(video, self.video_format, where, fps=_FPS)
        info: dict[str, Any] = {"video_id": source["id"], "file_names": names, "original_size": list(stored)}
        if self.masks and "objects" in source:
            members["segmentations.npy.gz"] = self._draw(source, stored, video.shape[1:3], where)
            ids = [thing["category"] for thing in source["objects"]]
            info["instance_ids"] = [thing["id"] for thing in source["objects"]]
            info["category_ids"] = ids
            info["categories"] = [self.categories.get(number, str(number)) for number in ids]
        return {**members, "info.json": info}

    def _draw(self, source: dict[str, Any], stored: tuple[int, int], size: tuple[int, ...], where: str) -> np.ndarray:
        frames, objects = len(source["frames"]), source["objects"]
        masks = np.zeros((frames, *size, max(1, len(objects))), np.uint8)
        for channel, thing in enumerate(objects):
            name, category = f"instance {thing['id']} of {where}", thing["category"]
            if isinstance(category, bool) or not isinstance(category, int) or not 1 <= category <= 255:
                raise ShardError(
                    f"Expected the category id of {name} to be in 1..255, the numbers that a byte mask can hold, but "
                    f"got {category!r}. Number the categories anew in the annotation file."
                )
            if len(thing["masks"]) != frames:
                raise ShardError(
                    f"Expected {name} to have a segmentation (or null) for each of the {frames} frames, but got "
                    f"{len(thing['masks'])}. Repair the annotation file."
                )
            for index, segmentation in enumerate(thing["masks"]):
                if segmentation:
                    drawn = draw_mask(segmentation, stored, f"frame {index} of {name}")
                    masks[index, :, :, channel] = resize_ids(drawn, (size[0], size[1])) * np.uint8(category)
        return masks


def draw_mask(segmentation: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """Draw one COCO segmentation, run lengths (plain or compressed) or polygons, as (h, w) uint8 of 0 and 1."""
    from pycocotools import mask as coco

    if isinstance(segmentation, list):
        for polygon in segmentation:
            numbers = isinstance(polygon, list) and all(
                isinstance(number, (int, float)) and abs(number) < _FARTHEST for number in polygon
            )
            # pycocotools takes four numbers for a box, and ignores an odd one at the end.
            if not numbers or len(polygon) < 6 or len(polygon) % 2:
                raise _bad(where, "at least three points [x0, y0, x1, y1, …] per polygon", polygon)
        return np.ascontiguousarray(coco.decode(coco.merge(coco.frPyObjects(segmentation, *size))), np.uint8)
    if not isinstance(segmentation, dict) or list(segmentation.get("size") or []) != list(size):
        raise _bad(where, f"run lengths for a mask of {list(size)} (height, width)", segmentation)
    counts = segmentation.get("counts")
    try:
        lengths = _run_lengths(counts) if isinstance(counts, (str, bytes)) else [int(count) for count in counts or []]
    except (TypeError, ValueError) as error:
        raise _bad(where, "run lengths", counts) from error
    # pycocotools would return memory that was never written for runs that end early.
    if sum(lengths) != size[0] * size[1] or min(lengths) < 0:
        raise _bad(where, f"runs of {size[0]} x {size[1]} = {size[0] * size[1]} pixels", f"{sum(lengths)} in {counts}")
    values = np.arange(len(lengths), dtype=np.uint8) & 1
    return np.ascontiguousarray(np.repeat(values, lengths).reshape(size[::-1]).T)  # columns first


def _run_lengths(text: str | bytes) -> list[int]:
    """Read COCO's compressed run lengths (https://cocodataset.org/#format-results).

    Each number is cut into groups of five bits, lowest first, in two's complement, one character per group from `0` on;
    bit 5 says that more follow. From the fourth number on, the difference to the one two before is stored.
    """
    lengths: list[int] = []
    value = shift = 0
    for byte in text.encode() if isinstance(text, str) else text:
        group = byte - 48
        if not 0 <= group < 64 or shift > 55:
            raise ValueError("other characters, or a number of more than 60 bits")
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (1 << shift) if group & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("the last number is cut off")
    return lengths


def _bad(where: str, expected: str, got: Any) -> ShardError:
    return ShardError(f"Expected {where} to have {expected}, but got {got!r:.80}. Repair the annotation file.")


@dataclass(frozen=True)
class Annotations:
    """An annotation file, cut into what each video needs, as JSON values."""

    path: Path
    videos: list[dict[str, Any]]
    categories: dict[int, str]
    annotated: bool = False
    strangers: list[str] = field(default_factory=list)  # annotations of videos that the file does not list
    crowds: int = 0  # left out


def read_annotations(path: Path) -> Annotations:
    """Read an annotation file; `ShardError` when it is not in YouTube-VIS's format."""
    try:
        content = json.loads(path.read_bytes(), object_hook=_pack)
        listed, annotations = content["videos"], content.get("annotations") or []
        categories = {int(entry["id"]): str(entry["name"]) for entry in content.get("categories") or []}
        videos: dict[Any, dict[str, Any]] = {}
        for video in listed:
            entry = _video(video, path)
            if entry["id"] in videos:
                raise ShardError(f"Expected each video of {path} once, but got id {entry['id']} twice.")
            videos[entry["id"]] = {**entry, "objects": []} if annotations else entry
        strangers, crowds = [], 0
        for annotation in annotations:
            masks = [
                {"size": mask.get("size"), "counts": mask.get("counts")} if isinstance(mask, dict) else mask
                for mask in annotation["segmentations"]
            ]
            thing = {"id": annotation.get("id"), "category": annotation.get("category_id"), "masks": masks}
            video_id = annotation.get("video_id")
            if annotation.get("iscrowd"):
                crowds += 1
            elif video_id in videos:
                videos[video_id]["objects"].append(thing)
            else:
                strangers.append(f"annotation {thing['id']} of the unknown video {video_id}")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"Expected {path} to be a JSON file with `videos`, `categories` and `annotations` with `segmentations` as "
            f"of YouTube-VIS 2019 or 2021, but got {error!r}. Download it again."
        ) from error
    return Annotations(path, list(videos.values()), categories, bool(annotations), strangers, crowds)


def _pack(value: dict[str, Any]) -> dict[str, Any]:
    """Pack run lengths while the file is parsed: as lists of Python numbers, those of a set take gigabytes."""
    counts, size = value.get("counts"), value.get("size")
    if isinstance(counts, list) and isinstance(size, list) and len(size) == 2:
        from pycocotools import mask as coco

        # Damaged counts stay as they are: the video's worker refuses them, and names the video.
        if all(isinstance(count, int) and 0 <= count < 1 << 32 for count in counts):
            value["counts"] = coco.frPyObjects(value, *size)["counts"].decode()
    return value


def _video(video: Mapping[str, Any], path: Path) -> dict[str, Any]:
    names, where = video["file_names"], f"video {video['id']} of {path}"
    unsafe = [n for n in names if not isinstance(n, str) or n.startswith("/") or ".." in PurePosixPath(n).parts]
    if unsafe:
        raise ShardError(
            f"Expected the file names of {where} to be relative paths below the split's folder, but got {unsafe[0]!r}. "
            "Do not convert annotation files of unknown origin."
        )
    if video.get("length", len(names)) != len(names):
        raise ShardError(
            f"Expected {where} to list {video['length']} files as its `length` says, but got {len(names)}. Repair the "
            "file."
        )
    size = [video["height"], video["width"]]
    if any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in size):
        raise ShardError(f"Expected {where} to have a height and width in pixels, but got {size}. Repair the file.")
    return {"id": video["id"], "size": size, "frames": names}


def add_parser(commands: Any) -> None:
    """Add `ytvis2019` and `ytvis2021` to the commands of `ssync-pl data convert`."""
    for year in (2019, 2021):
        text = (
            f"Convert YouTube-VIS {year}: <root>/<split>/JPEGImages/<video>/*.jpg with <root>/<split>/instances.json "
            "or <root>/<split>.json. Masks have one channel per instance, whose value is the category id."
        )
        parser = commands.add_parser(f"ytvis{year}", help=f"YouTube-VIS {year}", description=text)
        parser.add_argument("--root", required=True, type=Path, help="folder of the unpacked set")
        parser.add_argument(
            "--splits",
            nargs="+",
            choices=_SPLITS,
            default=["train", "validation"],
            help="train and validation share the official training videos, see --holdout; valid and test are the "
            "official ones, whose annotations are not public, so they get no masks (default: train validation)",
        )
        parser.add_argument(
            "--holdout",
            type=int,
            default=_HOLDOUT,
            help="the last N videos of the official training split become `validation`, the others `train` "
            f"(default: {_HOLDOUT}, as in the published shards)",
        )
        add_resize(parser, default=320)
        parser.add_argument("--no-masks", action="store_true", help="write videos only")
        add_common(parser)
        parser.set_defaults(run=_convert, dataset=f"ytvis{year}")


def _convert(options: argparse.Namespace) -> int:
    settings = check_common(options)
    require("convert", "pycocotools")
    read: dict[str, Annotations] = {}
    plans = []
    # Everything is looked at before the first shard is written.
    for split in dict.fromkeys(options.splits):
        folder = "train" if split == "validation" else split
        if folder not in read:
            read[folder] = read_annotations(_find_annotations(options.root, folder))
            if not (options.root / folder / "JPEGImages").is_dir():
                raise ConfigError(
                    f"Expected the frames of the split in {options.root / folder / 'JPEGImages'}, but there is no such "
                    "folder. Unpack the pictures there."
                )
            _report_strangers(read[folder], options.on_bad_sample)
        plans.append((split, folder, _part(read[folder], split, options.holdout)))
    for split, folder, videos in plans:
        annotations = read[folder]
        decode = YtvisDecode(
            options.root / folder / "JPEGImages",
            annotations.categories,
            options.short_side,
            options.resample,
            not options.no_masks,
            options.video_format,
        )
        recipe = {
            "format": options.dataset,
            "split": folder,
            "short_side": options.short_side,
            "resample": options.resample,
            "masks": decode.masks and annotations.annotated,
            "video_format": options.video_format,
            "categories": {str(key): name for key, name in annotations.categories.items()},
            "left_out": {"crowds": annotations.crowds, "unknown_videos": annotations.strangers},
        }
        items = [Item(f"{number:06d}", video) for number, video in enumerate(videos)]
        print_report(convert(items, decode, options.out, f"ytvis-{split}", recipe=recipe, **settings))
        if annotations.crowds and recipe["masks"]:
            sys.stdout.write(f"  left out {annotations.crowds} crowd annotation(s) of {annotations.path}\n")
    return 0


def _find_annotations(root: Path, split: str) -> Path:
    places = [root / split / "instances.json", root / split / f"{split}.json", root / f"{split}.json"]
    for path in places:
        if path.is_file():
            return path
    raise ConfigError(
        f"Expected the annotations of split `{split}` at {' or '.join(map(str, places))}, but there is no such file. "
        "Unpack the set there, or name the splits that you have with --splits."
    )


def _part(annotations: Annotations, split: str, holdout: int) -> list[dict[str, Any]]:
    videos = annotations.videos
    if split not in ("train", "validation"):
        return videos
    if not 0 <= holdout < len(videos) or (split == "validation" and not holdout):
        raise ConfigError(
            f"Expected --holdout to be from 0 to {len(videos) - 1}, because {annotations.path} has {len(videos)} "
            f"videos, and above 0 for split `validation`, but got {holdout}. Take another number, or --splits train."
        )
    cut = len(videos) - holdout
    return videos[:cut] if split == "train" else videos[cut:]


def _report_strangers(annotations: Annotations, on_bad_sample: str) -> None:
    if annotations.strangers and on_bad_sample == "raise":
        raise ShardError(
            f"Expected every annotation of {annotations.path} to belong to one of its videos, but got "
            f"{len(annotations.strangers)} that do not, first {annotations.strangers[0]}. Repair the file, or leave "
            "them out with --on-bad-sample skip."
        )
    for stranger in annotations.strangers[:1]:
        count = len(annotations.strangers)
        _logger.warning("Left out %d annotations of %s, first %s", count, annotations.path, stranger)
