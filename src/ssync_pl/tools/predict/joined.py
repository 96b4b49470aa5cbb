"""Windows of a video, joined: labels at the size of its frames, slots of one number throughout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssync_pl.errors import ShapeError
from ssync_pl.tools.predict.region import restore_labels
from ssync_pl.tools.predict.video_files import VideoFiles
from ssync_pl.tools.predict.windows import OUTSIDE, match_slots, relabel

__all__ = ["WINDOW_KEY", "JoinedVideo"]

WINDOW_KEY = "__window__"
"""Batch entry of `InputDataModule`: `key`, `source`, `start`, `last`, `rate`, `frames` (uint8 (T, H, W, 3), as the
video stores them) and `region` (rows and columns that the host saw)."""


class JoinedVideo:
    """Takes what a host says of each window and hands the video on to its files.

    Args:
        files: What is written of the video.

    Attributes:
        num_slots: S; None before the first window.
        windows: Number of windows so far.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ssync_pl.tools.predict.video_files import FileChoice
        >>> whole = (slice(0, 2), slice(0, 2))
        >>> window = {"start": 0, "frames": np.zeros((1, 2, 2, 3), np.uint8), "region": whole}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     joined = JoinedVideo(VideoFiles(Path(folder), "a", "a", 6, FileChoice(video=False)))
        ...     joined.add(window, torch.zeros(1, 2, 2).long(), None)
        >>> joined.num_slots
        1
    """

    def __init__(self, files: VideoFiles) -> None:
        self.files = files
        self.num_slots: int | None = None
        self.windows = 0
        self._last: NDArray[np.uint8] | None = None

    def add(self, window: Mapping[str, Any], labels: Tensor, masks: Tensor | None) -> None:
        """Take the next window.

        Args:
            window: See `WINDOW_KEY`.
            labels: Integers (T, h, w) that the host gave.
            masks: Masks (T, S, h, w) that it gave. Where their largest is the label, they give smoother outlines.

        Raises:
            ShapeError: There are too many slots for 8-bit labels.
        """
        frames, region = window["frames"], window["region"]
        source = (frames.shape[1], frames.shape[2])
        slots = max(0 if masks is None else masks.shape[1], int(labels.max()) + 1)
        if slots > OUTSIDE:
            raise ShapeError(f"Expected at most {OUTSIDE} slots for 8-bit labels, but got {slots}.")
        self.num_slots = max(self.num_slots or 0, slots)
        smooth = masks is not None and torch.equal(masks.max(dim=1).indices, labels.long())
        shown = restore_labels(masks if masks is not None and smooth else labels, source, region)
        soft = None
        if masks is not None and self.files.choice.masks == "soft":
            soft = masks.half().cpu().numpy()
        if self._last is not None:  # its frame is the first of this window
            names = match_slots(self._last, shown[0], self.num_slots)
            shown = relabel(shown, names)
            frames, shown = frames[1:], shown[1:]
            if soft is not None:
                order = names[: soft.shape[1]]
                soft = soft[1:, np.argsort(order)]
        self._last = shown[-1] if len(shown) else self._last
        self.windows += 1
        self.files.add(frames, shown, soft, outside=True)
