"""From the members of one sample to what a worker emits: uint8 frames, masks and the clip's parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ssync_pl.data.decode import (
    count_frames,
    decode_member,
    decode_video,
    read_npy_header,
    require_allowed,
    view_npy,
)
from ssync_pl.data.sampling import draw_clip
from ssync_pl.data.transforms import Size, covering_size
from ssync_pl.errors import ConfigError, ShardError

__all__ = [
    "SampleRules",
    "clip_span",
    "count_objects",
    "eval_sample",
    "find_member",
    "mask_channels",
    "train_sample",
]

MaskFormat = Literal["ids", "channels"]
Fetch = Callable[[str], "bytes | memoryview"]

# The first that a sample has is used: the cheapest to slice comes first.
_FIELDS = {
    "video": (
        "video.npy",
        "video.npy.gz",
        "video.mp4",
        "image.npy",
        "image.npy.gz",
        "image.jpg",
        "image.jpeg",
        "image.png",
    ),
    "segmentations": ("segmentations.npy", "segmentations.npy.gz", "segmentations.png"),
}


@dataclass(frozen=True)
class SampleRules:
    """How samples are cut; shared by the map-style and the streaming data set.

    Args:
        clip_length: Frames of a training clip; `None` takes whole videos, for evaluation.
        frame_stride: Distance between the frames of a clip, in frames.
        image_size: Height and width of the batch, or `None` for the stored size.
        crop: `none` resizes to `image_size`; `random` and `center` cover it and crop.
        flip_probability: Probability of a left-right flip in training.
        masks: Whether object masks are read.
        mask_format: `ids`: (F, h, w, 1), 0 = background (MOVi); `channels`: (F, h, w, N), one an object (YT-VIS).
        max_objects: Most objects a mask may have; `None` for no limit.
        seed: Seed of the run.
        reference: Cut clips and crops as published VideoSAUR-style pipelines do: a clip starts at a multiple of its
            length.
        video: Whether training clips hold their frames; without them only what is cached is read.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> SampleRules(clip_length=4, frame_stride=2).training
        True
    """

    clip_length: int | None = None
    frame_stride: int = 1
    image_size: Size | None = None
    crop: str = "none"
    flip_probability: float = 0.0
    masks: bool = False
    mask_format: MaskFormat = "ids"
    max_objects: int | None = None
    seed: int = 0
    reference: bool = False
    video: bool = True

    def __post_init__(self) -> None:
        for name, value in (("clip_length", self.clip_length), ("frame_stride", self.frame_stride)):
            if value is not None and value < 1:
                raise ConfigError(f"Expected argument `{name}` to be at least 1, but got {value}.")
        if self.reference and self.frame_stride != 1:
            raise ConfigError(
                f"Expected argument `frame_stride` to be 1 for sampling='reference', but got {self.frame_stride}."
            )
        if not 0.0 <= self.flip_probability <= 1.0:
            raise ConfigError(f"Expected argument `flip_probability` to be in [0, 1], but got {self.flip_probability}.")

    @property
    def training(self) -> bool:
        """Whether clips are cut, rather than whole videos taken."""
        return self.clip_length is not None


def clip_span(clip_length: int, frame_stride: int) -> int:
    """Frames from the first to the last of a clip, both included.

    Args:
        clip_length: Frames of the clip.
        frame_stride: Distance between them.

    Returns:
        The number of frames a video needs.

    Example:
        >>> clip_span(4, 2)
        7
    """
    return (clip_length - 1) * frame_stride + 1


def find_member(members: Collection[str], field: str, where: str = "") -> str:
    """Choose the member that holds a field, refusing samples that have it only in a forbidden format.

    Args:
        members: Names of the sample's members.
        field: `video` or `segmentations`.
        where: Shard and key, for the message.

    Returns:
        Name of the member.

    Raises:
        ShardError: There is none, or only one that is refused.

    Example:
        >>> find_member(["segmentations.npy.gz", "video.npy"], "segmentations")
        'segmentations.npy.gz'
    """
    found = next((name for name in _FIELDS[field] if name in members), None)
    if found is not None:
        return found
    for name in members:
        if name.split(".")[0] in (field, "image" if field == "video" else field):
            require_allowed(name, where)
    raise ShardError(
        f"Expected {where or 'the sample'} to have one of the members {', '.join(_FIELDS[field])}, but got "
        f"{', '.join(sorted(members)) or 'none'}. Write the {field} under one of these names."
    )


def mask_channels(member: str, data: bytes | memoryview, where: str = "") -> int:
    """Number of channels of stored masks, from the header only.

    Args:
        member: Name of the member.
        data: Its bytes.
        where: Shard and key, for the message.

    Returns:
        N of (F, h, w, N); 1 for pictures.

    Raises:
        ShardError: The header is unreadable.

    Example:
        >>> import io
        >>> buffer = io.BytesIO()
        >>> np.save(buffer, np.zeros((2, 8, 8, 3), np.uint8))
        >>> mask_channels("segmentations.npy", buffer.getvalue())
        3
    """
    extension = require_allowed(member, where)
    if extension not in ("npy", "npy.gz"):
        return 1
    shape = read_npy_header(memoryview(data), member, where).shape
    if len(shape) == 3 and shape[0] < shape[-1]:
        # Fewer rows than columns of numbers: frames of ids (F, h, w), not the channels (h, w, N) of an image.
        return 1
    return shape[-1] if len(shape) >= 3 else 1


def count_objects(member: str, data: bytes | memoryview, mask_format: MaskFormat, where: str = "") -> int:
    """Most objects that one sample's masks can show: the largest id, or the number of channels.

    Args:
        member: Name of the member.
        data: Its bytes.
        mask_format: How the masks are stored.
        where: Shard and key, for the message.

    Returns:
        Number of objects without the background.

    Raises:
        ShardError: The masks are unreadable.

    Example:
        >>> import io
        >>> buffer = io.BytesIO()
        >>> np.save(buffer, np.full((2, 8, 8, 1), 5, np.uint8))
        >>> count_objects("segmentations.npy", buffer.getvalue(), "ids")
        5
    """
    if mask_format == "channels":
        return mask_channels(member, data, where)
    ids = _view(member, data, where)
    return int(ids.max()) if ids.size else 0


def train_sample(
    members: Collection[str], fetch: Fetch, key: str, where: str, rules: SampleRules, epoch: int, clip: int
) -> dict[str, Any]:
    """Cut one training clip.

    Args:
        members: Names of the sample's members.
        fetch: Returns the bytes of a member.
        key: Name of the video with its shard: what the random choices hang on.
        where: Shard and key, for messages.
        rules: How to cut.
        epoch: Number of the pass.
        clip: Number of the clip of this video in this pass.

    Returns:
        `video` (T, h, w, 3) uint8 unless `rules.video` is off, `flip` bool scalar, `crop` (2,) int64 (top and left in
        the resized picture), `cut` (the frames taken, a slice), with `rules.masks` also `segmentations` (T, h, w, N)
        uint8.

    Raises:
        ShardError: The video is shorter than a clip, a member is refused or does not fit.

    Example:
        >>> import io
        >>> buffer = io.BytesIO()
        >>> np.save(buffer, np.zeros((6, 8, 8, 3), np.uint8))
        >>> sample = train_sample(
        ...     ["video.npy"], lambda name: buffer.getvalue(), "a/7", "a, key 7", SampleRules(clip_length=2), 0, 0
        ... )
        >>> sample["video"].shape
        torch.Size([2, 8, 8, 3])
    """
    if rules.clip_length is None:
        raise ConfigError("Expected argument `rules` to have a `clip_length` for training, but got None.")
    member = find_member(members, "video", where)
    data = fetch(member)
    frames = _count_frames(member, data, where)
    span = clip_span(rules.clip_length, rules.frame_stride)
    if frames < span:
        raise ShardError(
            f"Expected {where} to have at least {span} frames (clip_length={rules.clip_length}, frame_stride="
            f"{rules.frame_stride}), but got {frames}. Shorten the clip, or set on_bad_sample='skip'."
        )
    if rules.reference:
        draw = draw_clip(key, clip, rules.seed, epoch, frames // span, rules.flip_probability, span)
    else:
        draw = draw_clip(key, clip, rules.seed, epoch, frames - span + 1, rules.flip_probability)
    cut = slice(draw.start, draw.start + span, rules.frame_stride)
    if not rules.video:
        return {"flip": torch.tensor(draw.flip), "crop": torch.zeros(2, dtype=torch.int64), "cut": cut}
    video = _check_video(_read_frames(member, data, where, cut), member, where)
    if len(video) != rules.clip_length:
        raise ShardError(
            f"Expected member `{member}` of {where} to hold {frames} frames as its header says, but it ends early. The "
            "member is damaged: copy or build the shard again."
        )
    sample: dict[str, Any] = {
        "video": torch.from_numpy(video),
        "flip": torch.tensor(draw.flip),
        "crop": crop_offsets(video, rules, draw.top, draw.left),
        "cut": cut,
    }
    if rules.masks:
        sample["segmentations"] = _masks(members, fetch, where, rules, cut, frames, video.shape)
    return sample


def eval_sample(members: Collection[str], fetch: Fetch, where: str, rules: SampleRules) -> dict[str, Any]:
    """Read one whole video for evaluation.

    Args:
        members: Names of the sample's members.
        fetch: Returns the bytes of a member.
        where: Shard and key, for messages.
        rules: How to read.

    Returns:
        `video` (F, h, w, 3) uint8, `crop` (2,) int64 of the central crop, `cut` (all frames, a slice), with
        `rules.masks` also `segmentations` (F, h, w, N) uint8.

    Raises:
        ShardError: A member is missing, refused or does not fit.

    Example:
        >>> import io
        >>> buffer = io.BytesIO()
        >>> np.save(buffer, np.zeros((6, 8, 8, 3), np.uint8))
        >>> eval_sample(["video.npy"], lambda name: buffer.getvalue(), "a, key 7", SampleRules())["video"].shape
        torch.Size([6, 8, 8, 3])
    """
    member = find_member(members, "video", where)
    video = _check_video(_read_frames(member, fetch(member), where, None), member, where)
    offsets = crop_offsets(video, rules, None, None)
    sample: dict[str, Any] = {"video": torch.from_numpy(video), "crop": offsets, "cut": slice(0, len(video), 1)}
    if rules.masks:
        sample["segmentations"] = _masks(members, fetch, where, rules, slice(None), len(video), video.shape)
    return sample


def _read_frames(member: str, data: bytes | memoryview, where: str, cut: slice | None) -> np.ndarray:
    extension = require_allowed(member, where)
    if extension == "mp4":
        place = f"member `{member}` of {where}"
        return np.stack(list(decode_video(data, place, None if cut is None else range(cut.start, cut.stop, cut.step))))
    array = _view(member, data, where)
    array = array[None] if array.ndim == 3 else array
    # A copy, so that a batch never keeps a whole video or a memory map alive.
    return np.array(array if cut is None else array[cut], order="C")


def _view(member: str, data: bytes | memoryview, where: str) -> np.ndarray:
    # Only what is cut out is copied from a memory map.
    if require_allowed(member, where) == "npy":
        return view_npy(data, member, where)
    array: np.ndarray = decode_member(member, data, where)
    return array


def _count_frames(member: str, data: bytes | memoryview, where: str) -> int:
    extension = require_allowed(member, where)
    if extension == "mp4":
        return count_frames(data, f"member `{member}` of {where}")
    if extension not in ("npy", "npy.gz"):
        return 1
    shape = read_npy_header(memoryview(data), member, where).shape
    return shape[0] if len(shape) == 4 else 1


def _check_video(video: np.ndarray, member: str, where: str) -> np.ndarray:
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        raise ShardError(
            f"Expected member `{member}` of {where} to be uint8 frames (F, h, w, 3), but got shape {video.shape}, "
            f"dtype {video.dtype}. Convert the video to RGB bytes."
        )
    return video


def _masks(
    members: Collection[str],
    fetch: Fetch,
    where: str,
    rules: SampleRules,
    cut: slice,
    frames: int,
    video_shape: tuple[int, ...],
) -> Tensor:
    member = find_member(members, "segmentations", where)
    masks = _view(member, fetch(member), where)
    if masks.ndim < 4 and frames == 1 and masks.shape[:2] == video_shape[1:3]:
        masks = masks[None]  # pictures are stored without the frame axis
    masks = masks[..., None] if masks.ndim == 3 else masks
    if (
        masks.ndim != 4
        or 0 in masks.shape[:3]
        or not (np.issubdtype(masks.dtype, np.integer) or masks.dtype == np.bool_)
    ):
        raise ShardError(
            f"Expected member `{member}` of {where} to be integer masks (F, h, w, N), but got shape {masks.shape}, "
            f"dtype {masks.dtype}. Convert the masks."
        )
    if len(masks) != frames:
        raise ShardError(
            f"Expected member `{member}` of {where} to have as many frames as the video, {frames}, but got "
            f"{len(masks)}. Build the sample again."
        )
    height, width = masks.shape[1:3]
    if abs(height * video_shape[2] - width * video_shape[1]) > 0.02 * height * video_shape[2]:
        raise ShardError(
            f"Expected member `{member}` of {where} to have the video's proportions {video_shape[1]}x{video_shape[2]}, "
            f"but got {height}x{width}. Build the sample again."
        )
    # The limit holds for the whole video, so that a clip's fate does not hang on where it starts.
    objects = masks.shape[-1] if rules.mask_format == "channels" else int(masks.max(initial=0))
    if rules.mask_format == "ids" and (masks.shape[-1] != 1 or masks.min(initial=0) < 0):
        raise ShardError(
            f"Expected member `{member}` of {where} to hold ids (F, h, w, 1) from 0 on, but got shape {masks.shape}, "
            f"least value {int(masks.min(initial=0))}. For one channel an object, set mask_format='channels'."
        )
    if objects > (255 if rules.max_objects is None else rules.max_objects):
        raise ShardError(
            f"Expected {where} to have at most {rules.max_objects or 255} objects (max_objects), but member `{member}` "
            f"has {objects}. Raise `max_objects`."
        )
    masks = masks[cut]
    # A copy here too: the masks may lie in a memory map.
    return torch.from_numpy(np.array(masks != 0 if rules.mask_format == "channels" else masks, np.uint8, order="C"))


def crop_offsets(video: np.ndarray, rules: SampleRules, top: float | None, left: float | None) -> Tensor:
    if rules.image_size is None or rules.crop == "none":
        return torch.zeros(2, dtype=torch.int64)
    height, width = covering_size((video.shape[1], video.shape[2]), rules.image_size, floor=rules.reference)
    room = (height - rules.image_size[0], width - rules.image_size[1])
    if rules.crop == "center" or top is None or left is None:
        # published code rounds halves to the even pixel
        return torch.tensor([round(side / 2) if rules.reference else side // 2 for side in room])
    return torch.tensor([int(top * (room[0] + 1)), int(left * (room[1] + 1))])
