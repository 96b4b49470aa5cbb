"""Data sets in their original folders, written by the tests, and the shards read back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from ssync_pl.cli.data import run_data
from ssync_pl.data.decode import decode_member
from ssync_pl.data.index import read_index, scan_shard
from ssync_pl.data.shards import ShardReader

__all__ = [
    "MADE_FRAMES",
    "davis_set",
    "encode_file",
    "load_back",
    "rle_counts",
    "run_convert",
    "smooth_video",
    "write_frames",
    "ytvis_set",
]

MADE_FRAMES = 4


def run_convert(*words: object) -> int:
    """Run `ssync-pl data convert WORDS`, quietly and without processes unless the words ask for some."""
    texts = [str(word) for word in words]
    workers = [] if "--workers" in texts else ["--workers", "0"]
    return run_data(["convert", *texts, "--no-progress", *workers])


def load_back(out: Path, prefix: str) -> list[dict[str, Any]]:
    """Every sample of every shard of a prefix, decoded; the index has to agree with the shards."""
    index = read_index(out)
    samples = []
    with contextlib.closing(ShardReader()) as reader:
        for path in sorted(out.glob(f"{prefix}-[0-9]*.tar")):
            entry = scan_shard(path)
            assert index is not None
            assert [s.key for s in index.shards[path.name].samples] == [s.key for s in entry.samples]
            for sample in entry.samples:
                members = {
                    name: decode_member(name, reader.member(str(path), entry, sample, name)) for name in sample.members
                }
                samples.append({"key": sample.key, **members})
    return samples


def smooth_video(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Frames that all differ, without noise that a codec would fight."""
    rows, columns = np.mgrid[:height, :width]
    video = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        video[t, ..., 0] = (10 * t + 40 * seed) % 256
        video[t, ..., 1] = rows * 3 + t
        video[t, ..., 2] = columns * 3 + seed
    return video


def write_frames(folder: Path, video: np.ndarray, pattern: str = "{:05d}.png", **save: Any) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [pattern.format(index) for index in range(len(video))]
    for name, frame in zip(names, video, strict=True):
        Image.fromarray(frame).save(folder / name, **save)
    return names


def rle_counts(mask: np.ndarray) -> list[int]:
    """Run lengths of a mask, pixel by pixel down the columns."""
    counts, value = [0], 0
    for column in range(mask.shape[1]):
        for row in range(mask.shape[0]):
            if int(mask[row, column]) != value:
                counts.append(0)
                value = 1 - value
            counts[-1] += 1
    return counts


def ytvis_set(
    root: Path, split: str = "train", videos: int = 3, size: tuple[int, int] = (12, 20), annotated: bool = True
) -> tuple[dict[str, Any], list[np.ndarray], list[np.ndarray]]:
    """Write a tiny YouTube-VIS split: video v has v objects that overlap, one of them away in frame 1.

    Returns the JSON, the frames as Pillow decodes them, and the masks (F, h, w, max(1, N)).
    """
    height, width = size
    content: dict[str, Any] = {
        "videos": [],
        "annotations": [],
        "categories": [{"id": number, "name": f"thing {number}"} for number in (1, 5, 40)],
    }
    all_frames, all_masks = [], []
    for v in range(videos):
        name = f"vid {v} é"
        written = smooth_video(MADE_FRAMES, height, width, v)
        names = write_frames(root / split / "JPEGImages" / name, written, "{:05d}.jpg", quality=95)
        folder = root / split / "JPEGImages" / name
        all_frames.append(np.stack([np.array(Image.open(folder / one)) for one in names]))
        content["videos"].append(
            {
                "id": 10 + v,
                "file_names": [f"{name}/{one}" for one in names],
                "length": MADE_FRAMES,
                "height": height,
                "width": width,
            }
        )
        masks = np.zeros((MADE_FRAMES, height, width, max(1, v)), np.uint8)
        for n in range(v):
            category = (5, 40)[n % 2]
            segmentations: list[Any] = []
            for t in range(MADE_FRAMES):
                if n == 0 and t == 1:
                    segmentations.append(None)
                    continue
                mask = np.zeros(size, np.uint8)
                mask[2 + n : 8 + n, 3 + t : 9 + t + n] = 1
                masks[t, ..., n] = mask * category
                counts: Any = rle_counts(mask)
                counts = (
                    coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"].decode()
                    if (n + t) % 2
                    else counts
                )
                segmentations.append({"size": [height, width], "counts": counts})
            content["annotations"].append(
                {"id": 100 * v + n, "video_id": 10 + v, "category_id": category, "segmentations": segmentations}
            )
        all_masks.append(masks)
    if not annotated:
        content["annotations"] = None
    write_json(root / split / "instances.json", content)
    return content, all_frames, all_masks


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def davis_set(root: Path, names: Iterable[str] = ("bear", "boat ü"), split: str = "train", masks: int | None = None):
    """Write a tiny DAVIS: palette masks with two objects and some void; returns frames and ids by name."""
    frames, ids = {}, {}
    for number, name in enumerate(names):
        written = smooth_video(MADE_FRAMES, 12, 20, number)
        files = write_frames(root / "JPEGImages" / "480p" / name, written, "{:05d}.jpg", quality=95)
        folder = root / "JPEGImages" / "480p" / name
        frames[name] = np.stack([np.array(Image.open(folder / one)) for one in files])
        stack = np.zeros((MADE_FRAMES, 12, 20), np.uint8)
        for t in range(MADE_FRAMES):
            stack[t, 2:6, t : t + 5] = 1
            stack[t, 7:11, 8:15] = 2
        stack[0, 0, :3] = 255
        ids[name] = stack
        target = root / "Annotations" / "480p" / name
        target.mkdir(parents=True)
        for t in range(MADE_FRAMES if masks is None else masks):
            picture = Image.fromarray(stack[t]).convert("P")
            picture.putdata(stack[t].ravel().tolist())
            picture.putpalette([(37 * k) % 256 for k in range(768)])
            picture.save(target / f"{t:05d}.png")
    lists = root / "ImageSets" / "2017"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return frames, ids


def encode_file(
    path: Path,
    video: np.ndarray,
    codec: str = "ffv1",
    rate: int = 10,
    pixels: str = "bgr0",
    container: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Encode a video with PyAV; ffv1 in bgr0 keeps every pixel."""
    import av

    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], pixels
        for frame in video:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path
