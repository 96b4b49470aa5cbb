"""Masks of the model's frames, brought back to the frames of the video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ssync_pl.data.transforms import Size, central_square, covering_size
from ssync_pl.tools.predict.windows import OUTSIDE
from ssync_pl.tools.viz import resize_nearest

__all__ = ["restore_labels", "seen_region"]


def seen_region(source: Size, offsets: Sequence[int], image_size: Size | None, crop: str, reference: bool) -> Any:
    """Find the part of a frame that the model sees; the inverse of `BatchTransform` in evaluation.

    Args:
        source: Height and width of the frame.
        offsets: Top and left of the crop in the resized frame, as `crop_offsets` gives them.
        image_size: Height and width that the model sees; None for the frame's own.
        crop: `none`, `center` or `random`.
        reference: Whether the central square is cut before resizing.

    Returns:
        Rows and columns of the frame, two slices.

    Example:
        >>> seen_region((100, 200), (0, 50), (50, 50), "center", False)
        (slice(0, 100, None), slice(100, 200, None))
    """
    if crop == "none" or image_size is None:
        return slice(0, source[0]), slice(0, source[1])
    if reference:
        return central_square(source)
    covered = covering_size(source, image_size)
    sides = []
    for length, resized, size, first in zip(source, covered, image_size, offsets, strict=True):
        low = min(round(first * length / resized), length - 1)
        sides.append(slice(low, max(low + 1, min(length, round((first + size) * length / resized)))))
    return sides[0], sides[1]


def restore_labels(maps: Tensor, source: Size, region: tuple[slice, slice]) -> NDArray[np.uint8]:
    """Label the pixels of the video's frames.

    Args:
        maps: Masks (T, S, h, w), which are enlarged smoothly before the largest slot is taken; or integer labels
            (T, h, w), which go to the nearest pixel.
        source: Height H and width W of the video's frames.
        region: Rows and columns that the maps show; see `seen_region`.

    Returns:
        uint8 (T, H, W), `OUTSIDE` where the maps show nothing.

    Example:
        >>> labels = torch.tensor([[[0, 1]]])
        >>> restore_labels(labels, (2, 6), (slice(0, 2), slice(1, 5))).tolist()
        [[[255, 0, 0, 1, 1, 255], [255, 0, 0, 1, 1, 255]]]
    """
    rows, columns = region
    size = (rows.stop - rows.start, columns.stop - columns.start)
    out = np.full((len(maps), *source), OUTSIDE, np.uint8)
    if maps.ndim == 3:
        out[:, rows, columns] = resize_nearest(maps.to(torch.uint8).cpu().numpy(), size, channels_last=False)
        return out
    for number, masks in enumerate(maps):  # a frame at a time: S masks of a large frame take much memory
        grown = F.interpolate(masks[None].float(), size=size, mode="bilinear", align_corners=False)[0]
        out[number, rows, columns] = grown.max(dim=0).indices.to(torch.uint8).cpu().numpy()
    return out
