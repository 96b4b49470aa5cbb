"""One shard looked through: every sample's facts, and every problem instead of only the first."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.check_report import Problem
from ssync_pl.data.decode import (
    count_frames,
    decode_member,
    decode_video,
    read_npy_header,
    require_allowed,
    view_npy,
)
from ssync_pl.data.index import SampleEntry, ShardEntry, scan_shard, split_member_name
from ssync_pl.data.patterns import is_compressed, is_remote, masked_url
from ssync_pl.errors import ShardError

__all__ = ["SampleFacts", "ShardFacts", "ShardJob", "inspect_shard"]

Fetch = Callable[[str], "bytes | bytearray | memoryview"]


@dataclass(frozen=True)
class ShardJob:
    """What one process has to look through.

    Args:
        shard: Path or URL.
        deep: Decode every member, rather than read headers.
        max_objects: Most objects a video may have; `None` for no limit.

    Example:
        >>> ShardJob("train-000000.tar", deep=False).max_objects is None
        True
    """

    shard: str
    deep: bool = True
    max_objects: int | None = None


@dataclass(frozen=True)
class SampleFacts:
    """What was read of one sample.

    Args:
        key: The sample's key.
        members: Member name → bytes.
        shape: (F, h, w) of the video, or `None` when it cannot be read.
        mask_channels: Channels of the masks; 0 without masks.
        ids: Distinct object ids above 0, and the largest; `None` when masks were not decoded.
        filled: Channels that are not empty; `None` when masks were not decoded.
        digest: Hash of the decoded frames; `None` when they were not decoded.

    Example:
        >>> SampleFacts("7", {"video.npy": 640}, (4, 8, 8)).shape
        (4, 8, 8)
    """

    key: str
    members: dict[str, int]
    shape: tuple[int, int, int] | None = None
    mask_channels: int = 0
    ids: tuple[int, int] | None = None
    filled: int | None = None
    digest: str | None = None


@dataclass(frozen=True)
class ShardFacts:
    """What was read of one shard.

    Args:
        shard: Path or URL.
        size: Bytes.
        samples: Its samples, in the order of the file.
        problems: What is wrong with it.
        entry: Its entry for `index.json`; `None` when it is damaged or remote.

    Example:
        >>> ShardFacts("a.tar", 0, (), ()).entry is None
        True
    """

    shard: str
    size: int
    samples: tuple[SampleFacts, ...]
    problems: tuple[Problem, ...]
    entry: ShardEntry | None = None

    @property
    def shown(self) -> str:
        """The shard as it may be printed: without passwords."""
        return masked_url(self.shard)


def inspect_shard(job: ShardJob) -> ShardFacts:
    """Look through one shard; damage becomes a problem, never an exception.

    Args:
        job: The shard and how to look.

    Returns:
        Its samples and problems. Of a damaged shard, what lies before the damage.

    Example:
        >>> inspect_shard(ShardJob("/nowhere/a.tar")).problems[0].kind
        'shard'
    """
    return _Inspection(job).run()


class _Inspection:
    def __init__(self, job: ShardJob) -> None:
        self.job = job
        self.problems: list[Problem] = []
        self.samples: list[SampleFacts] = []

    def run(self) -> ShardFacts:
        try:
            size, entry = self._read()
        except (OSError, MemoryError) as error:
            self._add("shard", None, f"Expected a readable file, but reading failed ({error}). Copy it again.")
            size, entry = 0, None
        if not self.samples and not self.problems:
            self._add("shard", None, "Expected at least one sample, but got none. Name members `<key>.video.npy`.")
        return ShardFacts(self.job.shard, size, tuple(self.samples), tuple(self.problems), entry)

    def _read(self) -> tuple[int, ShardEntry | None]:
        if is_remote(self.job.shard):
            return self._streamed(), None
        if is_compressed(self.job.shard):
            self._streamed()
            return Path(self.job.shard).stat().st_size, None
        return self._local()

    def _local(self) -> tuple[int, ShardEntry | None]:
        path = Path(self.job.shard)
        entry: ShardEntry | None = None
        try:
            entry = scan_shard(path)
            found: Iterable[SampleEntry] = entry.samples
        except ShardError as error:
            self._add("shard", None, str(error))
            found = self._salvage(path)
        size = path.stat().st_size
        with path.open("rb") as stream:
            # A map, so that of a large member only the pages that are looked at are read.
            opened = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            data = memoryview(opened)
            for sample in found:

                def fetch(name: str, places: Mapping[str, tuple[int, int]] = sample.members) -> memoryview:
                    offset, length = places[name]
                    return data[offset : offset + length]

                self._sample(sample.key, {name: length for name, (_, length) in sample.members.items()}, fetch)
        return size, entry

    def _salvage(self, path: Path) -> list[SampleEntry]:
        size = path.stat().st_size
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        with contextlib.suppress(tarfile.TarError, EOFError), tarfile.open(path, "r:") as tar:
            for info in tar:
                parts = split_member_name(info.name) if info.isreg() and not info.issparse() else None
                if parts is None:
                    continue
                key, member = parts
                if info.offset_data + info.size > size:
                    self._add(
                        "member",
                        key,
                        f"Expected member `{member}` to have {info.size} bytes, but the file ends after "
                        f"{max(size - info.offset_data, 0)}. It is half written: copy or build the shard again.",
                    )
                    continue
                groups.setdefault(key, {}).setdefault(member, (info.offset_data, info.size))
        return [SampleEntry(key, members) for key, members in groups.items()]

    def _streamed(self) -> int:
        from ssync_pl.data.remote import stream_shard

        size = 0
        try:
            for key, members in stream_shard(self.job.shard):
                lengths = dict(members.sizes)
                size += sum(lengths.values())
                self._sample(key, lengths, members.read)
        except ShardError as error:
            self._add("shard", None, str(error))
        return size

    def _sample(self, key: str, lengths: dict[str, int], fetch: Fetch) -> None:
        where = f"{masked_url(self.job.shard)}, key {key}"
        readable = [name for name in sorted(lengths) if self._is_readable(name, key, where)]
        looks = {name: self._look(name, key, where, fetch) for name in readable}
        facts = SampleFacts(key, dict(sorted(lengths.items())))
        used = self._used(lengths, "video", key, where)
        video = looks.get(used)
        if video is not None:
            shape = self._video_shape(used, video, key)
            facts = replace(facts, shape=shape, digest=_digest(video.array if shape is not None else None))
        if any(name.split(".")[0] == "segmentations" for name in lengths):
            used = self._used(lengths, "segmentations", key, where)
            masks = looks.get(used)
            facts = facts if masks is None else self._with_masks(facts, used, masks)
        self.samples.append(facts)

    def _used(self, lengths: dict[str, int], field: str, key: str, where: str) -> str:
        from ssync_pl.data.samples import find_member

        try:
            return find_member(lengths, field, where)
        except ShardError as error:
            if not any(problem.key == key for problem in self.problems):
                self._add("sample", key, str(error))
            return ""

    def _is_readable(self, name: str, key: str, where: str) -> bool:
        try:
            require_allowed(name, where)
        except ShardError as error:
            # Other extensions are never read and harm nobody; they are only counted.
            if "can execute code" in str(error):
                self._add("refused", key, str(error))
            return False
        return True

    def _look(self, name: str, key: str, where: str, fetch: Fetch) -> _Look | None:
        try:
            look = _look(name, fetch(name), where, self.job.deep)
        except (ShardError, MemoryError) as error:
            refused = "can execute code" in str(error)
            self._add("refused" if refused else "member", key, str(error) or f"Member `{name}` does not fit in memory.")
            return None
        if look is not None and look.dtype.kind not in "buif":
            self._add(
                "sample",
                key,
                f"Expected member `{name}` to hold plain numbers, but got dtype {look.dtype}. Save it with a bool, "
                "integer or float dtype.",
            )
            return None
        return look

    def _video_shape(self, name: str, look: _Look, key: str) -> tuple[int, int, int] | None:
        shape = look.shape if len(look.shape) == 4 else (1, *look.shape)
        if len(shape) != 4 or shape[-1] != 3 or look.dtype != np.uint8 or 0 in shape:
            self._add(
                "sample",
                key,
                f"Expected member `{name}` to be uint8 frames (F, h, w, 3), but got shape {look.shape}, dtype "
                f"{look.dtype}. Convert the video to RGB bytes.",
            )
            return None
        return shape[0], shape[1], shape[2]

    def _with_masks(self, facts: SampleFacts, name: str, look: _Look) -> SampleFacts:
        shape = look.shape
        if len(shape) < 4 and facts.shape is not None and facts.shape[0] == 1 and shape[:2] == facts.shape[1:]:
            shape = (1, *shape)  # pictures are stored without the frame axis
        shape = (*shape, 1) if len(shape) == 3 else shape
        if len(shape) != 4 or look.dtype.kind not in "bui":
            self._add(
                "sample",
                facts.key,
                f"Expected member `{name}` to be integer masks (F, h, w, N), but got shape {look.shape}, dtype "
                f"{look.dtype}. Convert the masks.",
            )
            return facts
        if facts.shape is not None and shape[0] != facts.shape[0]:
            self._add(
                "sample",
                facts.key,
                f"Expected member `{name}` to have as many frames as the video, {facts.shape[0]}, but got {shape[0]}. "
                "Build the sample again.",
            )
        if facts.shape is not None:
            height, width = facts.shape[1:]
            if abs(shape[1] * width - shape[2] * height) > 0.02 * shape[1] * width:
                self._add(
                    "sample",
                    facts.key,
                    f"Expected member `{name}` to have the video's proportions {height}x{width}, but got "
                    f"{shape[1]}x{shape[2]}. Build the sample again.",
                )
        ids, filled = None, None
        if look.array is not None:
            array = look.array.reshape(shape)
            if array.size and array.min() < 0:
                self._add(
                    "sample",
                    facts.key,
                    f"Expected member `{name}` to hold ids from 0 on, but the least is {int(array.min())}. Renumber "
                    "them, 0 for the background.",
                )
            if shape[-1] == 1:
                distinct = np.unique(array)
                above = distinct[distinct > 0]
                ids = (len(above), int(above.max(initial=0)))
            filled = int((array != 0).any(axis=(0, 1, 2)).sum())
        most = shape[-1] if shape[-1] > 1 else (ids[1] if ids else 0)
        limit = self.job.max_objects
        if limit is not None and most > limit:
            self._add(
                "sample",
                facts.key,
                f"Expected at most {limit} objects (max_objects), but member `{name}` has {most}. Raise the limit.",
            )
        return replace(facts, mask_channels=shape[-1], ids=ids, filled=filled)

    def _add(self, kind: str, key: str | None, message: str) -> None:
        self.problems.append(Problem(kind, masked_url(self.job.shard), key, message))


@dataclass(frozen=True)
class _Look:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    array: np.ndarray | None


def _look(name: str, data: bytes | bytearray | memoryview, where: str, deep: bool) -> _Look | None:
    extension = require_allowed(name, where)
    if extension == "json":
        decode_member(name, data, where)
        return None
    if extension == "npy.gz" and not deep:
        header = read_npy_header(memoryview(data), name, where)
        return _Look(header.shape, header.dtype, None)
    if extension == "mp4":
        _require_whole_mp4(name, data, where)
        said = count_frames(data, f"member `{name}` of {where}")
        frames = np.stack(list(decode_video(data, f"member `{name}` of {where}", None if deep else [0])))
        if deep and len(frames) != said:
            raise ShardError(
                f"Expected member `{name}` of {where} to hold {said} frames, but {len(frames)} can be decoded. The "
                "member is damaged: copy or build the shard again."
            )
        return _Look((said, *frames.shape[1:]), frames.dtype, frames if deep else None)
    array = view_npy(data, name, where) if extension == "npy" else decode_member(name, data, where)
    return _Look(array.shape, array.dtype, array if deep else None)


def _require_whole_mp4(name: str, data: bytes | bytearray | memoryview, where: str) -> None:
    # Decoders forgive a lost end; the boxes of the format (ISO 14496-12) say how long the file was.
    place = 0
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size == 0:  # the last box, up to the end
            return
        place += max(size, 8)
    if place != len(data):
        raise ShardError(
            f"Expected member `{name}` of {where} to be a whole mp4 file, but its boxes take {place} bytes and it has "
            f"{len(data)}. The member is half written or damaged: copy or build the shard again."
        )


def _digest(array: np.ndarray | None) -> str | None:
    # Of the frames rather than the stored bytes, so that `.npy` and `.npy.gz` of one video are told to be the same.
    if array is None:
        return None
    shape = array.shape if array.ndim == 4 else (1, *array.shape)
    state = hashlib.blake2b(repr(shape).encode(), digest_size=16)
    for frame in array.reshape(shape):
        state.update(np.ascontiguousarray(frame).tobytes())
    return state.hexdigest()
