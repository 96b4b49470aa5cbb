"""Folders of frames or video files, with masks where there are any: a user's own, and DAVIS 2017.

The source of a video is a dictionary of JSON values: `video` (its place below the root), `names` (of its frames; None
for a file), `bytes` (of a file), `masks` (None, or their `path`, `names` and `bytes`), and of a clip `start`, `stop`,
`stamp`, `total` and `rate`.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.convert import media
from ssync_pl.data.convert.writer import Split
from ssync_pl.data.decode import VideoFacts, inspect_video, require_size
from ssync_pl.data.samples import Members
from ssync_pl.data.shards import read_at
from ssync_pl.errors import ShardError, require, require_packages, require_shard

_ARRAY = ".masks.npy"
_VOID = 255  # in DAVIS
_Source = dict[str, Any]


def plan_videos(
    root: Path, prefix: str = "videos", clip_frames: int | None = None, short_side: int | None = None
) -> list[Split]:
    """Convert own videos: each mp4, avi, mov, mkv, webm or gif file of ROOT is a video, and so is each sub-folder of
    frames (jpg, png, bmp). Masks of a video called NAME are found in NAME_masks/*.png, masks/NAME/*.png (or labels,
    annotations, segmentations, gt: grey or palette pictures of ids, named after their frames) or NAME.masks.npy
    (F, h, w[, N]). They become ids (F, h, w, 1) from 1 on, in the source's order, or channels (F, h, w, N) of 0 and 1.
    """
    require(clip_frames is None or clip_frames > 0, "--clip-frames to be at least 1", clip_frames)
    videos, ignored = _scan(root)
    if any(video["names"] is None for video in videos):
        require_packages("video", "av")
    clips = [clip for video in videos for clip in _cut(root, video, clip_frames)]
    notes = [f"masks: {sum(video['masks'] is not None for video in videos)} of {len(videos)} videos have some"]
    dropped = sum({clip["video"]: clip["total"] % clip_frames for clip in clips if "start" in clip}.values())
    if dropped:
        notes.append(f"left out {dropped} frames after the last whole clips")
    if ignored:
        notes.append(f"ignored {len(ignored)}: {', '.join(ignored[:9])}{', …' if len(ignored) > 9 else ''}")
    return [Split(prefix, clips, partial(_decode, root, short_side, None), notes)]


def _cut(root: Path, source: _Source, length: int | None) -> list[_Source]:
    """Cut a video into clips; what is too short or damaged stays whole."""
    try:
        facts = _inspect(root, source) if length else None
    except ShardError:
        facts = None
    if not length or facts is None or facts.frames <= length:
        return [source]  # what is wrong with it is raised when it is read
    clips = []
    for start in range(0, facts.frames - length + 1, length):
        place = {"start": start, "stop": start + length, "stamp": facts.stamps and facts.stamps[start]}
        clips.append({**source, **place, "total": facts.frames, "rate": facts.rate})
    return clips


def plan_davis(
    root: Path,
    splits: Sequence[str] = ("train", "val"),
    annotations: str = "Annotations",
    short_side: int | None = None,
) -> list[Split]:
    """Convert DAVIS 2017: ROOT/JPEGImages/480p/VIDEO/00000.jpg, ROOT/Annotations/480p/VIDEO/00000.png and
    ROOT/ImageSets/2017/SPLIT.txt with the splits train and val, whose shards are called davis-validation. Masks are ids
    (F, h, w, 1), 0 = background; void pixels (255) become background.
    Source: https://davischallenge.org/davis2017/code.html.
    """
    for folder in ("JPEGImages", annotations):
        path = root / folder / "480p"
        require(path.is_dir(), f"a folder {path}", "none", advice="Check --root and --annotations.")
    plans = []
    for split in dict.fromkeys(splits):
        sources = []
        for name in _read_names(root / "ImageSets" / "2017" / f"{split}.txt"):
            video, place = f"JPEGImages/480p/{name}", f"{annotations}/480p/{name}"
            masks = {"path": place, "names": media.list_pictures(root / place, (".png",))}
            sources.append({"video": video, "names": media.list_pictures(root / video), "masks": masks})
        prefix = f"davis-{'validation' if split == 'val' else split}"
        plans.append(Split(prefix, sources, partial(_decode, root, short_side, _VOID)))
    return plans


def _read_names(path: Path) -> list[str]:
    require(path.is_file(), f"the videos' names in {path}", "no such file", advice="Check --root and --splits.")
    lines = path.read_text("utf-8-sig", errors="replace").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    odd = [name for name in names if name in (".", "..") or any(mark in name for mark in "/\\\0\ufffd")]
    got = repr(odd[0]) if odd else f"{len(names)} names, {len(set(names))} of them different"
    plain = not odd and 0 < len(names) == len(set(names))
    require(plain, f"one name of a video per line in {path} (UTF-8), each once", got)
    return names


def _decode(root: Path, short_side: int | None, void: int | None, source: _Source) -> dict[str, Any]:
    """Make the members of one video or clip; `ShardError` names what is damaged or does not fit."""
    path = root / source["video"]
    where = f"video {path}"
    clip = range(source["start"], source["stop"]) if "start" in source else None
    facts = VideoFacts(source["total"], source["rate"]) if clip else _inspect(root, source)
    frames = media.read_frames(path, source["names"], clip, source.get("stamp"), where, facts.frames)
    video, original = media.stack_frames(frames, short_side, where)
    shown = clip or range(len(video))
    total = facts.frames if clip else len(video)  # only a reading of the whole counts what is there
    info = {"video": source["video"], "frames": [*shown], "source_frames": total, "fps": facts.rate}
    info["original_size"] = original
    if source["masks"] is None:
        return {"video.npy": video, "info.json": info}
    masks = _read_masks(root / source["masks"]["path"], source, shown, total, original, where)
    masks, info["object_ids"] = _number_objects(masks, video.shape[1:3], void, where)
    return {"video.npy": video, "segmentations.npy.gz": masks, "info.json": info}


def _inspect(root: Path, source: _Source) -> VideoFacts:
    names, path = source["names"], root / source["video"]
    return inspect_video(path, f"video {path}") if names is None else VideoFacts(len(names))


def _read_masks(path: Path, source: _Source, shown: range, total: int, size: tuple[int, int], where: str) -> np.ndarray:
    """Read the masks (F, h, w, N) of the frames that are shown."""
    names, part = source["masks"]["names"], slice(shown.start, shown.stop)
    counted = "as many masks as frames for " + where
    if names is not None:
        names = media.pair_masks(source["names"], names, where, path)
        require_shard(len(names) == total, counted, f"{len(names)} masks in {path}", f"{total} frames")
        return media.read_ids(path, names[part], where, size)[..., None]
    require_shard(path.is_file(), f"the masks {path} of {where} to be a plain file", "none")
    with path.open("rb") as stream:  # not mapped: a file that is cut off meanwhile would kill the process
        read = lambda _, start, length: read_at(stream, start, length)  # noqa: E731
        array = Members(f"{path.parent} of {where}", {path.name: path.stat().st_size}, read, 1 << 40)
        shape = array.header(path.name).shape
        require_shard(shape[:1] == (total,), counted, f"{shape[0] if shape else 0} masks in {path}", f"{total} frames")
        require_size(math.prod(shape[1:]) * len(shown), f"the masks {path} of {where}", media.MAX_BYTES)
        ids = array.rows(path.name, part)
    ids = ids[..., None] if ids.ndim == 3 else ids
    fits = ids.ndim == 4 and ids.size > 0 and ids.shape[1:3] == size and ids.dtype.kind in "uib" and ids.min() >= 0
    expected = f"the masks of {where} to be integers from 0 on, (F, {size[0]}, {size[1]}[, objects]) like its frames"
    require_shard(bool(fits), expected, f"{ids.dtype} {ids.shape} in {path}")
    return ids


def _number_objects(masks: np.ndarray, size: Any, void: int | None, where: str) -> tuple[np.ndarray, list[int]]:
    """Resize masks and number ids from 1 on (masks of 0 and 255 show one object); also return the ids that they had."""
    masks = media.resize_ids(masks, size)
    if masks.shape[-1] > 1:
        return (masks != 0).astype(np.uint8), list(range(masks.shape[-1]))
    masks = np.where(masks == void, 0, masks) if void is not None else masks
    found = [int(number) for number in np.unique(masks) if number]
    advice = "Pictures with smooth shades are no ids: export them without anti-aliasing and as PNG."
    require_shard(len(found) < 256, f"at most 255 objects in the masks of {where}", len(found), advice=advice)
    return np.searchsorted(np.array([0, *found]), masks.astype(np.int64)).astype(np.uint8), found


def _scan(root: Path) -> tuple[list[_Source], list[str]]:
    """Sort the entries of a folder into videos with their masks, in natural order, and names of the rest."""
    require(root.is_dir(), "--root to be a folder of videos", root, advice="Name the folder that holds them.")
    ignored: list[str] = []
    videos: dict[str, _Source] = {}
    masks: dict[str, list[_Source]] = {}
    places = [path for path in root.iterdir() if media.mask_owner(path) == ""]
    for path in (*root.iterdir(), *(path for place in places for path in place.glob("*"))):
        name, inner = str(path.relative_to(root)), path.parent != root
        lower, folder, owner = name.lower(), path.is_dir(), media.mask_owner(path)
        owner = path.name if inner else owner
        if path.name.startswith(".") or not (folder or path.is_file()):  # hidden, a dangling link, a pipe
            ignored.append(name)
        elif folder and owner is not None:
            pictures = media.list_pictures(path, (".png", ".bmp"))
            masks.setdefault(owner, []).append({"path": name, "names": pictures})
        elif folder and (frames := media.list_frames(path)):
            videos[name] = {"video": name, "names": frames, "masks": None}
            ignored += [f"{name}/{other}" for other in {one.name for one in path.iterdir()} - {*frames}]
        elif lower.endswith(_ARRAY) and not inner:
            array = {"path": name, "names": None, "bytes": path.stat().st_size}
            masks.setdefault(name[: -len(_ARRAY)], []).append(array)
        elif lower.endswith(media.VIDEO_EXTENSIONS) and owner is None:
            videos[name] = {"video": name, "names": None, "bytes": path.stat().st_size, "masks": None}
        else:
            ignored.append(name)
    masks.pop("", None)  # the folders `masks` and `mask` themselves
    expected = f"videos ({', '.join(media.VIDEO_EXTENSIONS)}) or one sub-folder of frames per video in {root}"
    require(bool(videos), expected, ", ".join(ignored[:5]) or "nothing", advice="Name the folder that holds them.")
    by_stem: dict[str, list[str]] = {}
    for name, video in videos.items():
        by_stem.setdefault(name if video["names"] else Path(name).stem, []).append(name)
    for stem, found in masks.items():
        owners = by_stem.get(stem, [])
        got = f"the videos {sorted(owners)} and the masks {sorted(one['path'] for one in found)}"
        single = len(owners) == len(found) == 1
        require(single, f"one video called {stem!r} for the masks in one place of {root}", got)
        videos[owners[0]]["masks"] = found[0]
    return [videos[name] for name in sorted(videos, key=media.natural_key)], sorted(ignored)
