"""From the members of one sample to what a worker emits: uint8 frames, masks and the clip's parameters."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ssync_pl.data.decode import (
    HEADER_BYTES,
    MAX_MEMBER_BYTES,
    Data,
    NpyHeader,
    decode_member,
    decode_video,
    inspect_video,
    member_extension,
    read_npy_header,
    require_size,
)
from ssync_pl.data.sampling import draw_clip
from ssync_pl.data.transforms import Size, covering_size
from ssync_pl.errors import require_shard

MaskFormat = Literal["ids", "channels"]

# The first that a sample has is used: the cheapest to slice comes first.
_FIELDS = {
    "video": (
        *("video.npy", "video.npy.gz", "video.mp4"),
        *("image.npy", "image.npy.gz", "image.jpg", "image.jpeg", "image.png"),
    ),
    "segmentations": ("segmentations.npy", "segmentations.npy.gz", "segmentations.png"),
}


@dataclass(frozen=True)
class SampleRules:
    """How samples are cut; see `ShardDataModule` for what the settings mean."""

    clip_length: int | None = None  # None takes whole videos, for evaluation
    frame_stride: int = 1
    image_size: Size | None = None
    crop: str = "none"
    flip_probability: float = 0.0
    masks: bool = False
    mask_format: MaskFormat = "ids"
    max_objects: int | None = None  # None sets no limit
    seed: int = 0
    reference: bool = False
    video: bool = True  # whether training clips hold their frames, or only what is cached

    @property
    def training(self) -> bool:
        """Whether clips are cut, rather than whole videos taken."""
        return self.clip_length is not None

    @property
    def span(self) -> int:
        """Frames from the first to the last of a clip, both included; 0 for whole videos."""
        return 0 if self.clip_length is None else (self.clip_length - 1) * self.frame_stride + 1


@dataclass(frozen=True)
class Members:
    """The members of one sample, wherever they lie."""

    where: str  # shard and key, for messages
    sizes: Mapping[str, int]  # in bytes
    fetch: Callable[[str, int, int], Data]  # returns so many bytes of a member from a place on
    max_bytes: int = MAX_MEMBER_BYTES  # of a member, stored and decoded
    headers: dict[str, NpyHeader] = field(default_factory=dict)  # those that were read

    def name(self, member: str) -> str:
        """Names a member for messages."""
        return f"member `{member}` of {self.where}"

    def read(self, member: str) -> Data:
        """Reads a whole member; raises `ShardError` when it is too large."""
        require_size(self.sizes[member], self.name(member), self.max_bytes)
        return self.fetch(member, 0, self.sizes[member])

    def decode(self, member: str) -> Any:
        """Decodes a whole member."""
        return decode_member(member, self.read(member), self.where, self.max_bytes)

    def header(self, member: str) -> NpyHeader:
        """Reads the header of an array member; raises `ShardError` when the member is damaged or half written."""
        if member not in self.headers:
            size = self.sizes[member]
            head = self.fetch(member, 0, min(size, HEADER_BYTES))
            self.headers[member] = read_npy_header(head, member, self.where, self.max_bytes, size)
        return self.headers[member]

    def rows(self, member: str, cut: slice) -> np.ndarray:
        """Reads some rows of an array member, and no others where it is stored plainly."""
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

    def is_video(self, member: str) -> bool:
        """Whether an array member holds several frames."""
        return member_extension(member) in ("npy", "npy.gz") and len(self.header(member).shape) == 4

    def count_frames(self, member: str) -> int:
        """Counts the frames of a video or picture, decoding as little as possible."""
        if member_extension(member) == "mp4":
            return inspect_video(self.read(member), self.name(member), self.max_bytes).frames
        return self.header(member).shape[0] if self.is_video(member) else 1

    def frames(self, member: str, cut: slice) -> np.ndarray:
        """Reads frames (F, h, w, 3) uint8 of a video or picture."""
        if self.is_video(member):
            video = self.rows(member, cut)
        elif member_extension(member) == "mp4" and cut.stop is not None:
            wanted = range(cut.start, cut.stop, cut.step)
            video = np.stack([*decode_video(self.read(member), self.name(member), wanted, max_bytes=self.max_bytes)])
        else:
            whole = self.decode(member)
            video = np.array((whole[None] if whole.ndim == 3 else whole)[cut], order="C")
        fits = video.ndim == 4 and video.shape[-1] == 3 and video.dtype == np.uint8 and 0 not in video.shape
        got = f"shape {video.shape}, dtype {video.dtype}"
        expected = f"{self.name(member)} to be uint8 frames (F, h, w, 3)"
        require_shard(fits, expected, got, advice="Convert the video to RGB bytes.")
        return video


def find_member(members: Collection[str], field: str, where: str = "the sample") -> str:
    """Chooses the member that holds a field."""
    found = [name for name in _FIELDS[field] if name in members]
    expected = f"{where} to have one of the members {', '.join(_FIELDS[field])}"
    got, advice = ", ".join(sorted(members)) or "none", f"Write the {field} under one of these names."
    require_shard(bool(found), expected, got, advice=advice)
    return found[0]


def count_objects(members: Members, mask_format: MaskFormat) -> int:
    """Counts the objects that a sample's masks can show: the largest id, or the number of channels."""
    member = find_member(members.sizes, "segmentations", members.where)
    if mask_format == "ids":
        return int(members.decode(member).max(initial=0))
    shape = () if member_extension(member) == "png" else members.header(member).shape
    if len(shape) == 4:
        return shape[-1]
    is_image = find_member(members.sizes, "video", members.where).startswith("image")
    # Frames of ids (F, h, w) of a video; of an image (N, h, w) or (h, w, N), with fewer objects than rows.
    return min(shape[0], shape[-1]) if is_image and len(shape) == 3 else 1


def train_sample(members: Members, key: str, rules: SampleRules, epoch: int, clip: int) -> dict[str, Any]:
    """Cuts a training clip; the random choices hang on the key (with its shard), the pass and the clip's number.

    Returns `video` (T, h, w, 3) uint8, `flip`, `crop` (2,) (top and left in the resized picture), `cut` (a slice), and
    with `rules.masks` `segmentations` (T, h, w, N) uint8.
    """
    member = find_member(members.sizes, "video", members.where)
    frames, span = members.count_frames(member), rules.span
    expected = f"{members.where} to have at least {span} frames (clip_length, frame_stride)"
    require_shard(frames >= span, expected, frames, advice="Shorten the clip, or set on_bad_sample='skip'.")
    starts, step = (frames // span, span) if rules.reference else (frames - span + 1, 1)
    draw = draw_clip(key, clip, rules.seed, epoch, starts, rules.flip_probability, step)
    cut = slice(draw.start, draw.start + span, rules.frame_stride)
    flip = torch.tensor(draw.flip)
    if not rules.video:
        return {"flip": flip, "crop": torch.zeros(2, dtype=torch.int64), "cut": cut}
    video = members.frames(member, cut)
    sample = {"video": torch.from_numpy(video), "flip": flip, "cut": cut}
    sample["crop"] = crop_offsets(video, rules, draw.top, draw.left)
    return sample | _masks(members, rules, cut, frames, video)


def eval_sample(members: Members, rules: SampleRules) -> dict[str, Any]:
    """Reads one whole video for evaluation."""
    video = members.frames(find_member(members.sizes, "video", members.where), slice(None))
    sample = {"video": torch.from_numpy(video), "crop": crop_offsets(video, rules), "cut": slice(0, len(video), 1)}
    return sample | _masks(members, rules, slice(None), len(video), video)


def read_whole(members: Members) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads a video (F, h, w, 3) and its masks, whatever their format: uint8 ids (F, h, w, 1), bool channels
    (F, h, w, N), or `None` where it has none."""
    if not any(name.split(".")[0] == "segmentations" for name in members.sizes):
        return eval_sample(members, SampleRules())["video"].numpy(), None
    channels = count_objects(members, "channels") > 1
    sample = eval_sample(members, SampleRules(masks=True, mask_format="channels" if channels else "ids"))
    masks = sample["segmentations"].numpy()
    return sample["video"].numpy(), masks != 0 if channels else masks


def crop_offsets(video: np.ndarray, rules: SampleRules, top: float | None = None, left: float | None = None) -> Tensor:
    """Places the crop in the resized frames: at the drawn place in [0, 1), or in the centre."""
    if rules.image_size is None or rules.crop == "none":
        return torch.zeros(2, dtype=torch.int64)
    height, width = covering_size((video.shape[1], video.shape[2]), rules.image_size, floor=rules.reference)
    room = (height - rules.image_size[0], width - rules.image_size[1])
    if rules.crop == "center" or top is None or left is None:
        # published code rounds halves to the even pixel
        return torch.tensor([round(side / 2) if rules.reference else side // 2 for side in room])
    return torch.tensor([int(top * (room[0] + 1)), int(left * (room[1] + 1))])


def _masks(members: Members, rules: SampleRules, cut: slice, frames: int, video: np.ndarray) -> dict[str, Any]:
    if not rules.masks:
        return {}
    member = find_member(members.sizes, "segmentations", members.where)
    place, channels = members.name(member), rules.mask_format == "channels"
    given, (height, width) = members.decode(member), video.shape[1:3]

    def fits(rows: int, columns: int) -> bool:
        return abs(rows * width - columns * height) <= 0.02 * rows * width

    masks = given[..., None] if given.ndim == 2 else given
    if frames == 1 and masks.ndim == 3:  # of a picture: (h, w, N) or (N, h, w)
        last = masks.shape[:2] == (height, width) or (masks.shape[1:] != (height, width) and fits(*masks.shape[:2]))
        masks = (masks if last else np.moveaxis(masks, 0, -1))[None]
    elif masks.ndim == 3:
        masks = masks[..., None]
    got, advice = f"shape {given.shape}, dtype {given.dtype}", "Convert the masks."
    whole = masks.ndim == 4 and 0 not in masks.shape[:3] and masks.dtype.kind in "bui"
    require_shard(whole, f"{place} to be integer masks (F, h, w, N)", got, advice=advice)
    same = len(masks) == frames and fits(*masks.shape[1:3])
    expected = f"{place} to have the frames and proportions of the video, {frames} of {height}x{width}"
    require_shard(same, expected, f"{len(masks)} of {masks.shape[1]}x{masks.shape[2]}", advice=advice)
    least = 0 if channels else int(masks.min(initial=0))
    expected, advice = f"{place} to hold ids (F, h, w, 1) from 0 on", "For channels set mask_format='channels'."
    require_shard(channels or (masks.shape[-1] == 1 and least >= 0), expected, f"{got}, least {least}", advice=advice)
    # The limit holds for the whole video, so that a clip's fate does not hang on where it starts.
    objects = masks.shape[-1] if channels else int(masks.max(initial=0))
    limit = 255 if rules.max_objects is None else rules.max_objects
    require_shard(objects <= limit, f"{place} to have at most {limit} objects", objects, advice="Raise `max_objects`.")
    stored = np.array(masks[cut] != 0 if channels else masks[cut], np.uint8, order="C")
    return {"segmentations": torch.from_numpy(stored)}
