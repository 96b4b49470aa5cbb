"""MOVi-a to MOVi-f from the TFRecord files of TensorFlow Datasets, without TensorFlow.

A TFRecord file is a row of records: 8 bytes of length (little endian), 4 of the length's masked CRC-32C, the data, 4 of
the data's (TensorFlow, "TFRecords format details"). The `tfrecord` package checks neither.
"""

import contextlib
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ssync_pl.data.convert.writer import Split
from ssync_pl.data.decode import decode_picture, parse_json
from ssync_pl.errors import explained, require, require_packages, require_shard

_FPS = 12
_NAME = re.compile(r"((?:\w+_)?movi_[a-f])-(\w+)\.tfrecord-(\d{5})-of-(\d{5})")


def plan_movi(root: Path, splits: Sequence[str] | None = None) -> list[Split]:
    """Convert MOVi-a to MOVi-f from the TFRecord files of TensorFlow Datasets: movi_c-train.tfrecord-00000-of-00256, …
    in ROOT or up to three folders below; by default, all splits that are there. All checksums are checked. Masks are
    ids (F, h, w, 1), 0 = background.
    """
    require_packages("convert", "tfrecord")
    require(root.is_dir(), "--root to be a folder", root, advice="Name the folder of the records.")
    sets: dict[tuple[Path, str], dict[str, list[Path]]] = {}
    for path in sorted(path for depth in range(4) for path in root.glob("*/" * depth + "*.tfrecord-*")):
        match = _NAME.fullmatch(path.name)
        # TFDS downloads into folders of this name, and renames them when they are complete.
        if match is not None and "incomplete" not in path.parent.name:
            sets.setdefault((path.parent, match[1]), {}).setdefault(match[2], []).append(path)
    listed = ", ".join(f"{name} in {folder}" for folder, name in sorted(sets)) or "none"
    expected = f"the files of one data set such as movi_c-train.tfrecord-00000-of-00256 in {root} or below"
    require(len(sets) == 1, expected, listed, advice="Name the folder of one set with --root.")
    (((_, name), files),) = sets.items()
    splits = [*dict.fromkeys(splits or files)]
    require({*splits} <= {*files}, f"--splits of {name} among {', '.join(files)}", ", ".join(splits))
    decode = partial(_decode, root)
    return [Split(f"{name}-{split}", _list_records(root, name, split, files[split]), decode) for split in splits]


def _list_records(root: Path, data: str, split: str, files: Sequence[Path]) -> list[tuple[str, int]]:
    """List the records of a split as (file below the root, offset), by the headers of all its files."""
    name, info, promised = f"{data}-{split}", files[0].parent / "dataset_info.json", list[int]()
    content = parse_json(info.read_bytes(), str(info), dict) if info.is_file() else {}
    with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError, OverflowError):
        promised += [int(n) for part in content["splits"] if part["name"] == split for n in part["shardLengths"]]
    names = {path.name[-14:] for path in files}
    total = max(names)[-5:]
    odd = sorted(names ^ {f"{number:05d}-of-{total}" for number in range(int(total))})
    got = f"{', '.join(odd[:5])} missing or too much"
    require_shard(not odd, f"{int(total)} files {name}.tfrecord-…-of-{total}", got, advice="Download them again.")
    found: list[tuple[str, int]] = []
    for number, path in enumerate(files):
        size, offset, before = path.stat().st_size, 0, len(found)
        with path.open("rb") as stream:
            while offset < size:
                found.append((str(path.relative_to(root)), offset))
                offset += _read_length(stream, offset, f"the record of {path} at byte {offset}") + 16
        got = "the end of the file: it is truncated"
        require_shard(0 < offset == size, f"{path} to hold whole records", got, advice="Download it again.")
        fits = not promised or promised[number : number + 1] == [len(found) - before]
        require_shard(fits, f"{path} to hold the records that {info} says", len(found) - before, advice="Get it again.")
    return found


def _decode(root: Path, source: tuple[str, int]) -> dict[str, Any]:
    """Make the members of one record; `ShardError` names what is damaged or does not fit."""
    from google.protobuf.message import DecodeError
    from tfrecord import example_pb2

    name, offset = source
    where = f"the record of {root / name} at byte {offset}"
    with explained(f"{where} to be a tf.train.Example", OSError, DecodeError, advice="Download it again."):
        with (root / name).open("rb") as stream:
            data = _read(stream, _read_length(stream, offset, where), where)
        features = example_pb2.Example.FromString(data).features.feature
    video = _pictures(features, "video", where)
    masks = _pictures(features, "segmentations", where, ids=True)[..., None]
    fits = masks.shape[:3] == video.shape[:3]
    require_shard(fits, f"`segmentations` of {where} to fit a video {video.shape}", masks.shape)
    titles = features["metadata/video_name"].bytes_list.value
    info = {"fps": _FPS, "record": source, "video_name": b"".join(titles).decode("utf-8", "replace")}
    return {"video.npy": video, "segmentations.npy.gz": masks, "info.json": info}


def _read_length(stream: BinaryIO, offset: int, where: str) -> int:
    stream.seek(offset)
    return int.from_bytes(_read(stream, 8, f"the length of {where}"), "little")


def _read(stream: BinaryIO, count: int, what: str) -> bytes:
    """Read bytes and compare them with the checksum behind them."""
    from tfrecord.writer import TFRecordWriter

    data, footer = stream.read(count), stream.read(4)
    got = "another" if len(footer) == 4 else "the end of the file: it is truncated"
    advice = "The file is damaged, compressed or no TFRecord file: download it again."
    require_shard(footer == TFRecordWriter.masked_crc(data), f"{what} to fit its checksum", got, advice=advice)
    return data


def _pictures(features: Any, name: str, where: str, *, ids: bool = False) -> np.ndarray:
    """Decode a feature's PNG files to (F, H, W, 3), or ids (F, H, W)."""
    files = enumerate(features[name].bytes_list.value)
    places = ((f"frame {number} of `{name}` of {where}", data) for number, data in files)
    frames = [decode_picture(data, place, ids=ids, formats=("PNG",)) for place, data in places]
    kinds = sorted({f"{frame.dtype} {frame.shape}" for frame in frames})
    fits = len(kinds) == 1 and kinds[0].startswith("uint8")
    got = kinds or f"none among {sorted(features)[:20]}"
    require_shard(fits, f"`{name}` of {where} to hold PNG files of 8 bits and one size", got)
    return np.stack(frames)
