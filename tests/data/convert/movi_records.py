"""Writes MOVi records as TensorFlow Datasets does, by code of its own: framing, checksums and wire format."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def bitwise_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ 0x82F63B78 if crc & 1 else crc >> 1
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = bitwise_crc32c(data)
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) % 2**32)


def frame_record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(value: int) -> bytes:
    value %= 2**64
    out = bytearray()
    while value > 127:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(content)) + content


def feature(values: Any, packed: bool = True) -> bytes:
    """A serialised Feature of a list of bytes, a float array or an integer array."""
    if isinstance(values, list) and all(isinstance(value, bytes) for value in values):
        return field(1, b"".join(field(1, value) for value in values))
    values = np.asarray(values).reshape(-1)
    if values.dtype.kind == "f":
        items = [struct.pack("<f", value) for value in values]
        tag, number = varint(8 + 5), 2
    else:
        items = [varint(int(value)) for value in values]
        tag, number = varint(8 + 0), 3
    content = field(1, b"".join(items)) if packed else b"".join(tag + item for item in items)
    return field(number, content)


def example(features: dict[str, Any], packed: bool = True) -> bytes:
    entries = [field(1, name.encode()) + field(2, feature(values, packed)) for name, values in features.items()]
    return field(1, b"".join(field(1, entry) for entry in entries))


def png(frame: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "PNG")
    return stream.getvalue()


def movi_features(seed: int, frames: int = 3, size: int = 8, objects: int = 2) -> tuple[dict[str, Any], dict[str, Any]]:
    """Features of one record, and the arrays that are in it."""
    rng = np.random.default_rng(seed)
    truth: dict[str, Any] = {
        "video": rng.integers(0, 256, (frames, size, size, 3), np.uint8),
        "segmentations": rng.integers(0, objects + 1, (frames, size, size, 1), np.uint8),
        "depth": rng.integers(0, 65536, (frames, size, size, 1), np.uint16),
        "forward_flow": rng.integers(0, 65536, (frames, size, size, 2), np.uint16),
        "backward_flow": rng.integers(0, 65536, (frames, size, size, 2), np.uint16),
        "positions": rng.normal(size=(objects, frames, 3)).astype(np.float32),
        "bboxes_3d": rng.normal(size=(objects, frames, 8, 3)).astype(np.float32),
        "visibility": rng.integers(0, size * size, (objects, frames)),
        "mass": rng.uniform(1, 2, objects).astype(np.float32),
        "bbox_frames": [list(range(index % (frames + 1))) for index in range(objects)],
        "camera_positions": rng.normal(size=(frames, 3)).astype(np.float32),
        "depth_range": np.array([1.5, 27.25], np.float32),
        "forward_flow_range": np.array([-3.125, 4.5], np.float32),
        "backward_flow_range": np.array([-2.0, 1.0], np.float32),
        "collision_forces": rng.uniform(0, 9, 3).astype(np.float32),
    }
    boxes = [rng.uniform(size=(len(seen), 4)).astype(np.float32) for seen in truth["bbox_frames"]]
    truth["bboxes"] = boxes
    features = {
        "video": [png(frame) for frame in truth["video"]],
        "segmentations": [png(frame[..., 0]) for frame in truth["segmentations"]],
        "depth": [png(frame[..., 0]) for frame in truth["depth"]],
        "forward_flow": truth["forward_flow"],
        "backward_flow": truth["backward_flow"],
        "background": [b"studio"],
        "metadata/video_name": [str(seed).encode()],
        "metadata/num_frames": np.array([frames]),
        "metadata/height": np.array([size]),
        "metadata/width": np.array([size]),
        "metadata/num_instances": np.array([objects]),
        "metadata/depth_range": truth["depth_range"],
        "metadata/forward_flow_range": truth["forward_flow_range"],
        "metadata/backward_flow_range": truth["backward_flow_range"],
        "camera/focal_length": np.array([35.0], np.float32),
        "camera/positions": truth["camera_positions"],
        "instances/mass": truth["mass"],
        "instances/asset_id": [f"asset-{index}".encode() for index in range(objects)],
        "instances/category": np.arange(objects),
        "instances/positions": truth["positions"],
        "instances/bboxes_3d": truth["bboxes_3d"],
        "instances/visibility": truth["visibility"],
        "instances/bboxes/ragged_flat_values": np.concatenate([np.zeros((0, 4), np.float32), *boxes]),
        "instances/bboxes/ragged_row_lengths_0": np.array([len(box) for box in boxes], np.int64),
        "instances/bbox_frames/ragged_flat_values": np.array(
            [frame for seen in truth["bbox_frames"] for frame in seen], np.int64
        ),
        "instances/bbox_frames/ragged_row_lengths_0": np.array([len(box) for box in boxes], np.int64),
        "events/collisions/frame": np.array([3, 7, 11]),
        "events/collisions/force": truth["collision_forces"],
        "events/collisions/instances": np.array([[0, 1], [1, 65535], [0, 65535]]),
    }
    return features, truth


def write_movi(
    folder: Path, split: str = "train", counts: tuple[int, ...] = (2, 3), name: str = "movi_c", **options: Any
) -> list[dict[str, Any]]:
    """Write one record file a count, and return what is in the records."""
    folder.mkdir(parents=True, exist_ok=True)
    truths = []
    for number, count in enumerate(counts):
        records = []
        for _ in range(count):
            features, truth = movi_features(len(truths), **options)
            truths.append(truth)
            records.append(frame_record(example(features)))
        path = folder / f"{name}-{split}.tfrecord-{number:05d}-of-{len(counts):05d}"
        path.write_bytes(b"".join(records))
    return truths
