"""Contact sheets of shards: some videos, each frame beside the same frame with its object masks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ssync_pl.data.decode import decode_member, require_allowed, view_npy
from ssync_pl.data.index import SampleEntry, ShardEntry, load_shards
from ssync_pl.data.patterns import is_compressed, is_remote, masked_url, shard_name
from ssync_pl.data.samples import find_member
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ConfigError, ShardError
from ssync_pl.tools.viz import SheetRow, compose_frames, draw_sheet, label_masks, overlay_labels, resize_nearest

__all__ = ["PickedVideos", "PreviewVideo", "compose_preview", "draw_preview", "pick_videos"]

Fetch = Callable[[str], "bytes | bytearray | memoryview"]

_MOST_FRAMES = 240  # of an MP4: more would take minutes to draw
_EMPTY = 255
_SEAM = 2  # white pixels between a frame and its overlay


@dataclass(frozen=True)
class PreviewVideo:
    """One video as it is drawn.

    Args:
        name: Shard and key.
        frames: uint8 (F, h, w, 3).
        labels: Integers (F, h, w), -1 where no object is; `None` without masks.
        objects: Number of objects in the video.

    Example:
        >>> PreviewVideo("a, key 7", np.zeros((2, 8, 8, 3), np.uint8), None, 0).frames.shape
        (2, 8, 8, 3)
    """

    name: str
    frames: np.ndarray
    labels: np.ndarray | None
    objects: int


@dataclass(frozen=True)
class PickedVideos:
    """What `pick_videos` read.

    Args:
        videos: The videos.
        skipped: Messages of those that could not be read.

    Example:
        >>> PickedVideos((), ()).skipped
        ()
    """

    videos: tuple[PreviewVideo, ...]
    skipped: tuple[str, ...]


def pick_videos(shards: Sequence[str], count: int, *, seed: int | None = 0) -> PickedVideos:
    """Read some videos; those that cannot be read are left out and named.

    Args:
        shards: Local paths, or URLs. Of remote and compressed shards only the starts are read.
        count: Number of videos, at least 1; fewer come where there are fewer.
        seed: Seed of the choice; `None` takes the first.

    Returns:
        The videos, in the order of the shards when `seed` is `None`.

    Raises:
        ConfigError: `count` is below 1.
        ShardError: No video can be read.

    Example:
        >>> import tempfile
        >>> from ssync_pl.data.shards import ShardWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ShardWriter(folder, "train") as writer:
        ...         writer.write("7", {"video.npy": np.zeros((2, 8, 8, 3), np.uint8)})
        ...     [video.name for video in pick_videos([f"{folder}/train-000000.tar"], 4).videos]
        ['train-000000, key 7']
    """
    if count < 1:
        raise ConfigError(f"Expected argument `count` (--videos) to be at least 1, but got {count}.")
    videos: list[PreviewVideo] = []
    skipped: list[str] = []
    generator = None if seed is None else np.random.default_rng(seed)
    streamed = any(is_remote(shard) or is_compressed(shard) for shard in shards)
    read = _streamed if streamed else _local
    with contextlib.closing(read(shards, count, generator, skipped)) as found:
        for shard, key, members, fetch in found:
            try:
                videos.append(_read(shard, key, members, fetch))
            except ShardError as error:
                skipped.append(str(error))
            if len(videos) == count:
                break
    if not videos:
        last = f"; the last problem: {skipped[-1].rstrip('.')}" if skipped else ""
        raise ShardError(
            f"Expected at least one readable video in {len(shards)} shards, but got none{last}. "
            "See `ssync-pl data check`."
        )
    return PickedVideos(tuple(videos), tuple(skipped))


def draw_preview(videos: Sequence[PreviewVideo], *, frames: int = 6, cell: int = 112) -> np.ndarray:
    """Draw a contact sheet: one row a video, each frame beside the same frame with its masks.

    Args:
        videos: The videos; sizes and lengths may differ. Proportions are kept.
        frames: Frames a video, evenly spaced, at least 1.
        cell: Longer side of a frame on the sheet, in pixels, at least 16.

    Returns:
        uint8 (height, width, 3).

    Raises:
        ConfigError: A setting is out of range.

    Example:
        >>> video = PreviewVideo("a, key 7", np.zeros((2, 8, 8, 3), np.uint8), None, 0)
        >>> draw_preview([video], frames=2, cell=32).dtype
        dtype('uint8')
    """
    if frames < 1 or cell < 16:
        raise ConfigError(f"Expected `frames` to be at least 1 and `cell` at least 16, but got {frames} and {cell}.")
    box, width = _box(videos, cell)
    columns = min(frames, max(len(video.frames) for video in videos))
    rows = []
    for video in videos:
        count = min(columns, len(video.frames))
        picked = [round(k * (len(video.frames) - 1) / max(count - 1, 1)) for k in range(count)]
        cells = np.full((columns, box[0], width, 3), _EMPTY, np.uint8)
        cells[:count] = _panels(video, picked, box, width)
        rows.append(SheetRow(_caption(video), cells))
    # One heading for all rows is true only where all videos are equally long.
    alike = len({len(video.frames) for video in videos}) == 1
    return draw_sheet(rows, columns=[f"frame {n}" for n in picked] if alike else [], cell=max(box[0], width))


def compose_preview(videos: Sequence[PreviewVideo], *, cell: int = 112) -> np.ndarray:
    """Lay the videos out as one clip: a row a video, frames beside the frames with masks.

    Args:
        videos: The videos; shorter ones hold their last frame, long ones show their first 240 frames.
        cell: Longer side of a frame, in pixels.

    Returns:
        uint8 (T, height, width, 3).

    Example:
        >>> video = PreviewVideo("a, key 7", np.zeros((2, 8, 8, 3), np.uint8), None, 0)
        >>> len(compose_preview([video], cell=32))
        2
    """
    box, width = _box(videos, cell)
    panels = []
    for video in videos:
        shown = list(range(min(len(video.frames), _MOST_FRAMES)))
        panels.append([_panels(video, shown, box, width)])
    return compose_frames(panels, columns=[""], rows=[_caption(video) for video in videos], cell=max(box[0], width))


def _local(
    shards: Sequence[str], count: int, generator: np.random.Generator | None, skipped: list[str]
) -> Generator[tuple[str, str, Collection[str], Fetch], None, None]:
    entries = []
    for shard in shards:
        try:
            entries.append((shard, load_shards([shard], save=False)[0]))
        except ShardError as error:
            skipped.append(str(error))
    places = [(shard, entry, sample) for shard, entry in entries for sample in entry.samples]
    order = range(len(places)) if generator is None else generator.permutation(len(places)).tolist()
    with contextlib.closing(ShardReader()) as reader:
        for number in order:
            shard, _, sample = places[number]

            def fetch(member: str, place: tuple[str, ShardEntry, SampleEntry] = places[number]) -> memoryview:
                return reader.member(*place, member)

            yield shard, sample.key, sample.members, fetch


def _streamed(
    shards: Sequence[str], count: int, generator: np.random.Generator | None, skipped: list[str]
) -> Generator[tuple[str, str, Collection[str], Fetch], None, None]:
    from ssync_pl.data.remote import stream_shard

    urls = list(shards) if generator is None else [shards[n] for n in generator.permutation(len(shards)).tolist()]
    # In the given order the first shard is read on; a random choice takes something from each shard.
    share = None if generator is None else -(-count // len(urls))
    for url in urls:
        try:
            with contextlib.closing(stream_shard(url)) as stream:
                for number, (key, members) in enumerate(stream):
                    if number == share:
                        break
                    yield url, key, members.sizes, members.read
        except ShardError as error:
            skipped.append(str(error))


def _read(shard: str, key: str, members: Collection[str], fetch: Fetch) -> PreviewVideo:
    where = f"{masked_url(shard)}, key {key}"
    frames = _array(find_member(members, "video", where), fetch, where)
    frames = frames[None] if frames.ndim == 3 else frames
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ShardError(
            f"Expected {where} to hold uint8 frames (F, h, w, 3), but got shape {frames.shape}, dtype {frames.dtype}."
        )
    name = f"{shard_name(shard).removesuffix('.tar')}, key {key}"
    if not any(member.split(".")[0] == "segmentations" for member in members):
        return PreviewVideo(name, np.array(frames), None, 0)
    masks = _array(find_member(members, "segmentations", where), fetch, where)
    if masks.ndim < 4 and len(frames) == 1 and masks.shape[:2] == frames.shape[1:3]:
        masks = masks[None]
    masks = masks[..., None] if masks.ndim == 3 else masks
    if masks.ndim != 4 or len(masks) != len(frames) or masks.dtype.kind not in "bui" or 0 in masks.shape[:3]:
        raise ShardError(
            f"Expected {where} to hold integer masks ({len(frames)}, h, w, N), but got shape {masks.shape}, dtype "
            f"{masks.dtype}."
        )
    if masks.shape[-1] == 1:
        ids = masks[..., 0].astype(np.int64)
        return PreviewVideo(name, np.array(frames), np.where(ids > 0, ids - 1, -1), int((np.unique(ids) > 0).sum()))
    labels = label_masks(np.moveaxis(masks != 0, -1, 1))
    return PreviewVideo(name, np.array(frames), labels, int((masks != 0).any(axis=(0, 1, 2)).sum()))


def _array(member: str, fetch: Fetch, where: str) -> np.ndarray:
    data = fetch(member)
    npy = require_allowed(member, where) == "npy"
    array: np.ndarray = view_npy(data, member, where) if npy else decode_member(member, data, where)
    return array


def _caption(video: PreviewVideo) -> str:
    shard, key = video.name.rsplit(", ", 1)
    length, height, width = video.frames.shape[:3]
    facts = [f"{length} frame" + "s" * (length != 1), f"{height} x {width}"]
    if video.labels is not None:
        facts.append(f"{video.objects} object" + "s" * (video.objects != 1))
    return "\n".join([shard, key, *facts])


def _box(videos: Sequence[PreviewVideo], cell: int) -> tuple[tuple[int, int], int]:
    # The smallest box that holds each video with its longer side at `cell`, and the width of a frame with its overlay.
    sizes = [_fitted(video.frames.shape[1:3], cell) for video in videos]
    box = max(size[0] for size in sizes), max(size[1] for size in sizes)
    masked = any(video.labels is not None for video in videos)
    return box, 2 * box[1] + _SEAM if masked else box[1]


def _fitted(size: Sequence[int], cell: int) -> tuple[int, int]:
    longer = max(size)
    return max(1, round(size[0] * cell / longer)), max(1, round(size[1] * cell / longer))


def _panels(video: PreviewVideo, picked: list[int], box: tuple[int, int], width: int) -> np.ndarray:
    frames = video.frames[picked]
    out = np.full((len(picked), box[0], width, 3), _EMPTY, np.uint8)
    out[:, :, : box[1]] = _letterbox(frames, box)
    if video.labels is not None:
        out[:, :, box[1] + _SEAM :] = _letterbox(overlay_labels(frames, video.labels[picked]), box)
    return out


def _letterbox(frames: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    height, width = frames.shape[1:3]
    scale = min(box[0] / height, box[1] / width)
    size = (min(box[0], max(1, round(height * scale))), min(box[1], max(1, round(width * scale))))
    if scale >= 1:
        scaled = resize_nearest(frames, size)
    else:
        shrunk = [Image.fromarray(f).resize((size[1], size[0]), Image.Resampling.BOX) for f in frames]
        scaled = np.stack([np.asarray(image) for image in shrunk])
    out = np.full((len(frames), *box, 3), _EMPTY, np.uint8)
    top, left = (box[0] - size[0]) // 2, (box[1] - size[1]) // 2
    out[:, top : top + size[0], left : left + size[1]] = scaled
    return out
