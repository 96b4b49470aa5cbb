"""Data sets in their original folders, written by the tests, and the shards read back."""

import io
import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from ssync_pl.data.index import read_index, scan_shard
from ssync_pl.data.shards import read_shard

MADE_FRAMES = 4


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.endswith(".lock")}


def load_back(out):
    """Every sample of every shard, decoded, by prefix; the index has to agree with the shards."""
    samples = {}
    for path in sorted(out.glob("*.tar")):
        entry = scan_shard(path)
        assert [s.key for s in read_index(out).shards[path.name].samples] == [s.key for s in entry.samples]
        for key, members in read_shard(str(path), entry):
            decoded = {"key": key, **{name: members.decode(name) for name in members.sizes}}
            samples.setdefault(path.stem.rpartition("-")[0], []).append(decoded)
    return samples


def smooth_video(frames, height=10, width=14, seed=0):
    """Frames that all differ, without noise that a codec would fight."""
    rows, columns = np.mgrid[:height, :width]
    channels = [[np.full_like(rows, 10 * t + 40 * seed), rows * 3 + t, columns * 3 + seed] for t in range(frames)]
    return (np.stack(channels).transpose(0, 2, 3, 1) % 256).astype(np.uint8)


def write_pictures(folder, pictures, pattern="{:05d}.png"):
    """Write frames or id masks, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / pattern.format(number))
    return folder


def write_jpegs(folder, seed):
    """Write a short video as JPEG files, and return the frames as Pillow decodes them."""
    write_pictures(folder, smooth_video(MADE_FRAMES, 12, 20, seed), "{:05d}.jpg")
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.iterdir())])


def encode_file(path, video, codec="ffv1", pixels="bgr0", container=None, **options):
    """Encode a video with PyAV, 10 frames per second; ffv1 in bgr0 keeps every pixel."""
    import av

    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], pixels
        for frame in video:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


def own_set(root):
    """Write two folders of frames, the first with masks, and return its ids."""
    ids = np.zeros((6, 10, 14), np.uint8)
    for t in range(6):
        ids[t, :2, t : t + 4], ids[t, 2:4, t : t + 4] = 255, 3
    write_pictures(root / "a", smooth_video(6))
    write_pictures(root / "b", smooth_video(6))
    write_pictures(root / "a_masks", ids, "{}.png")
    return ids


def davis_set(root, names=("bear", "boat ü"), split="train"):
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
    (lists / f"{split}.txt").write_text("\n".join(names) + "\n", encoding="utf-8-sig")
    return made


def rle_counts(mask):
    """Run lengths of a mask down the columns, the first of zeros."""
    edges = np.flatnonzero(np.diff(np.r_[0, mask.T.ravel()]))
    return np.diff(np.r_[0, edges, mask.size]).tolist()


def ytvis_set(root, split="train", videos=3):
    """Write a tiny YouTube-VIS split: video v has v objects that overlap, one of them away in frame 1.

    Returns the JSON, the frames as Pillow decodes them, and the masks (F, h, w, max(1, N)).
    """
    categories = [{"id": number, "name": f"thing {number}"} for number in (1, 5, 40)]
    content = {"videos": [], "annotations": [], "categories": categories}
    all_frames, all_masks = [], []
    for v in range(videos):
        all_frames.append(write_jpegs(root / split / "JPEGImages" / f"vid {v} é", v))
        files = [f"vid {v} é/{t:05d}.jpg" for t in range(MADE_FRAMES)]
        size = {"length": MADE_FRAMES, "height": 12, "width": 20}
        content["videos"].append({"id": 10 + v, "file_names": files, **size})
        masks = np.zeros((MADE_FRAMES, 12, 20, max(1, v)), np.uint8)
        for n in range(v):
            category, segmentations = (5, 40)[n % 2], []
            for t in range(MADE_FRAMES):
                mask = np.zeros((12, 20), np.uint8)
                mask[2 + n : 8 + n, 3 + t : 9 + t + n] = (n, t) != (0, 1)
                masks[t, ..., n] = mask * category
                plain = {"size": [12, 20], "counts": rle_counts(mask)}
                packed = {**plain, "counts": coco.frPyObjects(plain, 12, 20)["counts"].decode()}
                segmentations.append((packed if (n + t) % 2 else plain) if mask.any() else None)
            of = {"id": 100 * v + n, "video_id": 10 + v, "category_id": category}
            content["annotations"].append({**of, "segmentations": segmentations})
        all_masks.append(masks)
    write_json(root / split / "instances.json", content)
    return content, all_frames, all_masks


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def png(picture):
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def movi_features(seed):
    """One record as TensorFlow Datasets stores it, in part."""
    rng = np.random.default_rng(seed)
    video, masks = rng.integers(0, 256, (3, 8, 8, 3), np.uint8), rng.integers(0, 3, (3, 8, 8), np.uint8)
    return {
        "video": (list(map(png, video)), "byte"),
        "segmentations": (list(map(png, masks)), "byte"),
        "forward_flow": ([1, 2, 65535], "int"),
        "metadata/video_name": ([str(seed).encode()], "byte"),
        "instances/mass": ([1.5], "float"),
        "truth": (video, masks),
    }


def write_records(path, records):
    from tfrecord import TFRecordWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = TFRecordWriter(str(path))
    for record in records:
        writer.write({name: feature for name, feature in record.items() if name != "truth"})
    writer.close()


def write_movi(folder, split="train", counts=(2, 3), name="movi_c"):
    """Write one record file per count, and return videos and masks."""
    truths = []
    for number, count in enumerate(counts):
        records = [movi_features(len(truths) + k) for k in range(count)]
        truths += [record["truth"] for record in records]
        write_records(folder / f"{name}-{split}.tfrecord-{number:05d}-of-{len(counts):05d}", records)
    return truths
