"""MOVi-a to MOVi-f: records of TensorFlow Datasets to shards, without TensorFlow."""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ssync_pl.data.convert.engine import ConversionReport, Item, convert
from ssync_pl.data.convert.example_proto import Feature, parse_example
from ssync_pl.data.convert.movi_facts import describe
from ssync_pl.data.convert.movi_files import find_movi
from ssync_pl.data.convert.options import VIDEO_FORMATS, add_common, common, encode_video, print_report
from ssync_pl.data.convert.tfrecord import Record, read_record
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["EXTRA_FIELDS", "MoviDecoder", "add_parser", "convert_movi"]

EXTRA_FIELDS = ("depth", "forward_flow", "backward_flow")
"""Fields that are converted only when asked for: each is larger than the video."""

_FPS = 12
_VERSION = 1  # of the members; another one is another plan
_LARGE = frozenset({*EXTRA_FIELDS, "normal", "object_coordinates", "uv"})
_PICTURE_MODES = {"video": ("RGB",), "segmentations": ("L", "P"), "depth": ("I;16", "I;16B", "I")}


@dataclass(frozen=True)
class MoviDecoder:
    """Make the members of one MOVi video.

    Members: `video.npy` (F, H, W, 3) uint8 (or `video.mp4`), `segmentations.npy.gz` (F, H, W, 1) uint8 with 0 =
    background and ids in the order of `instances`, `info.json`, and, where asked for, `depth.npy` (F, H, W, 1),
    `forward_flow.npy` and `backward_flow.npy` (F, H, W, 2), float32 as stored, 0 to 65535. The value of a pixel is
    `x / 65535 * (high - low) + low` with `low, high` from `metadata.<field>_range` in `info.json`; flow is (row,
    column).

    Args:
        folder: Folder of the record files.
        fields: Some of `EXTRA_FIELDS`.
        video_format: `npy` or `mp4`.

    Raises:
        ConfigError: A field or the format is unknown.

    Example:
        >>> MoviDecoder(Path("tfds"), fields=("normals",))
        Traceback (most recent call last):
        ssync_pl.errors.ConfigError: Expected --fields among depth, forward_flow, backward_flow, but got 'normals'.
    """

    folder: Path
    fields: tuple[str, ...] = ()
    video_format: str = "npy"

    def __post_init__(self) -> None:
        for name in self.fields:
            if name not in EXTRA_FIELDS:
                raise ConfigError(f"Expected --fields among {', '.join(EXTRA_FIELDS)}, but got {name!r}.")
        if self.video_format not in VIDEO_FORMATS:
            raise ConfigError(
                f"Expected the video format to be one of {', '.join(VIDEO_FORMATS)}, but got {self.video_format!r}."
            )

    def __call__(self, item: Item) -> dict[str, Any]:
        """Read, check and decode one record.

        Args:
            item: Its source is `[file name, offset, length]`.

        Returns:
            The members.

        Raises:
            ShardError: The record is damaged, or its parts do not fit each other.

        Example:
            >>> MoviDecoder(Path("/nowhere"))(Item("000000", ["movi_c-train.tfrecord-00000-of-00001", 0, 9]))
            Traceback (most recent call last):
            FileNotFoundError: ...
        """
        name, offset, length = item.source
        path = self.folder / name
        where = f"the record of {path} at byte {offset}"
        unused = _LARGE.difference(self.fields)
        features = parse_example(read_record(path, Record(offset, length)), where, skip=unused)
        video = _pictures(features, "video", where)
        frames, height, width = video.shape[:3]
        _check_stated(features, frames, height, width, where)
        masks = _pictures(features, "segmentations", where)[..., None]
        _check_size("segmentations", masks, video, where)
        members = {**encode_video(video, self.video_format, where, _FPS), "segmentations.npy.gz": masks}
        for field in self.fields:
            _check_range(features, f"metadata/{field}_range", where)
            if field == "depth":
                values = _pictures(features, field, where)[..., None]
                _check_size(field, values, video, where)
            else:
                values = _flow(features, field, (frames, height, width, 2), where)
            members[f"{field}.npy"] = values.astype(np.float32)
        members["info.json"] = {**describe(features, frames, where), "fps": _FPS, "record": [name, offset]}
        return members


def convert_movi(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    splits: Sequence[str] | None = None,
    fields: Sequence[str] = (),
    limit: int | None = None,
    video_format: str = "npy",
    samples_per_shard: int = 32,
    num_workers: int | None = None,
    on_bad_sample: Literal["raise", "skip"] = "raise",
    progress: bool = True,
) -> list[ConversionReport]:
    """Convert the MOVi data set in a folder to shards `<name>-<split>-000000.tar`, ….

    Args:
        root: Folder of the files `movi_c-train.tfrecord-00000-of-…`, or the data folder of TensorFlow Datasets above
            `movi_c/128x128/1.0.0`.
        out: Folder of the shards.
        splits: Splits to convert; None for all that are there.
        fields: Some of `EXTRA_FIELDS`, stored besides video and masks.
        limit: Most videos a split; None for all.
        video_format: `npy` or `mp4`.
        samples_per_shard: Videos a shard.
        num_workers: See `convert`.
        on_bad_sample: See `convert`.
        progress: Show bars on standard error.

    Returns:
        One report a split.

    Raises:
        ConfigError: An argument is out of range, or the folder does not hold exactly one data set.
        ShardError: Files are missing or damaged; see also `convert`.

    Example:
        >>> convert_movi("/nowhere", "shards")
        Traceback (most recent call last):
        ssync_pl.errors.ConfigError: Expected --root to be a folder, but there is no /nowhere...
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"Expected --limit to be at least 1, but got {limit}.")
    found = find_movi(root)
    decode = MoviDecoder(found.folder.resolve(), _ordered(fields), video_format)
    wanted = list(dict.fromkeys(splits)) if splits else found.splits
    records = {split: found.records(split, limit) for split in wanted}
    reports = []
    for split in wanted:
        items = [Item(f"{i:06d}", [name, *record]) for i, (name, record) in enumerate(records[split])]
        recipe = {
            "source": "movi",
            "converter_version": _VERSION,
            "name": found.name,
            "split": split,
            "dataset_version": found.info().get("version"),
            "fields": list(decode.fields),
            "video_format": video_format,
        }
        report = convert(
            items,
            decode,
            out,
            f"{found.name}-{split}",
            recipe=recipe,
            samples_per_shard=samples_per_shard,
            num_workers=num_workers,
            on_bad_sample=on_bad_sample,
            progress=progress,
        )
        reports.append(report)
    return reports


def add_parser(commands: Any) -> None:
    """Add `movi` to the commands of `ssync-pl data convert`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_parser(parser.add_subparsers())
        >>> parser.parse_args(["movi", "--root", "tfds", "--out", "shards", "--limit", "3"]).limit
        3
    """
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
        choices=EXTRA_FIELDS,
        help="store these too, as float32 from 0 to 65535; their ranges are in info.json",
    )
    parser.add_argument("--limit", type=int, help="convert only the first videos of each split")
    add_common(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    reports = convert_movi(
        options.root,
        options.out,
        splits=options.splits,
        fields=options.fields,
        limit=options.limit,
        video_format=options.video_format,
        **common(options),
    )
    for report in reports:
        print_report(report)
    return 0


def _ordered(fields: Sequence[str]) -> tuple[str, ...]:
    """Drop doubles and sort as in `EXTRA_FIELDS`, so that the order of the words does not change the plan."""
    known = [name for name in EXTRA_FIELDS if name in fields]
    return (*known, *(name for name in fields if name not in EXTRA_FIELDS))


def _values(features: Mapping[str, Feature], name: str, where: str) -> Feature:
    if name not in features:
        raise ShardError(
            f"Expected {where} to have the feature `{name}`, but it has {', '.join(sorted(features)[:20]) or 'none'}. "
            "It is no MOVi record of a known version."
        )
    return features[name]


def _pictures(features: Mapping[str, Feature], name: str, where: str) -> npt.NDArray[Any]:
    """Decode a list of PNG files to (F, H, W, 3) or (F, H, W)."""
    from PIL import Image

    files = _values(features, name, where)
    if not isinstance(files, list) or not files:
        raise ShardError(f"Expected `{name}` of {where} to be a list of PNG files, but got {_kind(files)}.")
    frames: list[npt.NDArray[Any]] = []
    for number, data in enumerate(files):
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
                if picture.mode not in _PICTURE_MODES[name]:
                    raise ValueError(f"a picture of mode {picture.mode}")
                frame = np.asarray(picture)
        except Exception as error:
            raise ShardError(
                f"Expected frame {number} of `{name}` of {where} to be a PNG file of mode {_PICTURE_MODES[name][0]}, "
                f"but got {error}. The record is damaged or of an unknown version."
            ) from error
        if frames and frame.shape != frames[0].shape:
            raise ShardError(
                f"Expected all frames of `{name}` of {where} to have the size {frames[0].shape[:2]}, but frame "
                f"{number} has {frame.shape[:2]}. The record is damaged."
            )
        frames.append(frame)
    return np.stack(frames)


def _flow(features: Mapping[str, Feature], name: str, shape: tuple[int, int, int, int], where: str) -> npt.NDArray[Any]:
    values = _values(features, name, where)
    if isinstance(values, list) or values.dtype != np.int64 or len(values) != np.prod(shape):
        raise ShardError(
            f"Expected `{name}` of {where} to be {np.prod(shape)} integers for shape {shape}, but got "
            f"{_kind(values)}. The record is damaged or of an unknown version."
        )
    if values.min() < 0 or values.max() > 65535:
        raise ShardError(
            f"Expected `{name}` of {where} to be from 0 to 65535, but got {values.min()} to {values.max()}."
        )
    return values.reshape(shape)


def _check_stated(features: Mapping[str, Feature], frames: int, height: int, width: int, where: str) -> None:
    for name, found in (("num_frames", frames), ("height", height), ("width", width)):
        stated = features.get(f"metadata/{name}")
        if stated is not None and (len(stated) != 1 or stated[0] != found):
            raise ShardError(
                f"Expected the video of {where} to have {name} {list(stated)} as its metadata says, but got {found}. "
                "The record is damaged."
            )


def _check_range(features: Mapping[str, Feature], name: str, where: str) -> None:
    values = _values(features, name, where)
    if isinstance(values, list) or len(values) != 2:
        raise ShardError(
            f"Expected `{name}` of {where} to be two numbers, but got {_kind(values)}. The record is damaged."
        )


def _check_size(name: str, values: npt.NDArray[Any], video: npt.NDArray[Any], where: str) -> None:
    if values.shape[:3] != video.shape[:3]:
        raise ShardError(
            f"Expected `{name}` of {where} to have the frames, height and width {video.shape[:3]} of the video, but "
            f"got {values.shape[:3]}. The record is damaged."
        )


def _kind(values: Feature) -> str:
    return f"{len(values)} {'byte strings' if isinstance(values, list) else f'values of {values.dtype}'}"
