"""MOVi-a to MOVi-f from the TFRecord files of TensorFlow Datasets, without TensorFlow.

A TFRecord file is a row of records: 8 bytes of length (little endian), 4 of the length's masked CRC-32C, the data, 4 of
the data's (TensorFlow, "TFRecords format details"). The `tfrecord` package checks neither.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ssync_pl.data.convert.media import require_packages
from ssync_pl.data.convert.writer import Item, Split
from ssync_pl.data.decode import decode_picture, parse_json
from ssync_pl.errors import ShardError, require, require_shard

__all__ = ["Movi"]

_FPS = 12
_NAME = re.compile(r"((?:\w+_)?movi_[a-f])-(\w+)\.tfrecord-(\d{5})-of-(\d{5})")
_Files = dict[str, list[Path]]  # split → its files


@dataclass(frozen=True)
class Movi:
    """Convert MOVi-a to MOVi-f from the TFRecord files of TensorFlow Datasets: movi_c-train.tfrecord-00000-of-00256, …
    in <root> or up to three folders below. All checksums are checked. Masks are ids (F, h, w, 1), 0 = background.
    """

    root: Path
    splits: tuple[str, ...] | None = None

    def plan(self) -> list[Split]:
        """List the records of each split, after a look at all files."""
        require_packages("convert", "tfrecord")
        name, files = _find(self.root)
        splits = dict.fromkeys(self.splits or files)
        choices = ", ".join(files)
        require(all(split in files for split in splits), f"--splits of {name} among {choices}", ", ".join(splits))
        return [Split(f"{name}-{split}", self._records(f"{name}-{split}", split, files[split])) for split in splits]

    def _records(self, name: str, split: str, files: Sequence[Path]) -> list[tuple[str, int]]:
        """List the records of a split as (file below the root, offset)."""
        names = {path.name[-14:] for path in files}
        total = max(names)[-5:]
        odd = sorted(names ^ {f"{number:05d}-of-{total}" for number in range(int(total))})
        got = f"{', '.join(odd[:5])} missing or too much"
        require_shard(not odd, f"{int(total)} files {name}.tfrecord-…-of-{total}", got, advice="Download them again.")
        found = [(str(path.relative_to(self.root)), offset) for path in files for offset in _offsets(path)]
        stated = _stated(files[0].parent / "dataset_info.json", split)
        expected = f"{stated} records of {name} as dataset_info.json in {files[0].parent} says"
        require_shard(stated in (None, len(found)), expected, len(found), advice="Download the split again.")
        return found

    def __call__(self, item: Item) -> dict[str, Any]:
        """Make the members of one record; `ShardError` names what is damaged or does not fit."""
        from google.protobuf.message import DecodeError
        from tfrecord import example_pb2

        name, offset = item.source
        where = f"the record of {self.root / name} at byte {offset}"
        with (self.root / name).open("rb") as stream:
            data = _read(stream, _length(stream, offset, where), where)
        try:
            features = example_pb2.Example.FromString(data).features.feature
        except DecodeError as error:
            raise ShardError(f"Expected {where} to be a tf.train.Example, but it is malformed ({error}).") from error
        video = _pictures(features, "video", where)
        masks = _pictures(features, "segmentations", where, ids=True)[..., None]
        fits = masks.shape[:3] == video.shape[:3]
        require_shard(fits, f"`segmentations` of {where} to fit a video {video.shape}", masks.shape)
        titles = features["metadata/video_name"].bytes_list.value
        info = {"fps": _FPS, "record": item.source, "video_name": b"".join(titles).decode("utf-8", "replace")}
        return {"video.npy": video, "segmentations.npy.gz": masks, "info.json": info}


def _find(root: Path) -> tuple[str, _Files]:
    """Find the one MOVi set in a folder or up to three levels below it: its name, and files by split."""
    require(root.is_dir(), "--root to be a folder", root, advice="Name the folder of the records.")
    sets: dict[tuple[Path, str], _Files] = {}
    for path in sorted(path for depth in range(4) for path in root.glob("*/" * depth + "*.tfrecord-*")):
        match = _NAME.fullmatch(path.name)
        # TFDS downloads into folders of this name, and renames them when they are complete.
        if match is not None and "incomplete" not in path.parent.name:
            sets.setdefault((path.parent, match[1]), {}).setdefault(match[2], []).append(path)
    listed = ", ".join(f"{name} in {folder}" for folder, name in sorted(sets)) or "none"
    expected = f"the files of one data set such as movi_c-train.tfrecord-00000-of-00256 in {root} or below"
    require(len(sets) == 1, expected, listed, advice="Name the folder of one set with --root.")
    (((_, name), files),) = sets.items()
    return name, files


def _stated(path: Path, split: str) -> int | None:
    """How many records a split has by `dataset_info.json`; None where it does not say."""
    content = parse_json(path.read_bytes(), str(path), dict) if path.is_file() else {}
    splits = {one.get("name"): one.get("shardLengths") for one in content.get("splits") or []}
    return sum(map(int, splits[split])) if splits.get(split) else None


def _offsets(path: Path) -> list[int]:
    """Find where each record begins, by the headers."""
    size, offset, found = path.stat().st_size, 0, []
    with path.open("rb") as stream:
        while offset < size:
            found.append(offset)
            offset += _length(stream, offset, f"the record of {path} at byte {offset}") + 16
    _require_whole(offset == size, f"the last record of {path}")
    return found


def _length(stream: BinaryIO, offset: int, where: str) -> int:
    stream.seek(offset)
    return int.from_bytes(_read(stream, 8, f"the length of {where}"), "little")


def _read(stream: BinaryIO, count: int, what: str) -> bytes:
    """Read bytes and compare them with the checksum behind them."""
    from tfrecord.writer import TFRecordWriter

    data, footer = stream.read(count), stream.read(4)
    _require_whole(len(footer) == 4, what)
    whole = footer == TFRecordWriter.masked_crc(data)
    advice = "The file is damaged, compressed or no TFRecord file: download it again."
    require_shard(whole, f"{what} to fit its checksum", "another", advice=advice)
    return data


def _require_whole(whole: bool, what: str) -> None:
    require_shard(whole, f"{what} to be whole", "the end of the file: it is truncated", advice="Download it again.")


def _pictures(features: Any, name: str, where: str, *, ids: bool = False) -> np.ndarray:
    """Decode a feature's PNG files to (F, H, W, 3), or ids (F, H, W)."""
    files = features[name].bytes_list.value
    frames = [
        decode_picture(data, f"frame {number} of `{name}` of {where}", ids=ids, formats=("PNG",))
        for number, data in enumerate(files)
    ]
    kinds = sorted({f"{frame.dtype} {frame.shape}" for frame in frames})
    fits = len(kinds) == 1 and kinds[0].startswith("uint8")
    got = kinds or f"none among {sorted(features)[:20]}"
    require_shard(fits, f"`{name}` of {where} to hold PNG files of 8 bits and one size", got)
    return np.stack(frames)
