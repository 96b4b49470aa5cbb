"""The facts of a MOVi record beside its pictures: objects, camera, collisions and value ranges.

TensorFlow Datasets flattens nested features: `instances/mass` holds one number an object, `instances/positions` frames
x 3 numbers an object, and lists of varying length are split into `…/ragged_flat_values` and `…/ragged_row_lengths_0`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ssync_pl.data.convert.example_proto import Feature
from ssync_pl.errors import ShardError

__all__ = ["describe"]

_FRAMES = -1  # stands for the number of frames
_INSTANCES: dict[str, tuple[int, ...]] = {
    "positions": (_FRAMES, 3),
    "quaternions": (_FRAMES, 4),
    "velocities": (_FRAMES, 3),
    "angular_velocities": (_FRAMES, 3),
    "bboxes_3d": (_FRAMES, 8, 3),
    "image_positions": (_FRAMES, 2),
    "visibility": (_FRAMES,),
}
_RAGGED: dict[str, tuple[int, ...]] = {"bboxes": (4,), "bbox_frames": ()}
_CAMERA: dict[str, tuple[int, ...]] = {"positions": (_FRAMES, 3), "quaternions": (_FRAMES, 4)}
_PICTURES = frozenset({"video", "segmentations", "depth", "normal", "object_coordinates"})
_MAX_INSTANCES = 1 << 16
_FLAT, _LENGTHS = "/ragged_flat_values", "/ragged_row_lengths_0"


def describe(features: Mapping[str, Feature], frames: int, where: str) -> dict[str, Any]:
    """Collect all that a record says beside its pictures, in the nesting of its feature names.

    Args:
        features: The parsed record.
        frames: Frames of the video.
        where: Source of the record, for the message.

    Returns:
        JSON values: `metadata` (ranges of depth and flow among them), `camera`, `instances` and `collisions` (a list
        with one entry each), and texts such as `background`. Object `i` of `instances` has the id `i + 1` in the masks.
        Numbers that are not finite become `None`.

    Raises:
        ShardError: The lengths of some lists do not fit the number of objects or frames.

    Example:
        >>> mass = np.array([1.0, 2.5], np.float32)
        >>> describe({"instances/mass": mass, "background": [b"sky"]}, 24, "record 0")
        {'background': 'sky', 'instances': [{'mass': 1.0}, {'mass': 2.5}]}
    """
    found: dict[str, Any] = {}
    groups: dict[str, dict[str, Feature]] = {"metadata": {}, "camera": {}, "instances": {}, "collisions": {}}
    for name, values in features.items():
        group, _, inner = name.removeprefix("events/").partition("/")
        if group in groups and inner:
            groups[group][inner] = values
        elif not inner and isinstance(values, list) and len(values) == 1 and name not in _PICTURES:
            found[name] = _text(values[0])
    for group in ("metadata", "camera"):
        shapes = _CAMERA if group == "camera" else {}
        if groups[group]:
            found[group] = {
                inner: _shaped(values, shapes.get(inner), frames, f"`{group}/{inner}` of {where}")
                for inner, values in sorted(groups[group].items())
            }
    count = _instance_count(groups, where)
    if count is not None:
        found["instances"] = _rows(groups["instances"], count, frames, "instances", where)
    if "frame" in groups["collisions"]:
        count = len(groups["collisions"]["frame"])
        found["collisions"] = _rows(groups["collisions"], count, frames, "events/collisions", where)
    return found


def _instance_count(groups: Mapping[str, Mapping[str, Feature]], where: str) -> int | None:
    stated = groups["metadata"].get("num_instances")
    if stated is None:
        mass = groups["instances"].get("mass")
        return None if mass is None else len(mass)
    if isinstance(stated, list) or stated.shape != (1,) or not 0 <= stated[0] < _MAX_INSTANCES:
        raise _misfit(f"`metadata/num_instances` of {where}", "one number, 0 or more", len(stated))
    return int(stated[0])


def _rows(features: Mapping[str, Feature], count: int, frames: int, group: str, where: str) -> list[dict[str, Any]]:
    """Turn lists over all objects into one dictionary an object."""
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, values in sorted(features.items()):
        place = f"`{group}/{name}` of {where}"
        if name.endswith(_LENGTHS):
            continue
        if name.endswith(_FLAT):
            plain = name.removesuffix(_FLAT)
            parts: list[Any] = _ragged(values, features.get(plain + _LENGTHS), _RAGGED.get(plain, ()), count, place)
            name = plain
        else:
            if count == 0 and len(values) == 0:
                continue
            if count == 0 or len(values) % count:
                raise _misfit(place, f"a multiple of {count} values, one set an object", len(values))
            size = len(values) // count
            shape = _INSTANCES.get(name) if group == "instances" else None
            parts = [_shaped(values[i * size : (i + 1) * size], shape, frames, place) for i in range(count)]
        for row, part in zip(rows, parts, strict=True):
            row[name] = part
    return rows


def _ragged(values: Feature, lengths: Feature | None, shape: tuple[int, ...], count: int, place: str) -> list[Any]:
    # An empty list has no type in the wire format.
    if lengths is None or len(lengths) != count or (count and isinstance(lengths, list)):
        raise _misfit(place, f"{count} row lengths", 0 if lengths is None else len(lengths))
    sizes = [int(length) for length in lengths]
    width = math.prod(shape)
    if min(sizes, default=0) < 0 or sum(sizes) * width != len(values):
        raise _misfit(place, f"{sum(sizes) * width} values as its row lengths say", len(values))
    parts = [values[start * width : end * width] for start, end in pairwise(np.cumsum([0, *sizes]))]
    return [
        [_text(value) for value in part] if isinstance(part, list) else _plain(part.reshape(-1, *shape))
        for part in parts
    ]


def _shaped(values: Feature, shape: tuple[int, ...] | None, frames: int, place: str) -> Any:
    """Give one feature its shape; without a known one, a single value becomes a scalar."""
    if isinstance(values, list):
        texts = [_text(value) for value in values]
        return texts[0] if len(texts) == 1 else texts
    if shape is None:
        return _plain(values)[0] if len(values) == 1 else _plain(values)
    full = tuple(frames if size == _FRAMES else size for size in shape)
    if math.prod(full) != len(values):
        raise _misfit(place, f"{math.prod(full)} values for shape {full}", len(values))
    return _plain(values.reshape(full))


def _plain(values: npt.NDArray[Any]) -> Any:
    """Return nested lists of numbers that are exact and as short as float32 allows."""
    if values.dtype != np.float32:
        return values.tolist()
    exact = values.astype("U32").astype(np.float64)  # through the shortest text that stands for the float32
    finite = np.isfinite(exact)
    if finite.all():
        return exact.tolist()
    anything = exact.astype(object)
    anything[~finite] = None
    return anything.tolist()


def _text(value: bytes) -> str:
    return value.decode("utf-8", errors="replace")


def _misfit(place: str, expected: str, found: int) -> ShardError:
    return ShardError(
        f"Expected {place} to hold {expected}, but got {found}. The record is damaged or of an unknown version."
    )
