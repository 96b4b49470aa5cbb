"""Data sets in their original folders, written by the tests, and the shards read back."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from ssync_pl.data.decode import decode_member
from ssync_pl.data.index import read_index, scan_shard
from ssync_pl.data.shards import ShardReader

MADE_FRAMES = 4


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.endswith(".lock")}


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


def smooth_video(frames: int, height: int = 10, width: int = 14, seed: int = 0) -> np.ndarray:
    """Frames that all differ, without noise that a codec would fight."""
    rows, columns = np.mgrid[:height, :width]
    video = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        video[t] = np.stack([np.full_like(rows, 10 * t + 40 * seed), rows * 3 + t, columns * 3 + seed], -1) % 256
    return video


def write_pictures(folder: Path, pictures: np.ndarray, pattern: str = "{:05d}.png") -> list[str]:
    """Write frames or id masks."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [pattern.format(index) for index in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        Image.fromarray(picture).save(folder / name)
    return names


def write_jpegs(folder: Path, seed: int) -> np.ndarray:
    """Write a short video as JPEG files, and return the frames as Pillow decodes them."""
    names = write_pictures(folder, smooth_video(MADE_FRAMES, 12, 20, seed), "{:05d}.jpg")
    return np.stack([np.array(Image.open(folder / name)) for name in names])


def encode_file(
    path: Path, video: np.ndarray, codec: str = "ffv1", pixels: str = "bgr0", container: Any = None, **options: str
) -> Path:
    """Encode a video with PyAV, 10 frames per second; ffv1 in bgr0 keeps every pixel."""
    import av

    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], pixels
        for frame in video:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


def own_set(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write two folders of frames, the first with masks; return its frames and ids."""
    video, ids = smooth_video(6), np.zeros((6, 10, 14), np.uint8)
    for t in range(6):
        ids[t, :2, t : t + 4], ids[t, 2:4, t : t + 4] = 255, 3
    write_pictures(root / "a", video)
    write_pictures(root / "b", video)
    write_pictures(root / "a_masks", ids, "{}.png")
    return video, ids


# -- DAVIS ------------------------------------------------------------------------------------------------------------


def davis_set(root: Path, names: tuple[str, ...] = ("bear", "boat ü"), split: str = "train") -> dict[str, Any]:
    """Write a tiny DAVIS: palette masks with two objects and some void; returns frames and ids by name."""
    made = {}
    for number, name in enumerate(names):
        ids = np.zeros((MADE_FRAMES, 12, 20), np.uint8)
        target = root / "Annotations" / "480p" / name
        target.mkdir(parents=True)
        for t in range(MADE_FRAMES):
            ids[t, 2:6, t : t + 5], ids[t, 7:11, 8:15] = 1, 2
            ids[0, 0, :3] = 255
            picture = Image.fromarray(ids[t]).convert("P")
            picture.putdata(ids[t].ravel().tolist())
            picture.putpalette([(37 * k) % 256 for k in range(768)])
            picture.save(target / f"{t:05d}.png")
        made[name] = write_jpegs(root / "JPEGImages" / "480p" / name, number), ids
    lists = root / "ImageSets" / "2017"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return made


# -- YouTube-VIS ------------------------------------------------------------------------------------------------------


def rle_counts(mask: np.ndarray) -> list[int]:
    """Run lengths of a mask, pixel by pixel down the columns."""
    counts, value = [0], 0
    for pixel in mask.T.ravel():
        if int(pixel) != value:
            counts.append(0)
            value = 1 - value
        counts[-1] += 1
    return counts


def ytvis_set(root: Path, split: str = "train", videos: int = 3) -> tuple[dict[str, Any], Any, Any]:
    """Write a tiny YouTube-VIS split: video v has v objects that overlap, one of them away in frame 1.

    Returns the JSON, the frames as Pillow decodes them, and the masks (F, h, w, max(1, N)).
    """
    content: dict[str, Any] = {"videos": [], "annotations": []}
    content["categories"] = [{"id": number, "name": f"thing {number}"} for number in (1, 5, 40)]
    all_frames, all_masks = [], []
    for v in range(videos):
        name = f"vid {v} é"
        all_frames.append(write_jpegs(root / split / "JPEGImages" / name, v))
        files = [f"{name}/{t:05d}.jpg" for t in range(MADE_FRAMES)]
        size = {"length": MADE_FRAMES, "height": 12, "width": 20}
        content["videos"].append({"id": 10 + v, "file_names": files, **size})
        masks = np.zeros((MADE_FRAMES, 12, 20, max(1, v)), np.uint8)
        for n in range(v):
            category = (5, 40)[n % 2]
            segmentations: list[Any] = []
            for t in range(MADE_FRAMES):
                if n == 0 and t == 1:
                    segmentations.append(None)
                    continue
                mask = np.zeros((12, 20), np.uint8)
                mask[2 + n : 8 + n, 3 + t : 9 + t + n] = 1
                masks[t, ..., n] = mask * category
                plain = {"size": [12, 20], "counts": rle_counts(mask)}
                packed = coco.frPyObjects(plain, 12, 20)["counts"].decode()
                segmentations.append({**plain, "counts": packed} if (n + t) % 2 else plain)
            of = {"id": 100 * v + n, "video_id": 10 + v, "category_id": category}
            content["annotations"].append({**of, "segmentations": segmentations})
        all_masks.append(masks)
    write_json(root / split / "instances.json", content)
    return content, all_frames, all_masks


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


# -- MOVi -------------------------------------------------------------------------------------------------------------


def png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def movi_features(seed: int, size: int = 8) -> dict[str, Any]:
    """One record as TensorFlow Datasets stores it, in part."""
    rng = np.random.default_rng(seed)
    video, masks = rng.integers(0, 256, (3, size, size, 3), np.uint8), rng.integers(0, 3, (3, size, size), np.uint8)
    return {
        "video": (list(map(png, video)), "byte"),
        "segmentations": (list(map(png, masks)), "byte"),
        "forward_flow": ([1, 2, 65535], "int"),
        "metadata/video_name": ([str(seed).encode()], "byte"),
        "instances/mass": ([1.5], "float"),
        "truth": (video, masks),
    }


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    from tfrecord import TFRecordWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = TFRecordWriter(str(path))
    for record in records:
        writer.write({name: feature for name, feature in record.items() if name != "truth"})
    writer.close()


def write_movi(
    folder: Path, split: str = "train", counts: tuple[int, ...] = (2, 3), name: str = "movi_c", size: int = 8
) -> list[Any]:
    """Write one record file per count, and return videos and masks."""
    truths = []
    for number, count in enumerate(counts):
        records = [movi_features(len(truths) + k, size) for k in range(count)]
        truths += [record["truth"] for record in records]
        write_records(folder / f"{name}-{split}.tfrecord-{number:05d}-of-{len(counts):05d}", records)
    return truths
