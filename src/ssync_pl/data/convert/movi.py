"""`ssync-pl data convert movi`: MOVi-a to MOVi-f from the TFRecord files of TensorFlow Datasets, without TensorFlow."""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.convert.options import add_common, check_common, encode_video, print_report, require
from ssync_pl.data.convert.writer import Item, convert
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["MoviDecoder", "add_parser"]

_FIELDS = ("depth", "forward_flow", "backward_flow")  # converted only when asked for: each is larger than the video
_LARGE = frozenset({*_FIELDS, "normal", "object_coordinates", "uv"})
_MODES = {"video": ("RGB",), "segmentations": ("L", "P"), "depth": ("I;16", "I;16B", "I")}
_FPS, _VERSION = 12, 1
_NAME = re.compile(r"((?:\w+_)?movi_[a-f])-(\w+)\.tfrecord-(\d{5})-of-(\d{5})")
_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")

# Last sizes of nested lists, per object and frame.
_SHAPES = {"bboxes_3d": (8, 3), "positions": (3,), "quaternions": (4,), "velocities": (3,), "angular_velocities": (3,),
           "image_positions": (2,), "bboxes": (4,)}  # fmt: skip
_FLAT, _LENGTHS = "/ragged_flat_values", "/ragged_row_lengths_0"

_Features = dict[str, Any]  # feature name → list of bytes, or float32 or int64 array (L,)


@dataclass(frozen=True)
class MoviDecoder:
    """Make the members of one MOVi video from the record at `[file name, offset, length]`.

    Members: `video.npy` (or `.mp4`), `segmentations.npy.gz` (F, H, W, 1) uint8, 0 = background and ids in the order of
    `instances`, `info.json`, and where asked for `depth.npy` (F, H, W, 1), `forward_flow.npy` and `backward_flow.npy`
    (F, H, W, 2; row, column), float32 as stored, 0 to 65535: `x / 65535 * (high - low) + low` with
    `metadata.<field>_range` of `info.json`.
    """

    folder: Path
    fields: tuple[str, ...] = ()
    video_format: str = "npy"

    def __call__(self, item: Item) -> dict[str, Any]:
        """Read, choose and resize; `ShardError` names what is damaged or does not fit."""
        name, offset, length = item.source
        path = self.folder / name
        where = f"the record of {path} at byte {offset}"
        features = _parse(_read_record(path, offset, length), where, skip=_LARGE.difference(self.fields))
        video = _pictures(features, "video", where)
        frames, height, width = video.shape[:3]
        for stated, found in (("num_frames", frames), ("height", height), ("width", width)):
            values = features.get(f"metadata/{stated}", [found])
            if list(values) != [found]:
                raise _misfit(f"`metadata/{stated}` of {where}", str(found), list(values))
        masks = _same_size("segmentations", _pictures(features, "segmentations", where)[..., None], video, where)
        members = {**encode_video(video, self.video_format, where, _FPS), "segmentations.npy.gz": masks}
        for field in self.fields:
            if len(_require(features, f"metadata/{field}_range", where)) != 2:
                raise _misfit(f"`metadata/{field}_range` of {where}", "two numbers", "others")
            if field == "depth":
                values = _same_size(field, _pictures(features, field, where)[..., None], video, where)
            else:
                values = _flow(features, field, (frames, height, width, 2), where)
            members[f"{field}.npy"] = values.astype(np.float32)
        members["info.json"] = {**_describe(features, where), "fps": _FPS, "record": [name, offset]}
        return members


def add_parser(commands: Any) -> None:
    """Add `movi` to the commands of `ssync-pl data convert`."""
    text = "Convert MOVi-a to MOVi-f from the TFRecord files of TensorFlow Datasets; all checksums are checked."
    parser = commands.add_parser("movi", help="MOVi-a to MOVi-f, TFRecord files", description=text)
    parser.add_argument(
        "--root",
        required=True,
        type=Path,
        help="folder of movi_c-train.tfrecord-…, or the folder above movi_c/128x128/1.0.0",
    )
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="e.g. train validation (default: all there are)")
    parser.add_argument(
        "--fields",
        nargs="+",
        default=[],
        choices=_FIELDS,
        help="store these too, as float32 from 0 to 65535; their ranges are in info.json",
    )
    parser.add_argument("--limit", type=int, help="convert only the first videos of each split")
    add_common(parser)
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    settings = check_common(options)
    require("convert", "tfrecord", "google_crc32c")
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"Expected --limit to be at least 1, but got {options.limit}.")
    folder, name, files = _find(options.root)
    info = _dataset_info(folder)
    decode = MoviDecoder(folder.resolve(), tuple(f for f in _FIELDS if f in options.fields), options.video_format)
    # Everything is looked at before the first shard is written.
    records = {
        split: _records(folder, name, split, files, info, options.limit)
        for split in dict.fromkeys(options.splits or files)
    }
    for split, found in records.items():
        recipe = {
            "source": "movi",
            "converter_version": _VERSION,
            "name": name,
            "split": split,
            "dataset_version": info.get("version"),
            "fields": list(decode.fields),
            "video_format": options.video_format,
        }
        items = [Item(f"{i:06d}", record) for i, record in enumerate(found)]
        print_report(convert(items, decode, options.out, f"{name}-{split}", recipe=recipe, **settings))
    return 0


def _find(root: Path) -> tuple[Path, str, dict[str, list[Path]]]:
    """Find the one MOVi set in a folder or up to three levels below it: its folder, name, and files by split."""
    if not root.is_dir():
        raise ConfigError(f"Expected --root to be a folder, but there is no {root}. Name the folder of the records.")
    sets: dict[tuple[Path, str], dict[str, list[Path]]] = {}
    for path in sorted(path for depth in range(4) for path in root.glob("*/" * depth + "*.tfrecord-*")):
        match = _NAME.fullmatch(path.name)
        # TFDS downloads into folders of this name, and renames them when they are complete.
        if match is not None and "incomplete" not in path.parent.name:
            sets.setdefault((path.parent, match[1]), {}).setdefault(match[2], []).append(path)
    if len(sets) != 1:
        listed = ", ".join(f"{name} in {folder}" for folder, name in sorted(sets)) or "none"
        raise ConfigError(
            f"Expected the files of one data set such as movi_c-train.tfrecord-00000-of-00256 in {root}, or in "
            f"{root}/movi_c/128x128/1.0.0, but got {listed}. Name the folder of one set with --root."
        )
    ((folder, name), files), *_ = sets.items()
    usual = [split for split in ("train", "validation", "test") if split in files]
    return folder, name, {split: files[split] for split in dict.fromkeys([*usual, *files])}


def _dataset_info(folder: Path) -> dict[str, Any]:
    path = folder / "dataset_info.json"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ShardError(f"Expected {path} to be JSON, but got {error}. Download it again, or delete it.") from error
    return content if isinstance(content, dict) else {}


def _records(
    folder: Path, name: str, split: str, all_files: dict[str, list[Path]], info: Mapping[str, Any], limit: int | None
) -> list[list[Any]]:
    """List the records of a split as `[file name, offset, length]`."""
    if split not in all_files:
        raise ConfigError(
            f"Expected --splits among those of {name} in {folder}, {', '.join(all_files)}, but got {split!r}."
        )
    name, files = f"{name}-{split}", all_files[split]
    totals = {int(path.name[-5:]) for path in files}
    numbers = [int(path.name[-14:-9]) for path in files]
    if len(totals) > 1 or numbers != list(range(*totals)):
        missing = sorted(set(range(max(totals))) ^ set(numbers))[:10]
        raise ShardError(
            f"Expected the files {name}.tfrecord-… in {folder} to be all of one set, but their names end in "
            f"{', '.join(f'-of-{total:05d}' for total in sorted(totals))}, and of these are missing or too much: "
            f"{', '.join(f'{number:05d}' for number in missing) or 'none'}. Download the split again."
        )
    stated = [entry for entry in info.get("splits") or [] if entry.get("name") == split and "shardLengths" in entry]
    lengths = [int(length) for length in stated[0]["shardLengths"]] if stated else None
    if lengths is not None and len(lengths) != len(files):
        raise ShardError(
            f"Expected {len(lengths)} files of {name} as `dataset_info.json` in {folder} says, but got {len(files)}. "
            "Download the split again."
        )
    found: list[list[Any]] = []
    for number, path in enumerate(files):
        if limit is not None and len(found) >= limit:
            break
        records = _index(path)
        if lengths is not None and len(records) != lengths[number]:
            raise ShardError(
                f"Expected {path} to hold {lengths[number]} records as `dataset_info.json` says, but got "
                f"{len(records)}. The file is cut short or of another version: download it again."
            )
        found.extend([path.name, *record] for record in records)
    return found[:limit]


# A TFRecord file is a row of records: 8 bytes of length (little endian), 4 of the length's masked CRC-32C, the data, 4
# of the data's (TensorFlow, "TFRecords format details"). The `tfrecord` package checks neither.


def _index(path: Path) -> list[tuple[int, int]]:
    """Find offset and length of each record by the headers."""
    size, offset = path.stat().st_size, 0
    found = []
    with path.open("rb") as stream:
        while offset < size:
            stream.seek(offset)
            length = _length(stream.read(_HEADER.size), path, offset)
            found.append((offset, length))
            offset += _HEADER.size + length + _FOOTER.size
    if offset > size:
        raise _truncated(path, found[-1][0])
    return found


def _read_record(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(offset)
        if _length(stream.read(_HEADER.size), path, offset) != length:
            raise ShardError(
                f"Expected the record of {path} at byte {offset} to have {length} bytes, but the file was replaced. "
                "Run the conversion again into an empty folder."
            )
        data, footer = stream.read(length), stream.read(_FOOTER.size)
    if len(footer) != _FOOTER.size:
        raise _truncated(path, offset)
    _check_crc(data, _FOOTER.unpack(footer)[0], f"the data of the record of {path} at byte {offset}")
    return data


def _length(header: bytes, path: Path, offset: int) -> int:
    if len(header) < _HEADER.size:
        raise _truncated(path, offset)
    length, expected = _HEADER.unpack(header)
    _check_crc(header[:8], expected, f"the length of the record of {path} at byte {offset}")
    return int(length)


def _check_crc(data: bytes, expected: int, what: str) -> None:
    import google_crc32c

    crc = google_crc32c.value(data)
    found = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF  # the mask of TFRecord files
    if found != expected:
        raise ShardError(
            f"Expected {what} to have the checksum {expected:#010x}, but got {found:#010x}. The file is damaged, "
            "compressed or no TFRecord file: download it again."
        )


def _truncated(path: Path, offset: int) -> ShardError:
    return ShardError(
        f"Expected {path} to hold a whole record at byte {offset}, but the file ends before. It is truncated: download "
        "it again."
    )


def _parse(data: bytes, where: str, skip: frozenset[str]) -> _Features:
    from google.protobuf.message import DecodeError
    from tfrecord import example_pb2

    try:
        features = example_pb2.Example.FromString(data).features.feature
    except DecodeError as error:
        raise ShardError(
            f"Expected {where} to be a tf.train.Example, but got a malformed message ({error}). The file is damaged or "
            "holds something else."
        ) from error
    found: _Features = {}
    for name in features:
        if name not in skip:
            kind = features[name].WhichOneof("kind")
            values = getattr(features[name], kind).value if kind else []
            dtype = {"float_list": np.float32, "int64_list": np.int64}.get(kind or "")
            found[name] = list(values) if dtype is None else np.array(values, dtype)
    return found


def _require(features: _Features, name: str, where: str) -> Any:
    if name not in features:
        raise _misfit(where, f"the feature `{name}`", ", ".join(sorted(features)[:20]) or "none")
    return features[name]


def _pictures(features: _Features, name: str, where: str) -> np.ndarray:
    """Decode a list of PNG files to (F, H, W, 3) or (F, H, W)."""
    from PIL import Image

    frames: list[np.ndarray] = []
    for number, data in enumerate(_require(features, name, where)):
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
                if picture.mode not in _MODES[name]:
                    raise ValueError(f"a picture of mode {picture.mode}")
                frames.append(np.asarray(picture))
        except Exception as error:  # Pillow raises almost anything on damaged bytes
            raise _misfit(
                f"frame {number} of `{name}` of {where}", f"a PNG file of mode {_MODES[name][0]}", error
            ) from error
    if len({frame.shape for frame in frames}) != 1:
        raise _misfit(f"`{name}` of {where}", "PNG files of one size", f"sizes {[f.shape[:2] for f in frames][:3]}")
    return np.stack(frames)


def _flow(features: _Features, name: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    values = _require(features, name, where)
    if isinstance(values, list) or values.dtype != np.int64 or len(values) != math.prod(shape):
        raise _misfit(f"`{name}` of {where}", f"{math.prod(shape)} integers for shape {shape}", f"{len(values)} values")
    if values.min() < 0 or values.max() > 65535:
        raise _misfit(f"`{name}` of {where}", "values from 0 to 65535", f"{values.min()} to {values.max()}")
    return values.reshape(shape)


def _same_size(name: str, values: np.ndarray, video: np.ndarray, where: str) -> np.ndarray:
    if values.shape[:3] != video.shape[:3]:
        raise _misfit(f"`{name}` of {where}", f"the video's frames, height, width {video.shape[:3]}", values.shape[:3])
    return values


def _describe(features: _Features, where: str) -> dict[str, Any]:
    """Nest what a record says beside its pictures by the slashes of its names, with one entry per object and collision.

    TensorFlow Datasets flattens nested features: `instances/mass` holds one number per object, `instances/positions`
    frames x 3 numbers per object, and ragged lists are split into values and row lengths.
    """
    found: dict[str, Any] = {}
    rows: dict[str, _Features] = {"instances": {}, "collisions": {}}
    for name, values in sorted(features.items()):
        group, _, inner = name.removeprefix("events/").partition("/")
        if group in rows:
            rows[group][inner] = values
        elif inner:
            found.setdefault(group, {})[inner] = _nested(inner, values, where)
        elif isinstance(values, list) and len(values) == 1 and name not in _MODES:
            found[name] = _nested(name, values, where)
    for group, own in rows.items():
        stated = features.get("metadata/num_instances") if group == "instances" else None
        counted: Any = own.get("frame" if group == "collisions" else "mass", [])
        count = len(counted) if stated is None else int(stated[0])
        if own or stated is not None:
            found[group] = [{} for _ in range(count)]
        for name, values in own.items():
            plain = name.removesuffix(_FLAT)
            if name.endswith(_LENGTHS):
                continue
            ragged = own.get(plain + _LENGTHS, ()) if plain != name else [len(values) // max(count, 1)] * count
            sizes = [int(size) * (math.prod(_SHAPES.get(plain, ())) if plain != name else 1) for size in ragged]
            if len(sizes) != count or min(sizes, default=0) < 0 or sum(sizes) != len(values):
                raise _misfit(f"`{group}/{name}` of {where}", f"{sum(sizes)} values of {count} objects", len(values))
            for row, (start, end) in zip(found[group], pairwise(np.cumsum([0, *sizes]).tolist()), strict=True):
                row[plain] = _nested(plain, values[start:end], where, scalar=plain == name)
    return found


def _nested(name: str, values: Any, where: str, scalar: bool = True) -> Any:
    """Return nested lists of numbers or texts; a single value becomes a scalar."""
    if isinstance(values, list):
        plain: Any = [value.decode("utf-8", errors="replace") for value in values]
    elif len(values) % math.prod(_SHAPES.get(name, ())):
        raise _misfit(f"`{name}` of {where}", f"a multiple of {_SHAPES[name]} values", len(values))
    else:
        plain = _numbers(values.reshape(-1, *_SHAPES.get(name, ())))
    return plain[0] if scalar and len(values) == 1 else plain


def _numbers(values: np.ndarray) -> Any:
    """Return nested lists of numbers, exact and as short as float32 allows; None for what is not finite."""
    if values.dtype != np.float32:
        return values.tolist()
    exact = values.astype("U32").astype(np.float64)  # through the shortest text that stands for the float32
    if np.isfinite(exact).all():
        return exact.tolist()
    anything = exact.astype(object)
    anything[~np.isfinite(exact)] = None
    return anything.tolist()


def _misfit(place: str, expected: str, found: Any) -> ShardError:
    return ShardError(
        f"Expected {place} to hold {expected}, but got {found}. The record is damaged or of an unknown version."
    )
