"""What `ssync-pl predict --input` says when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["describe_windows"]


class _Video(Protocol):
    @property
    def key(self) -> str: ...
    @property
    def windows(self) -> int: ...


def describe_windows(videos: Sequence[_Video], carried: bool) -> list[str]:
    """Say how slots were kept over the windows of long videos.

    Args:
        videos: What was written; `key` and `windows` of each.
        carried: Whether the host began each window with the slots of the one before.

    Returns:
        One line where a video was cut into windows, else none.

    Example:
        >>> from ssync_pl.tools.predictions import PredictedVideo
        >>> describe_windows([PredictedVideo("a", "a", 0, 9, 2, "a.mp4", windows=3)], carried=False)
        ['windows: a (3). Slots are matched by window: an object may change its slot between windows.']
    """
    cut = [f"{video.key} ({video.windows})" for video in videos if video.windows > 1]
    if not cut:
        return []
    names = ", ".join(cut[:5]) + (f", … ({len(cut)} videos)" if len(cut) > 5 else "")
    how = (
        "Slots are carried over from window to window."
        if carried
        else "Slots are matched by window: an object may change its slot between windows."
    )
    return [f"windows: {names}. {how}"]
