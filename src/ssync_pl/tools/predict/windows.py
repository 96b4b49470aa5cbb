"""Long videos in windows that share one frame, and slots that keep their numbers from window to window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from ssync_pl.errors import ConfigError, ShapeError

__all__ = ["OUTSIDE", "Window", "cut_windows", "match_slots", "relabel", "window_length"]

OUTSIDE = 255
"""Label of pixels that the model did not see, because a crop cut them off."""


@dataclass(frozen=True)
class Window:
    """Some consecutive frames of a video.

    Args:
        start: Number of the first frame.
        frames: uint8 (T, H, W, 3). Frame 0 is the last one of the window before, unless `start` is 0.
        last: Whether the video ends with it.

    Example:
        >>> Window(0, np.zeros((2, 4, 4, 3), np.uint8), last=True).frames.shape
        (2, 4, 4, 3)
    """

    start: int
    frames: NDArray[np.uint8]
    last: bool


def window_length(total: int | None, most: int) -> int:
    """Choose the length of windows so that all are about as long, rather than leaving a short rest.

    Args:
        total: Frames of the video; None when nothing says it.
        most: Most frames of a window, at least 2.

    Returns:
        Frames of a window, of which the first is shared with the window before.

    Raises:
        ConfigError: `most` is below 2.

    Example:
        >>> window_length(64, 64), window_length(65, 64), window_length(None, 64)
        (64, 33, 64)
    """
    if most < 2:
        raise ConfigError(
            f"Expected --clip-frames to be at least 2, as windows share a frame, but got {most}. Take 16 or more."
        )
    if total is None or total <= most:
        return most
    steps = total - 1  # a window brings one frame less than it has
    count = -(-steps // (most - 1))
    return -(-steps // count) + 1


def cut_windows(frames: Iterable[NDArray[np.uint8]], length: int) -> Iterator[Window]:
    """Cut a stream of frames into windows; the last frame of each comes again as the first of the next.

    Args:
        frames: uint8 (H, W, 3) each, all of one size.
        length: Most frames of a window, at least 2.

    Yields:
        The windows, in order. Only one is held at a time.

    Example:
        >>> frames = [np.full((1, 1, 3), number, np.uint8) for number in range(5)]
        >>> [(w.start, w.frames[:, 0, 0, 0].tolist(), w.last) for w in cut_windows(frames, 3)]
        [(0, [0, 1, 2], False), (2, [2, 3, 4], True)]
    """
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


def match_slots(before: NDArray[Any], after: NDArray[Any], num_slots: int) -> NDArray[np.int64]:
    """Find which slot of a window continues which slot of the window before, from the frame that both share.

    One to one, so that most pixels of the frame keep their label (Hungarian matching). Where pixels do not decide,
    slots keep their number.

    Args:
        before: Integers (H, W), labels of the frame in the window before. Labels from `num_slots` on do not count.
        after: The same in this window.
        num_slots: S, number of slots.

    Returns:
        int64 (S,): the number that each slot of this window gets, a permutation.

    Raises:
        ShapeError: The two label maps differ in size.

    Example:
        >>> match_slots(np.array([[0, 0, 1]]), np.array([[2, 2, 1]]), 3).tolist()
        [2, 1, 0]
    """
    if before.shape != after.shape:
        raise ShapeError(f"Expected two label maps of one size, but got {before.shape} and {after.shape}.")
    known = (before < num_slots) & (after < num_slots)
    pairs = after[known].astype(np.int64) * num_slots + before[known].astype(np.int64)
    overlap = np.bincount(pairs, minlength=num_slots * num_slots).reshape(num_slots, num_slots).astype(np.float64)
    overlap += np.eye(num_slots) / (2 * max(1, num_slots))  # all together less than a pixel: decides ties only
    return linear_sum_assignment(-overlap)[1]


def relabel(labels: NDArray[np.uint8], names: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Give slots other numbers; labels without a name stay.

    Args:
        labels: uint8, any shape.
        names: int64 (S,), the new number of each slot.

    Returns:
        uint8 of the same shape.

    Example:
        >>> relabel(np.array([0, 1, 255], np.uint8), np.array([1, 0])).tolist()
        [1, 0, 255]
    """
    table = np.arange(256, dtype=np.uint8)
    table[: len(names)] = names
    return table[labels]
