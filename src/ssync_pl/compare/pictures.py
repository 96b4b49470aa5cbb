"""Pictures of the first validation videos, in which an object has the same colour in all columns and runs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ssync_pl.errors import ShapeError
from ssync_pl.hosts.evaluation import resize_masks
from ssync_pl.method.loss import SSyncOutput
from ssync_pl.tools.viz import color_labels, color_regions, label_masks, resize_nearest, slot_colors, to_uint8

__all__ = ["PictureBox", "match_slots", "slot_palette"]

Labels = NDArray[np.int64]

_CELL = 112  # longer side of a frame, in pixels
_GAP = 3
_BACKGROUND = (70, 70, 70)
_LEAST_OVERLAP = 0.1


class PictureBox:
    """Draws the first videos of a validation set, in its order: the same ones in each run on the set.

    Frames are evenly spaced, one below the other. `mean` and `std` are those of the normalisation, None where unknown.
    """

    def __init__(
        self, videos: int, frames: int, has_background: bool = True, mean: Any = None, std: Any = None
    ) -> None:
        self.videos = videos
        self.frames = frames
        self.has_background = has_background
        self.mean, self.std = mean, std
        self.drawn: list[dict[str, Any]] = []

    @property
    def full(self) -> bool:
        """Whether there are as many videos as wanted."""
        return len(self.drawn) >= self.videos

    def add(
        self, batch: Mapping[str, Any], keys: Sequence[str], masks: Tensor, valid: Tensor, output: SSyncOutput
    ) -> None:
        """Draws videos of a batch until the box is full.

        Needs `video` `(B, T, 3, H, W)` and `segmentations` `(B, T, C, H, W)` in the batch, the host's masks
        `(B, T, S, h, w)`, valid frames `(B, T)`, and the output of `ssync_loss` on the host's maps of these videos.
        """
        video, true = batch.get("video"), batch["segmentations"]
        if not isinstance(video, Tensor) or video.ndim != 5 or video.shape[2] != 3:
            raise ShapeError(
                f"Expected key `video` (B, T, 3, H, W) in a validation batch, but got the keys {sorted(batch)}. "
                "Pictures need the frames: let the data module give them in validation."
            )
        maps = [_by_clip(one, video) for one in (output.raw_encoder_labels, output.boundary, output.interior)]
        size = (int(video.shape[-2]), int(video.shape[-1]))
        for index, key in enumerate(keys):
            real = valid[index].nonzero().flatten().tolist()
            if not real or self.full:
                continue
            chosen = [real[round(k * (len(real) - 1) / max(self.frames - 1, 1))] for k in range(self.frames)]
            decoder = resize_masks(masks[index : index + 1, chosen].float(), size)[0].max(dim=1).indices
            encoder, boundary, interior = (one[index, chosen].cpu().numpy() for one in maps)
            frames = to_uint8(video[index, chosen].float().cpu().numpy(), self.mean, self.std)
            truth = label_masks(true[index, chosen].cpu().numpy())  # -1 without a mask
            truth = resize_nearest(
                np.maximum(truth, 0) if self.has_background else truth + 1, size, channels_last=False
            )
            encoder = resize_nearest(encoder, size, channels_last=False)
            slots = decoder.cpu().numpy()
            palette = slot_palette(match_slots(truth, encoder, slots), masks.shape[2])
            columns = {
                "frame": frames,
                "truth": color_labels(truth, background=0),
                "encoder": palette[encoder],
                "decoder": palette[slots],
                "regions": _regions(frames, boundary, interior),
            }
            strips = {title: _strip(images, smooth=title == "frame") for title, images in columns.items()}
            self.drawn.append({"key": key, "columns": strips})


def match_slots(truth: Labels, *maps: Labels) -> dict[int, int]:
    """Matches each object of the truth `(F, H, W)` to the slot that covers it best in all maps, one to one.

    The background is an object, too. Pairs that share less than a tenth of their union are left out.
    """
    slots, slot_of = np.unique(np.stack(maps), return_inverse=True)
    objects, object_of = np.unique(np.broadcast_to(truth, (len(maps), *truth.shape)), return_inverse=True)
    both = np.zeros((len(slots), len(objects)))
    np.add.at(both, (slot_of.ravel(), object_of.ravel()), 1.0)
    overlap = both / (both.sum(axis=1, keepdims=True) + both.sum(axis=0) - both)
    pairs = zip(*linear_sum_assignment(-overlap), strict=True)
    return {int(slots[a]): int(objects[b]) for a, b in pairs if overlap[a, b] >= _LEAST_OVERLAP}


def slot_palette(matched: Mapping[int, int], slots: int) -> NDArray[np.uint8]:
    """Returns the colours `(slots, 3)` of slots: that of the matched object, grey for the background, else pale."""
    objects = slot_colors(max([*matched.values(), 0]) + 1)
    # Far along the palette, where objects seldom come, and half white.
    palette = slot_colors(slots + 16)[16:].astype(np.float64) * 0.35 + 0.65 * 235.0
    for slot, label in matched.items():
        palette[slot] = _BACKGROUND if label == 0 else objects[label]
    return np.rint(palette).astype(np.uint8)


def _regions(frames: NDArray[Any], boundary: NDArray[Any], interior: NDArray[Any]) -> NDArray[np.uint8]:
    size = frames.shape[1:3]
    regions = resize_nearest(color_regions(boundary, interior), size)
    marked = resize_nearest(boundary | interior, size, channels_last=False)[..., None]
    grey = frames.mean(axis=-1, keepdims=True)
    return np.rint(np.where(marked, 0.4 * grey + 0.6 * regions, 0.75 * grey)).astype(np.uint8)


def _strip(images: NDArray[Any], smooth: bool) -> str:
    """Frames one below the other, as a PNG in base64."""
    scale = _CELL / max(images.shape[1:3])
    height, width = (max(1, round(length * scale)) for length in images.shape[1:3])
    way = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    sheet = Image.new("RGB", (width, len(images) * (height + _GAP) - _GAP), (128, 128, 128))
    for place, image in enumerate(images):
        sheet.paste(Image.fromarray(image.astype(np.uint8)).resize((width, height), way), (0, place * (height + _GAP)))
    buffer = io.BytesIO()
    # A palette of 256 colours holds maps exactly, and makes frames a third as large.
    sheet.quantize(256, method=Image.Quantize.MEDIANCUT).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _by_clip(labels: Tensor, video: Tensor) -> Tensor:
    batch, frames = video.shape[:2]
    if labels.shape[:2] == (batch * frames, 1):  # hosts of images see each frame as a clip of its own
        labels = labels.flatten(0, 1).unflatten(0, (batch, frames))
    if labels.shape[:2] != (batch, frames):
        raise ShapeError(f"Expected maps of {batch} videos of {frames} frames, but got {tuple(labels.shape[:2])}.")
    return labels
