"""Contact sheets of shards: some videos, each frame beside the same frame with its object masks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageOps

from ssync_pl.data.index import load_shards
from ssync_pl.data.patterns import is_compressed, is_remote, shard_name
from ssync_pl.data.remote import stream_shard
from ssync_pl.data.samples import Members, SampleRules, arrange_masks, eval_sample, find_member
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ConfigError, ShardError
from ssync_pl.tools.viz import SheetRow, compose_frames, draw_sheet, label_masks, overlay_labels

__all__ = ["PreviewVideo", "compose_preview", "draw_preview", "pick_videos"]

_MOST_FRAMES = 240  # of an MP4: more would take minutes to draw
_SEAM = 2  # white pixels between a frame and its overlay

_Found = Iterator[tuple[str, str, Members]]


@dataclass(frozen=True)
class PreviewVideo:
    """One video as it is drawn: frames (F, h, w, 3) uint8, and labels (F, h, w), -1 where no object is, or `None`."""

    name: str
    frames: np.ndarray
    labels: np.ndarray | None
    objects: int


def pick_videos(shards: Sequence[str], count: int, *, seed: int | None = 0) -> tuple[list[PreviewVideo], list[str]]:
    """Read some videos; those that cannot be read are left out and named.

    Args:
        shards: Local paths, or URLs. Of remote and compressed shards only the starts are read.
        count: Number of videos, at least 1; fewer come where there are fewer.
        seed: Seed of the choice; `None` takes the first.

    Returns:
        The videos, and messages of those that could not be read.

    Raises:
        ConfigError: `count` is below 1.
        ShardError: No video can be read.
    """
    if count < 1:
        raise ConfigError(f"Expected argument `count` (--videos) to be at least 1, but got {count}.")
    videos: list[PreviewVideo] = []
    skipped: list[str] = []
    generator = None if seed is None else np.random.default_rng(seed)
    streamed = any(is_remote(shard) or is_compressed(shard) for shard in shards)
    find = _streamed if streamed else _local
    for shard, key, members in find(shards, count, generator, skipped):
        try:
            videos.append(_read(f"{shard_name(shard).removesuffix('.tar')}, key {key}", members))
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
    return videos, skipped


def draw_preview(videos: Sequence[PreviewVideo], *, frames: int = 6, cell: int = 112) -> np.ndarray:
    """Draw a contact sheet (height, width, 3): one row per video, each frame beside the same frame with its masks.

    Args:
        videos: The videos; sizes and lengths may differ. Proportions are kept.
        frames: Frames per video, evenly spaced, at least 1.
        cell: Longer side of a frame on the sheet, in pixels, at least 16.

    Raises:
        ConfigError: A setting is out of range.
    """
    if frames < 1 or cell < 16:
        raise ConfigError(f"Expected `frames` to be at least 1 and `cell` at least 16, but got {frames} and {cell}.")
    columns = min(frames, max(len(video.frames) for video in videos))
    rows = []
    for video, panel in zip(videos, _panels(videos, cell), strict=True):
        count = min(columns, len(video.frames))
        picked = [round(k * (len(video.frames) - 1) / max(count - 1, 1)) for k in range(count)]
        shown = np.stack([panel(number) for number in picked])
        rows.append(
            SheetRow(_caption(video), np.pad(shown, ((0, columns - count), *((0, 0),) * 3), constant_values=255))
        )
    return draw_sheet(rows, cell=max(rows[0].frames.shape[1:3]))


def compose_preview(videos: Sequence[PreviewVideo], *, cell: int = 112) -> np.ndarray:
    """Lay the videos out as one clip (T, height, width, 3); shorter ones hold their last frame, long ones are cut."""
    clips = [
        [np.stack([panel(number) for number in range(min(len(video.frames), _MOST_FRAMES))])]
        for video, panel in zip(videos, _panels(videos, cell), strict=True)
    ]
    side = max(clips[0][0].shape[1:3])
    return compose_frames(clips, columns=[""], rows=[_caption(video) for video in videos], cell=side)


def _local(shards: Sequence[str], count: int, generator: np.random.Generator | None, skipped: list[str]) -> _Found:
    places = []
    for shard in shards:
        try:
            entry = load_shards([shard], save=False)[0]
            places += [(shard, entry, sample) for sample in entry.samples]
        except ShardError as error:
            skipped.append(str(error))
    order = range(len(places)) if generator is None else generator.permutation(len(places)).tolist()
    with contextlib.closing(ShardReader()) as reader:
        for number in order:
            yield places[number][0], places[number][2].key, reader.sample(*places[number])


def _streamed(shards: Sequence[str], count: int, generator: np.random.Generator | None, skipped: list[str]) -> _Found:
    urls = list(shards) if generator is None else [shards[n] for n in generator.permutation(len(shards)).tolist()]
    # In the given order the first shard is read on; a random choice takes something from each shard.
    share = None if generator is None else -(-count // len(urls))
    for url in urls:
        try:
            with contextlib.closing(stream_shard(url)) as stream:
                for number, (key, members) in enumerate(stream):
                    if number == share:
                        break
                    yield url, key, members
        except ShardError as error:
            skipped.append(str(error))


def _read(name: str, members: Members) -> PreviewVideo:
    frames = eval_sample(members, SampleRules())["video"].numpy()
    if not any(member.split(".")[0] == "segmentations" for member in members.sizes):
        return PreviewVideo(name, frames, None, 0)
    member = find_member(members.sizes, "segmentations", members.where)
    masks = arrange_masks(members.decode(member), len(frames), frames.shape[1:3], members.name(member))
    if masks.shape[-1] > 1:
        labels = label_masks(np.moveaxis(masks != 0, -1, 1))
        return PreviewVideo(name, frames, labels, int((masks != 0).any(axis=(0, 1, 2)).sum()))
    ids = masks[..., 0].astype(np.int64)
    return PreviewVideo(name, frames, np.where(ids > 0, ids - 1, -1), int((np.unique(ids) > 0).sum()))


def _caption(video: PreviewVideo) -> str:
    length, height, width = video.frames.shape[:3]
    facts = [*video.name.rsplit(", ", 1), f"{length} frame" + "s" * (length != 1), f"{height} x {width}"]
    if video.labels is not None:
        facts.append(f"{video.objects} object" + "s" * (video.objects != 1))
    return "\n".join(facts)


def _panels(videos: Sequence[PreviewVideo], cell: int) -> list[Callable[[int], np.ndarray]]:
    """For each video, what draws one of its frames, with its overlay beside it, into a box that all videos share."""
    sizes = [np.array(video.frames.shape[1:3]) * cell / max(video.frames.shape[1:3]) for video in videos]
    height, width = (max(1, round(float(side))) for side in np.max(sizes, axis=0))
    masked = any(video.labels is not None for video in videos)

    def fit(frame: np.ndarray) -> np.ndarray:
        enlarge = frame.shape[0] <= height and frame.shape[1] <= width
        method = Image.Resampling.NEAREST if enlarge else Image.Resampling.BOX
        return np.asarray(ImageOps.pad(Image.fromarray(frame), (width, height), method, (255, 255, 255)))

    def draw(video: PreviewVideo, number: int) -> np.ndarray:
        frame = video.frames[number]
        if not masked:
            return fit(frame)
        seam, empty = np.full((height, _SEAM, 3), 255, np.uint8), np.full((height, width, 3), 255, np.uint8)
        labels = None if video.labels is None else video.labels[None, number]
        overlay = empty if labels is None else fit(overlay_labels(frame[None], labels)[0])
        return np.concatenate([fit(frame), seam, overlay], axis=1)

    return [partial(draw, video) for video in videos]
