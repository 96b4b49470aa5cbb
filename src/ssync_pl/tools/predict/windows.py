"""Long videos in windows that share one frame, slots that keep their numbers, and labels at the video's own size."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ssync_pl.data.transforms import BatchTransform, Size, central_square, covering_size
from ssync_pl.tools.viz import resize_nearest

OUTSIDE = 255  # label of pixels that the model did not see, because a crop cut them off
WINDOW_KEY = "__window__"  # entry of a batch of `InputDataModule`: the `Window` that it was made from


class Window(NamedTuple):
    """Consecutive frames of a video; frame 0 repeats the last window's end unless `start` is 0."""

    start: int
    frames: NDArray[np.uint8]  # (T, H, W, 3), as the video stores them
    last: bool
    key: str = ""
    source: str = ""
    rate: float | None = None  # frames per second
    region: tuple[slice, slice] = (slice(0, 0), slice(0, 0))  # rows and columns that the host sees


def cut_windows(frames: Iterable[NDArray[np.uint8]], length: int) -> Iterator[Window]:
    """Cuts a stream of frames (H, W, 3) into windows of at most `length` frames; one window is held at a time."""
    held: list[NDArray[np.uint8]] = []
    start = 0
    for frame in frames:
        if len(held) == length:  # one frame ahead, so that the last window is known to be the last
            yield Window(start, np.stack(held), last=False)
            start += length - 1
            held = held[-1:]
        held.append(frame)
    if held:
        yield Window(start, np.stack(held), last=True)


class CarrySlots:
    """Lets each window of a video begin with the slots that ended the one before, in hosts with `carries_slots`."""

    def __init__(self, host: Any) -> None:
        self._first: Tensor | None = None
        self._last: Tensor | None = None
        self._handles: list[Any] = []
        if getattr(host, "carries_slots", False):
            self._handles = [host.initializer.register_forward_hook(self._begin), host.register_forward_hook(self._end)]

    def next_window(self, goes_on: bool) -> None:
        """Says before each window whether it goes on where the one before ended."""
        self._first = self._last if goes_on else None

    def close(self) -> None:
        """Leaves the host as it was."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output if self._first is None else self._first.to(output.dtype)

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._last = output.slots[:, -1].detach()


def match_slots(before: NDArray[Any], after: NDArray[Any], num_slots: int) -> NDArray[np.int64]:
    """Finds the number (S,) that each slot of a window gets, so that most pixels of the frame (H, W) that both share
    keep their label; labels from `num_slots` on do not count.
    """
    known = (before < num_slots) & (after < num_slots)
    pairs = after[known].astype(np.int64) * num_slots + before[known].astype(np.int64)
    overlap = np.bincount(pairs, minlength=num_slots * num_slots).reshape(num_slots, num_slots).astype(np.float64)
    overlap += np.eye(num_slots) / (2 * max(1, num_slots))  # all together less than a pixel: decides ties only
    return linear_sum_assignment(-overlap)[1]


def seen_region(source: Size, offsets: Sequence[int], transform: BatchTransform) -> tuple[slice, slice]:
    """Finds rows and columns of a frame that the model sees, from top and left of the crop in the resized frame."""
    image_size = transform.image_size
    if transform.crop == "none" or image_size is None:
        return slice(0, source[0]), slice(0, source[1])
    if transform.reference:  # the central square is cut before resizing
        return central_square(source)
    covered = covering_size(source, image_size)
    sides = []
    for length, resized, size, first in zip(source, covered, image_size, offsets, strict=True):
        low = min(round(first * length / resized), length - 1)
        sides.append(slice(low, max(low + 1, min(length, round((first + size) * length / resized)))))
    return sides[0], sides[1]


def restore_labels(maps: Tensor, source: Size, region: tuple[slice, slice]) -> NDArray[np.uint8]:
    """Labels a video's pixels, uint8 (T, H, W), from labels (T, h, w) or, with smooth outlines, masks (T, S, h, w)."""
    rows, columns = region
    size = (rows.stop - rows.start, columns.stop - columns.start)
    out = np.full((len(maps), *source), OUTSIDE, np.uint8)
    if maps.ndim == 3:
        out[:, rows, columns] = resize_nearest(maps.to(torch.uint8).cpu().numpy(), size)
        return out
    for number, masks in enumerate(maps):  # one frame at a time: S masks of a large frame take much memory
        grown = F.interpolate(masks[None].float(), size=size, mode="bilinear", align_corners=False)[0]
        out[number, rows, columns] = grown.max(dim=0).indices.to(torch.uint8).cpu().numpy()
    return out
