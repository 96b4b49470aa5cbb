"""`ssync-pl data convert ytvis2019` and `ytvis2021`: YouTube-VIS from its pictures and annotation file.

Source: https://youtube-vos.org/dataset/vis/ (folders and JSON), and the shards that the field made of it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssync_pl.data.convert.pictures import Resample, read_picture, resize_frame, resize_ids, short_side_size
from ssync_pl.data.convert.rle import segmentation_mask
from ssync_pl.data.convert.sizes import add_resize, check_short_side
from ssync_pl.errors import ConfigError, ShardError

if TYPE_CHECKING:
    from ssync_pl.data.convert.engine import Item
    from ssync_pl.data.convert.ytvis_index import Annotations

__all__ = ["YtvisDecode", "add_parser"]

_SPLITS = ("train", "validation", "valid", "test")
_HOLDOUT = 300  # the published shards evaluate on these: the official validation masks are not public
_FPS = 6  # every fifth frame of 30 a second

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class YtvisDecode:
    """Make the members of one YouTube-VIS video.

    `video.npy` (F, h, w, 3) uint8; where the split has annotations `segmentations.npy.gz` (F, h, w, N) uint8, one
    channel an instance, the value is its category id, channels may overlap, and there is no background channel (a
    video without instances has one empty channel); `info.json`.

    Args:
        folder: The split's `JPEGImages`.
        categories: Category id → name.
        short_side: Pixels of the shorter side; None keeps the size.
        resample: How frames are resized; masks always go to the nearest pixel.
        masks: Write masks.
        video_format: `npy` or `mp4`.

    Example:
        >>> YtvisDecode(Path("train/JPEGImages"), short_side=320).masks
        True
    """

    folder: Path
    categories: dict[int, str] = field(default_factory=dict)
    short_side: int | None = None
    resample: Resample = "bicubic"
    masks: bool = True
    video_format: str = "npy"

    def __call__(self, item: Item) -> dict[str, Any]:
        """Read, draw and resize.

        Args:
            item: `source` is an entry of `Annotations.videos`.

        Returns:
            Members of the sample.

        Raises:
            ShardError: A frame or a mask is missing, damaged or of another size than the annotation file says.
        """
        from ssync_pl.data.convert.options import encode_video

        source = item.source
        where = f"video {source['id']} ({_folder_of(source)})"
        if not source["frames"]:
            raise ShardError(f"Expected {where} to have frames, but its `file_names` are empty. Repair the file.")
        stored = (source["size"][0], source["size"][1])
        size = short_side_size(stored, self.short_side)
        video = np.empty((len(source["frames"]), *size, 3), np.uint8)
        for index, name in enumerate(source["frames"]):
            frame = read_picture(self.folder / name, where)
            if frame.shape[:2] != stored:
                raise ShardError(
                    f"Expected frame {self.folder / name} of {where} to be {stored[0]} x {stored[1]} (height x width) "
                    f"as the annotation file says, but got {frame.shape[0]} x {frame.shape[1]}. The pictures and the "
                    "annotation file are of different releases: download both again."
                )
            video[index] = resize_frame(frame, size, self.resample)
        info: dict[str, Any] = {
            "video_id": source["id"],
            "file_names": list(source["frames"]),
            "original_size": list(stored),
        }
        members = encode_video(video, self.video_format, where, fps=_FPS)
        if self.masks and "objects" in source:
            members["segmentations.npy.gz"] = self._draw(source, stored, size, where)
            ids = [thing["category"] for thing in source["objects"]]
            info["instance_ids"] = [thing["id"] for thing in source["objects"]]
            info["category_ids"] = ids
            info["categories"] = [self.categories.get(number, str(number)) for number in ids]
        return {**members, "info.json": info}

    def _draw(self, source: dict[str, Any], stored: tuple[int, int], size: tuple[int, int], where: str) -> np.ndarray:
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
                if segmentation is not None:
                    drawn = segmentation_mask(segmentation, stored, f"frame {index} of {name}")
                    masks[index, :, :, channel] = resize_ids(drawn, size) * np.uint8(category)
        return masks


def add_parser(commands: Any) -> None:
    """Add `ytvis2019` and `ytvis2021` to the commands of `ssync-pl data convert`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_parser(parser.add_subparsers())
        >>> parser.parse_args(["ytvis2021", "--root", "ytvis", "--out", "shards"]).short_side
        320
    """
    from ssync_pl.data.convert.options import add_common

    for year in (2019, 2021):
        text = (
            f"Convert YouTube-VIS {year}: <root>/<split>/JPEGImages/<video>/*.jpg with <root>/<split>/instances.json "
            "or <root>/<split>.json. Masks have one channel an instance, whose value is the category id."
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
    from ssync_pl.data.convert.engine import Item, convert
    from ssync_pl.data.convert.options import common, print_report
    from ssync_pl.data.convert.ytvis_index import find_annotations, read_annotations

    settings = common(options)
    check_short_side(options.short_side)
    read: dict[str, Annotations] = {}
    plans = []
    # Everything is looked at before the first shard is written.
    for split in dict.fromkeys(options.splits):
        folder = "train" if split == "validation" else split
        if folder not in read:
            read[folder] = read_annotations(find_annotations(options.root, folder))
            _check_pictures(options.root / folder / "JPEGImages")
            _report_strangers(read[folder], options.on_bad_sample)
        videos = _part(read[folder], split, options.holdout)
        plans.append((split, folder, videos))
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


def _part(annotations: Annotations, split: str, holdout: int) -> list[dict[str, Any]]:
    videos = annotations.videos
    if not videos:
        raise ConfigError(f"Expected videos in {annotations.path}, but got none. Download the file again.")
    if split not in ("train", "validation"):
        return videos
    if not 0 <= holdout < len(videos):
        raise ConfigError(
            f"Expected --holdout to be from 0 to {len(videos) - 1}, because {annotations.path} has {len(videos)} "
            f"videos, but got {holdout}. Take a smaller number, or 0 with --splits train for no held-out videos."
        )
    if split == "validation" and not holdout:
        raise ConfigError("Expected --holdout to be above 0 for split `validation`, but got 0. Take --splits train.")
    cut = len(videos) - holdout
    return videos[:cut] if split == "train" else videos[cut:]


def _check_pictures(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(
            f"Expected the frames of the split in {folder}, but there is no such folder. Unpack the pictures there."
        )


def _report_strangers(annotations: Annotations, on_bad_sample: str) -> None:
    if not annotations.strangers:
        return
    count, first = len(annotations.strangers), annotations.strangers[0]
    if on_bad_sample == "raise":
        raise ShardError(
            f"Expected every annotation of {annotations.path} to belong to one of its videos, but got {count} that do "
            f"not, first {first}. Repair the file, or leave them out with --on-bad-sample skip."
        )
    _logger.warning("Left out %d annotations of %s, first %s", count, annotations.path, first)


def _folder_of(source: dict[str, Any]) -> str:
    return source["frames"][0].rpartition("/")[0] if source["frames"] else "no frames"
