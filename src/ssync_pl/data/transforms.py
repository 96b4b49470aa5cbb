"""Transforms of whole batches on the device: resize, crop, flip, normalise; masks to one-hot.

Workers send uint8, a quarter of the bytes of float32 and, before resizing, far fewer pixels. Every random choice comes
with the batch, so the result is a function of the batch alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ssync_pl.errors import choose, require, require_shape

Size = tuple[int, int]  # height and width


def covering_size(source: Size, target: Size, *, floor: bool = False) -> Size:
    """Returns the smallest size of the source's proportions that covers the target."""
    (height, width), (target_height, target_width) = source, target
    if target_height * width < target_width * height:
        turned = covering_size((width, height), (target_width, target_height), floor=floor)
        return turned[1], turned[0]
    longer = math.floor(width / height * target_height) if floor else round(width * target_height / height)
    return target_height, max(target_width, longer)


def central_square(source: Size) -> tuple[slice, slice]:
    """Returns the largest central square, placed as published code places it (halves round to the even pixel)."""
    side = min(source)
    top, left = round((source[0] - side) / 2), round((source[1] - side) / 2)
    return slice(top, top + side), slice(left, left + side)


def resize_frames(frames: Tensor, size: Size, mode: str = "bilinear", *, antialias: bool = True) -> Tensor:
    """Resizes frames (B, T, C, h, w) in [0, 1]; anti-aliased when they shrink; bicubic overshoot is clamped."""
    if tuple(frames.shape[-2:]) == size:
        return frames
    shrinks = antialias and (frames.shape[-2] > size[0] or frames.shape[-1] > size[1])
    # Contiguous, as resizing is much faster on frames that lie channel by channel
    flat = F.interpolate(frames.contiguous().flatten(0, 1), size=size, mode=mode, antialias=shrinks)
    return (flat.clamp_(0.0, 1.0) if mode == "bicubic" else flat).reshape(*frames.shape[:-2], *size)


def resize_masks(masks: Tensor, size: Size, *, reference: bool = False) -> Tensor:
    """Resizes masks or ids to the nearest pixel ("nearest-exact"), in exact integer arithmetic on every device."""
    if reference:
        return F.interpolate(masks.flatten(0, 1), size=size, mode="nearest-exact").reshape(*masks.shape[:-2], *size)
    for dim, target in ((-2, size[0]), (-1, size[1])):
        source = masks.shape[dim]
        if source != target:
            index = (2 * torch.arange(target, device=masks.device) + 1) * source // (2 * target)
            masks = masks.index_select(dim, index)
    return masks


def crop_and_flip(frames: Tensor, offsets: Tensor | None, flip: Tensor | None, size: Size) -> Tensor:
    """Cuts one window per video and mirrors some of the videos, without a loop over the batch."""
    crop = offsets if tuple(frames.shape[-2:]) != size else None
    if frames.device.type == "cpu" and len(frames) == 1:
        # No wait for a device, so the choices can be looked at, and nothing has to be gathered.
        if crop is not None:
            top, left = crop[0].tolist()
            frames = frames[..., top : top + size[0], left : left + size[1]]
        return frames.flip(-1) if flip is not None and bool(flip[0]) else frames
    if crop is not None:
        batch, time, channels, _, width = frames.shape
        rows = crop[:, 0, None] + torch.arange(size[0], device=frames.device)
        columns = crop[:, 1, None] + torch.arange(size[1], device=frames.device)
        frames = frames.gather(3, rows[:, None, None, :, None].expand(batch, time, channels, size[0], width))
        frames = frames.gather(4, columns[:, None, None, None, :].expand(batch, time, channels, *size))
    if flip is not None:
        frames = torch.where(flip[:, None, None, None, None], frames.flip(-1), frames)
    return frames


def one_hot_masks(masks: Tensor, max_objects: int, *, ids: bool, has_background: bool) -> Tensor:
    """Turns stored masks (B, T, N, H, W) into a bool channel per object, first that of the background.

    With `ids` N = 1 and values are 0 … `max_objects`; else channels are non-zero inside, and may overlap.
    """
    if ids:
        first = 0 if has_background else 1
        numbers = torch.arange(first, max_objects + 1, device=masks.device, dtype=masks.dtype)
        return masks == numbers[:, None, None]
    objects = F.pad(masks != 0, (0, 0, 0, 0, 0, max(0, max_objects - masks.shape[2])))
    return torch.cat([~objects.any(2, keepdim=True), objects], 2) if has_background else objects


class BatchTransform:
    """Turns what the workers emit into the batch that hosts see; `ShardDataModule` explains the settings.

    `reference` does as published VideoSAUR-style pipelines: no smoothing, sizes rounded down, `center` before resizing.
    """

    def __init__(
        self,
        image_size: Size | None = None,
        *,
        resize_mode: str = "bilinear",
        crop: str = "none",
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        has_background: bool = True,
        reference: bool = False,
    ) -> None:
        require(image_size is None or min(image_size) >= 1, "argument `image_size` to be positive", image_size)
        choose("resize_mode", resize_mode, "bilinear", "bicubic")
        choose("crop", crop, "none", "random", "center")
        require(crop == "none" or image_size is not None, f"argument `image_size` to be set for crop={crop!r}", None)
        square = crop == "none" or image_size is None or image_size[0] == image_size[1]
        expected = f"argument `image_size` to be a square for sampling='reference' and crop={crop!r}"
        require(square or not reference, expected, image_size, advice="Give one number, or take sampling='hashed'.")
        numbers = len(mean) == len(std) == 3 and min(std) > 0
        require(numbers, "arguments `mean` and `std` to be three numbers, `std` positive", mean, std)
        self.image_size, self.resize_mode, self.crop = image_size, resize_mode, crop
        self.has_background, self.reference = has_background, reference
        self._statistics = {torch.device("cpu"): torch.tensor([tuple(mean), tuple(std)])[..., None, None]}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Transforms what `collate` made, and passes on what it does not know.

        `video` (B, T, h, w, 3), or a list of several sizes, becomes (B, T, 3, H, W) float32, `segmentations` become
        (B, T, C, H, W) bool, empty on padded frames.
        """
        used = ("video", "segmentations", "crop", "flip", "mask_ids", "max_objects", "features")
        out = {name: value for name, value in batch.items() if name not in used}
        if "features" in batch:
            out["features"] = batch["features"].float()
        if "video" not in batch:
            return out
        videos, inputs = batch["video"], [batch.get(name) for name in ("video", "segmentations", "crop", "flip")]
        if isinstance(videos, list):
            sizes = sorted({tuple(video.shape[-3:-1]) for video in videos})
            same = self.image_size is not None or len(sizes) == 1
            require_shape(same, "the videos of a batch to have one size", *sizes, advice="Set `image_size`.")
        if isinstance(videos, list) or videos.device.type == "cpu":
            # On a CPU one video at a time stays in the caches: four times faster than all at once.
            rows = [[value if value is None else value[n][None] for value in inputs] for n in range(len(videos))]
            parts: Any = zip(*(self._pixels(*row) for row in rows), strict=True)
            out["video"], masks = (None if part[0] is None else torch.cat(part) for part in parts)
        else:
            out["video"], masks = self._pixels(*inputs)
        if masks is not None:
            hot = one_hot_masks(masks, batch["max_objects"], ids=batch["mask_ids"], has_background=self.has_background)
            padded = "frame_mask" in batch
            out["segmentations"] = hot & batch["frame_mask"][:, :, None, None, None] if padded else hot
        return out

    def _pixels(
        self, video: Any, masks: Tensor | None, offsets: Tensor | None, flip: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Transforms videos (B, T, h, w, 3) and masks (B, T, h, w, N) of one size."""
        offsets = None if self.crop == "none" else offsets
        if self.reference and offsets is not None and flip is None:
            # Evaluation crops centrally, whatever training does, and published code does so before it resizes.
            window = (slice(None), slice(None), *central_square(tuple(video.shape[2:4])))
            offsets, video, masks = None, video[window], None if masks is None else masks[window]
        size = shown = (int(video.shape[2]), int(video.shape[3]))
        if self.image_size is not None:
            whole, shown = self.crop == "none", self.image_size
            size = shown if whole else covering_size(size, shown, floor=self.reference)
        if masks is not None:
            masks = resize_masks(rearrange(masks, "b t h w n -> b t n h w"), size, reference=self.reference)
            masks = crop_and_flip(masks, offsets, flip, shown)
        frames = rearrange(video, "b t h w c -> b t c h w").float().div_(255.0)
        frames = resize_frames(frames, size, self.resize_mode, antialias=not self.reference)
        frames = crop_and_flip(frames, offsets, flip, shown)
        if frames.device not in self._statistics:
            self._statistics[frames.device] = self._statistics[torch.device("cpu")].to(frames.device)
        mean, std = self._statistics[frames.device]
        return frames.sub_(mean).div_(std), masks
