"""YouTube-VIS 2019 and 2021 from their pictures and annotation files.

Source: https://youtube-vos.org/dataset/vis/ (folders and JSON), and the shards that the field made of it.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ssync_pl.data.convert.media import read_frames, resize_ids, stack_frames
from ssync_pl.data.convert.writer import Split
from ssync_pl.errors import explained, require, require_packages, require_shard

_FPS = 6  # every fifth frame of 30 per second
_FARTHEST = 1e5  # pixels; a polygon with a point beyond would take all memory
_MOST = 1 << 32  # bytes of a video's masks
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError)
_TRAINING = ("train", "validation")  # the published shards evaluate on a part of the official training videos


def plan_ytvis(
    root: Path, splits: Sequence[str] = _TRAINING, holdout: int = 300, short_side: int | None = 320
) -> list[Split]:
    """Convert YouTube-VIS: ROOT/SPLIT/JPEGImages/VIDEO/*.jpg with ROOT/SPLIT/instances.json, ROOT/SPLIT/SPLIT.json or
    ROOT/SPLIT.json. Masks (F, h, w, N) have one channel per instance, whose value is the category id; channels may
    overlap, and there is no background channel. The splits train and validation, which is the last --holdout videos,
    share the official training videos. The official valid and test have no public annotations and get no masks.
    """
    require_packages("convert", "pycocotools")
    read: dict[str, list[dict[str, Any]]] = {}
    plans = []
    for split in dict.fromkeys(splits):
        folder = "train" if split in _TRAINING else split
        pictures = root / folder / "JPEGImages"
        require(pictures.is_dir(), f"a folder {pictures}", "none", advice="Unpack the pictures there.")
        videos = read[folder] = read.get(folder) or _read_annotations(root, folder)
        cut = len(videos) - holdout
        if split in _TRAINING:
            fits = 0 < cut <= len(videos) - (split == "validation")
            expected = f"--holdout to leave some of the {len(videos)} videos for each split"
            require(fits, expected, holdout, advice="Take another number, or --splits train.")
            videos = videos[:cut] if split == "train" else videos[cut:]
        plans.append(Split(f"ytvis-{split}", videos, partial(_decode, root, short_side)))
    return plans


def _read_annotations(root: Path, split: str) -> list[dict[str, Any]]:
    """Cut an annotation file into `id`, `size`, `frames`, `folder` and `objects` (None without any) of each video."""
    places = [root / name for name in (f"{split}/instances.json", f"{split}/{split}.json", f"{split}.json")]
    found = [path for path in places if path.is_file()]
    advice = "Unpack the set there, or name the splits that you have with --splits."
    expected = f"the annotations of split `{split}` at {' or '.join(map(str, places))}"
    require(bool(found), expected, "no such file", advice=advice)
    videos: dict[Any, dict[str, Any]] = {}
    expected = f"{found[0]} to be JSON of YouTube-VIS, with `videos`, `categories`, `annotations`, `segmentations`"
    with explained(expected, *_DAMAGE, RecursionError, OverflowError, advice="Repair it, or download it again."):
        content = json.loads(found[0].read_bytes(), object_hook=_pack)
        annotations = content.get("annotations") or []
        categories = {int(entry["id"]): str(entry["name"]) for entry in content.get("categories") or []}
        for video in content["videos"]:
            if video["id"] in videos:
                raise ValueError(f"video {video['id']} twice")
            objects: list[Any] | None = [] if annotations else None
            videos[video["id"]] = {**_video(video), "folder": f"{split}/JPEGImages", "objects": objects}
        crowds = [thing["id"] for thing in annotations if thing.get("iscrowd")]
        for thing in annotations:
            number, masks = thing["category_id"], thing["segmentations"]
            if thing["video_id"] not in videos:
                raise ValueError(f"annotation {thing['id']} of the unknown video {thing['video_id']}")
            if not thing.get("iscrowd"):
                facts = {"id": thing["id"], "category": number, "name": categories.get(number, str(number))}
                videos[thing["video_id"]]["objects"].append({**facts, "masks": masks})
    if crowds:
        logging.getLogger(__name__).warning("Leaving out %d crowds of %s: %s", len(crowds), found[0], crowds[:9])
    return list(videos.values())


def _pack(value: dict[str, Any]) -> dict[str, Any]:
    """Pack run lengths while the file is parsed: as lists of Python numbers, those of a set take gigabytes."""
    counts, size = value.get("counts"), value.get("size")
    if isinstance(counts, list) and isinstance(size, list) and len(size) == 2:
        from pycocotools import mask as coco

        # Damaged counts stay as they are: the video's worker refuses them, and names the video.
        if all(isinstance(count, int) and 0 <= count < 1 << 32 for count in counts):
            return {"size": size, "counts": coco.frPyObjects(value, *size)["counts"].decode()}
    return value


def _video(video: Mapping[str, Any]) -> dict[str, Any]:
    names, size = video["file_names"], [video["height"], video["width"]]
    if any(name.startswith("/") or ".." in PurePosixPath(name).parts for name in names):
        raise ValueError(f"file names of video {video['id']} that are no relative paths below the split's folder")
    if video.get("length", len(names)) != len(names):
        raise ValueError(f"{len(names)} files of video {video['id']}, whose length is {video['length']}")
    if not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"{size} for height and width of video {video['id']}")
    return {"id": video["id"], "size": size, "frames": names}


def _decode(root: Path, short_side: int | None, source: Mapping[str, Any]) -> dict[str, Any]:
    """Make the members of one video; `ShardError` names what is damaged or does not fit."""
    names, objects = source["frames"], source["objects"]
    where = f"video {source['id']} ({names[0].rpartition('/')[0] if names else 'no frames'})"
    frames = read_frames(root / source["folder"], names, None, None, where)
    video, original = stack_frames(frames, short_side, where)
    expected = f"the frames of {where} to be {source['size']} (height, width) as the annotation file says"
    require_shard([*original] == source["size"], expected, original, advice="Download both again.")
    info = {"video_id": source["id"], "file_names": names, "original_size": original, "fps": _FPS}
    if objects is None:
        return {"video.npy": video, "info.json": info}
    shape, advice = (*video.shape[:3], max(1, len(objects))), "Take a smaller --short-side."
    fits = math.prod(shape) <= _MOST
    require_shard(fits, f"the masks of {where} to take at most {_MOST} bytes", f"{len(objects)} objects", advice=advice)
    masks = np.zeros(shape, np.uint8)
    for channel, thing in enumerate(objects):
        masks[..., channel] = resize_ids(_draw_object(thing, len(names), original, where), video.shape[1:3])
    for name, of in (("instance_ids", "id"), ("category_ids", "category"), ("categories", "name")):
        info[name] = [thing[of] for thing in objects]
    return {"video.npy": video, "segmentations.npy.gz": masks, "info.json": info}


def _draw_object(thing: Mapping[str, Any], frames: int, size: tuple[int, int], where: str) -> np.ndarray:
    """Draw one instance (F, h, w) with its category id."""
    name, category, masks = f"instance {thing['id']} of {where}", thing["category"], thing["masks"]
    count = len(masks) if isinstance(masks, list) else 0
    fits = type(category) is int and 1 <= category <= 255 and count == frames
    expected = f"{name} to have a category id in 1..255 and a segmentation (or null) for each of {frames} frames"
    require_shard(fits, expected, f"{category!r} and {count} segmentations", advice="Repair the annotation file.")
    drawn = np.zeros((frames, *size), np.uint8)
    for number, segmentation in enumerate(masks):
        if segmentation:
            drawn[number] = draw_mask(segmentation, size, f"frame {number} of {name}") * np.uint8(category)
    return drawn


def draw_mask(segmentation: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """Draw one COCO segmentation, run lengths (plain or compressed) or polygons, as (h, w) uint8 of 0 and 1."""
    from pycocotools import mask as coco

    expected = f"{where} to have polygons, or run lengths of {size[0]} x {size[1]} (height x width)"
    with explained(expected, *_DAMAGE, advice="Repair the annotation file."):
        if isinstance(segmentation, list):
            # pycocotools takes four numbers for a box, ignores an odd one at the end, and draws NaN.
            bad = [one for one in segmentation if len(one) < 6 or len(one) % 2 or not max(map(abs, one)) < _FARTHEST]
            if bad or not np.isfinite(np.concatenate(segmentation)).all():
                raise ValueError(f"a polygon {bad} that has not three points [x0, y0, x1, y1, …] or lies too far out")
            return np.ascontiguousarray(coco.decode(coco.merge(coco.frPyObjects(segmentation, *size))), np.uint8)
        counts = segmentation["counts"]
        lengths = _run_lengths(counts) if isinstance(counts, str) else [int(count) for count in counts]
        # pycocotools would return memory that was never written for runs that end early.
        if segmentation["size"] != [*size] or sum(lengths) != size[0] * size[1] or min(lengths) < 0:
            raise ValueError(f"runs of {sum(lengths)} pixels for size {segmentation['size']}")
    values = np.arange(len(lengths), dtype=np.uint8) & 1
    return np.ascontiguousarray(np.repeat(values, lengths).reshape(size[::-1]).T)  # columns first


def _run_lengths(text: str) -> list[int]:
    """Read COCO's compressed run lengths: groups of five bits, lowest first, in two's complement; bit 5 says that more
    follow. From the fourth number on, the difference to the one two before is stored."""
    lengths: list[int] = []
    value = shift = 0
    for byte in text.encode():
        group = byte - 48
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (1 << shift) if group & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return lengths
