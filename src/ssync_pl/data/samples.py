"""From the members of one sample to what a worker emits: uint8 frames, masks and the clip's parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ssync_pl.data.decode import (
    HEADER_BYTES,
    MAX_MEMBER_BYTES,
    NpyHeader,
    count_frames,
    decode_member,
    decode_video,
    member_extension,
    read_npy_header,
    require_allowed,
    require_size,
)
from ssync_pl.data.sampling import draw_clip
from ssync_pl.data.transforms import Size, covering_size
from ssync_pl.errors import ConfigError, ShardError

__all__ = [
    "MaskFormat",
    "Members",
    "SampleRules",
    "arrange_masks",
    "check_video",
    "clip_span",
    "count_objects",
    "crop_offsets",
    "eval_sample",
    "find_member",
    "mask_channels",
    "train_sample",
]

MaskFormat = Literal["ids", "channels"]

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
    """How samples are cut; shared by mapped and streamed shards.

    Args:
        clip_length: Frames of a training clip; `None` takes whole videos, for evaluation.
        frame_stride: Distance between the frames of a clip, in frames.
        image_size: Height and width of the batch, or `None` for the stored size.
        crop: `none` resizes to `image_size`; `random` and `center` cover it and crop.
        flip_probability: Probability of a left-right flip in training.
        masks: Whether object masks are read.
        mask_format: `ids`: (F, h, w, 1), 0 = background (MOVi); `channels`: (F, h, w, N), one per object (YT-VIS).
        max_objects: Most objects a mask may have; `None` for no limit.
        seed: Seed of the run.
        reference: Cut clips and crops as published VideoSAUR-style pipelines do: a clip starts at a multiple of its
            length.
        video: Whether training clips hold their frames; without them only what is cached is read.

    Raises:
        ConfigError: A value is out of range.
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


@dataclass(frozen=True)
class Members:
    """The members of one sample, wherever they lie.

    Args:
        where: Shard and key, for messages.
        sizes: Bytes of each member.
        fetch: Returns `length` bytes of a member from `start` on.
        max_bytes: Most bytes of a member, stored and decoded.
    """

    where: str
    sizes: Mapping[str, int]
    fetch: Callable[[str, int, int], bytes | bytearray | memoryview]
    max_bytes: int = MAX_MEMBER_BYTES

    @classmethod
    def of_bytes(
        cls, where: str, members: Mapping[str, bytes | memoryview], max_bytes: int = MAX_MEMBER_BYTES
    ) -> Members:
        """Take members that are in memory."""
        sizes = {name: len(data) for name, data in members.items()}
        return cls(where, sizes, lambda name, start, length: members[name][start : start + length], max_bytes)

    def name(self, member: str) -> str:
        """Name a member for messages."""
        return f"member `{member}` of {self.where}"

    def read(self, member: str) -> bytes | bytearray | memoryview:
        """Read a whole member; raises `ShardError` when it is too large."""
        require_size(self.sizes[member], self.name(member), self.max_bytes)
        return self.fetch(member, 0, self.sizes[member])

    def decode(self, member: str) -> Any:
        """Decode a whole member."""
        return decode_member(member, self.read(member), self.where, self.max_bytes)

    def header(self, member: str) -> NpyHeader:
        """Read the header of an array member; raises `ShardError` when the member is damaged or half written."""
        head = memoryview(self.fetch(member, 0, min(self.sizes[member], HEADER_BYTES)))
        header = read_npy_header(head, member, self.where, self.max_bytes)
        found = self.sizes[member] - header.data_offset
        if member_extension(member) == "npy" and found != header.nbytes:
            raise ShardError(
                f"Expected {self.name(member)} to hold {header.nbytes} bytes of elements for shape {header.shape}, but "
                f"got {found}. The member is only half written: copy or build the shard again."
            )
        return header

    def rows(self, member: str, cut: slice) -> np.ndarray:
        """Read some rows of an array member, and no others where it is stored plainly."""
        header = self.header(member)
        if member_extension(member) != "npy" or header.fortran_order or not header.nbytes:
            # A copy, so that a batch never keeps a whole video alive.
            return np.array(self.decode(member)[cut], order="C")
        start, stop, step = cut.indices(header.shape[0])
        row = header.nbytes // header.shape[0]
        data = self.fetch(member, header.data_offset + start * row, max(stop - start, 0) * row)
        array = np.frombuffer(data, header.dtype).reshape(-1, *header.shape[1:])[::step]
        # A stream keeps its members in memory: a copy keeps only the clip alive.
        return array if isinstance(data, bytearray) and step == 1 else np.array(array, order="C")


def clip_span(clip_length: int, frame_stride: int) -> int:
    """Count the frames from the first to the last of a clip, both included."""
    return (clip_length - 1) * frame_stride + 1


def find_member(members: Collection[str], field: str, where: str = "") -> str:
    """Choose the member that holds a field, refusing samples that have it only in a forbidden format."""
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


def mask_channels(members: Members) -> int:
    """Count the channels of a sample's masks, from the header only; 1 for pictures of ids."""
    member = find_member(members.sizes, "segmentations", members.where)
    if member_extension(member) not in ("npy", "npy.gz"):
        return 1
    shape = members.header(member).shape
    if len(shape) == 4:
        return shape[-1]
    is_image = find_member(members.sizes, "video", members.where).startswith("image")
    # Frames of ids (F, h, w) of a video; of an image (N, h, w) or (h, w, N), with fewer objects than rows.
    return min(shape[0], shape[-1]) if is_image and len(shape) == 3 else 1


def count_objects(members: Members, mask_format: MaskFormat) -> int:
    """Count the objects that a sample's masks can show: the largest id, or the number of channels."""
    if mask_format == "channels":
        return mask_channels(members)
    ids = members.decode(find_member(members.sizes, "segmentations", members.where))
    return int(ids.max(initial=0))


def arrange_masks(masks: np.ndarray, frames: int, size: tuple[int, int], place: str) -> np.ndarray:
    """View stored masks as (F, h, w, N), whatever their layout."""
    height, width = size

    def fits(rows: int, columns: int) -> bool:
        return abs(rows * width - columns * height) <= 0.02 * rows * width

    given = masks
    if frames == 1 and masks.ndim == 2:
        masks = masks[None, ..., None]
    elif frames == 1 and masks.ndim == 3:
        last = masks.shape[:2] == size or (masks.shape[1:] != size and fits(*masks.shape[:2]))
        masks = masks[None] if last else np.moveaxis(masks, 0, -1)[None]
    elif masks.ndim == 3:
        masks = masks[..., None]
    if masks.ndim != 4 or 0 in masks.shape[:3] or masks.dtype.kind not in "bui":
        raise ShardError(
            f"Expected {place} to be integer masks (F, h, w, N), but got shape {given.shape}, dtype {given.dtype}. "
            "Convert the masks."
        )
    if len(masks) != frames:
        raise ShardError(
            f"Expected {place} to have as many frames as the video, {frames}, but got {len(masks)}. Build the sample "
            "again."
        )
    if not fits(*masks.shape[1:3]):
        raise ShardError(
            f"Expected {place} to have the video's proportions {height}x{width}, but got "
            f"{masks.shape[1]}x{masks.shape[2]}. Build the sample again."
        )
    return masks


def train_sample(members: Members, key: str, rules: SampleRules, epoch: int, clip: int) -> dict[str, Any]:
    """Cut one training clip.

    Args:
        members: The sample's members.
        key: Name of the video with its shard: what the random choices hang on.
        rules: How to cut.
        epoch: Number of the pass.
        clip: Number of the clip of this video in this pass.

    Returns:
        `video` (T, h, w, 3) uint8 unless `rules.video` is off, `flip` bool scalar, `crop` (2,) int64 (top and left in
        the resized picture), `cut` (the frames taken, a slice), with `rules.masks` also `segmentations` (T, h, w, N)
        uint8.

    Raises:
        ShardError: The video is shorter than a clip, a member is refused or does not fit.
    """
    if rules.clip_length is None:
        raise ConfigError("Expected argument `rules` to have a `clip_length` for training, but got None.")
    member = find_member(members.sizes, "video", members.where)
    # Packed videos and mp4 are read once, for their length and their frames.
    whole = members.read(member) if member_extension(member) == "mp4" else None
    frames = _count(members, member, whole)
    span = clip_span(rules.clip_length, rules.frame_stride)
    if frames < span:
        raise ShardError(
            f"Expected {members.where} to have at least {span} frames (clip_length={rules.clip_length}, frame_stride="
            f"{rules.frame_stride}), but got {frames}. Shorten the clip, or set on_bad_sample='skip'."
        )
    if rules.reference:
        draw = draw_clip(key, clip, rules.seed, epoch, frames // span, rules.flip_probability, span)
    else:
        draw = draw_clip(key, clip, rules.seed, epoch, frames - span + 1, rules.flip_probability)
    cut = slice(draw.start, draw.start + span, rules.frame_stride)
    if not rules.video:
        return {"flip": torch.tensor(draw.flip), "crop": torch.zeros(2, dtype=torch.int64), "cut": cut}
    video = check_video(_read_clip(members, member, cut, whole), members.name(member))
    sample: dict[str, Any] = {
        "video": torch.from_numpy(video),
        "flip": torch.tensor(draw.flip),
        "crop": crop_offsets(video, rules, draw.top, draw.left),
        "cut": cut,
    }
    if rules.masks:
        sample["segmentations"] = _masks(members, rules, cut, frames, video.shape)
    return sample


def eval_sample(members: Members, rules: SampleRules) -> dict[str, Any]:
    """Read one whole video for evaluation."""
    member = find_member(members.sizes, "video", members.where)
    array = members.decode(member)
    video = check_video(np.array(array[None] if array.ndim == 3 else array, order="C"), members.name(member))
    offsets = crop_offsets(video, rules, None, None)
    sample: dict[str, Any] = {"video": torch.from_numpy(video), "crop": offsets, "cut": slice(0, len(video), 1)}
    if rules.masks:
        sample["segmentations"] = _masks(members, rules, slice(None), len(video), video.shape)
    return sample


def crop_offsets(video: np.ndarray, rules: SampleRules, top: float | None, left: float | None) -> Tensor:
    """Place the crop in the resized frames."""
    if rules.image_size is None or rules.crop == "none":
        return torch.zeros(2, dtype=torch.int64)
    height, width = covering_size((video.shape[1], video.shape[2]), rules.image_size, floor=rules.reference)
    room = (height - rules.image_size[0], width - rules.image_size[1])
    if rules.crop == "center" or top is None or left is None:
        # published code rounds halves to the even pixel
        return torch.tensor([round(side / 2) if rules.reference else side // 2 for side in room])
    return torch.tensor([int(top * (room[0] + 1)), int(left * (room[1] + 1))])


def _count(members: Members, member: str, whole: Any) -> int:
    if whole is not None:
        return count_frames(whole, members.name(member))
    if require_allowed(member, members.where) not in ("npy", "npy.gz"):
        return 1
    shape = members.header(member).shape
    return shape[0] if len(shape) == 4 else 1


def _read_clip(members: Members, member: str, cut: slice, whole: Any) -> np.ndarray:
    if whole is not None:
        frames = range(cut.start, cut.stop, cut.step)
        return np.stack(list(decode_video(whole, members.name(member), frames, max_bytes=members.max_bytes)))
    if member_extension(member) in ("npy", "npy.gz") and len(members.header(member).shape) == 4:
        return members.rows(member, cut)
    array = members.decode(member)
    return np.array((array[None] if array.ndim == 3 else array)[cut], order="C")


def check_video(video: np.ndarray, place: str) -> np.ndarray:
    """Return the video when it is uint8 frames (F, h, w, 3), else raise `ShardError`."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        raise ShardError(
            f"Expected {place} to be uint8 frames (F, h, w, 3), but got shape {video.shape}, dtype {video.dtype}. "
            "Convert the video to RGB bytes."
        )
    return video


def _masks(members: Members, rules: SampleRules, cut: slice, frames: int, video_shape: tuple[int, ...]) -> Tensor:
    member = find_member(members.sizes, "segmentations", members.where)
    place = members.name(member)
    masks = arrange_masks(members.decode(member), frames, (video_shape[1], video_shape[2]), place)
    # The limit holds for the whole video, so that a clip's fate does not hang on where it starts.
    objects = masks.shape[-1] if rules.mask_format == "channels" else int(masks.max(initial=0))
    if rules.mask_format == "ids" and (masks.shape[-1] != 1 or masks.min(initial=0) < 0):
        raise ShardError(
            f"Expected {place} to hold ids (F, h, w, 1) from 0 on, but got shape {masks.shape}, least value "
            f"{int(masks.min(initial=0))}. For one channel per object, set mask_format='channels'."
        )
    limit = 255 if rules.max_objects is None else rules.max_objects
    if objects > limit:
        raise ShardError(f"Expected {place} to have at most {limit} objects, but got {objects}. Raise `max_objects`.")
    masks = masks[cut]
    return torch.from_numpy(np.array(masks != 0 if rules.mask_format == "channels" else masks, np.uint8, order="C"))
