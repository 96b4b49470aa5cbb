"""Overlay videos: frames beside their overlays, encoded as MP4 with PyAV."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssync_pl.errors import ShapeError
from ssync_pl.viz.sheet import SheetRow, draw_sheet

__all__ = ["Mp4Encoder", "compose_frames", "encode_mp4", "mp4_available"]

Bytes = NDArray[np.uint8]


def mp4_available() -> bool:
    """Tell whether PyAV, which writes the MP4 files, is installed.

    Returns:
        True when `import av` would find a package.

    Example:
        >>> isinstance(mp4_available(), bool)
        True
    """
    return importlib.util.find_spec("av") is not None


def compose_frames(
    panels: Sequence[Sequence[Bytes]], *, columns: Sequence[str], rows: Sequence[str], title: str = "", cell: int = 160
) -> Bytes:
    """Lay clips out on a captioned grid, one row a video and one column a kind of overlay.

    Args:
        panels: For each video its clips, each a uint8 array (T, H, W, 3). Shorter clips hold their last frame.
        columns: Caption of each clip of a video.
        rows: Caption of each video.
        title: A line above the grid.
        cell: Longer side of a clip in the grid, in pixels.

    Returns:
        uint8 array (T, height, width, 3).

    Raises:
        ShapeError: There is no video, or the captions do not fit the panels.

    Example:
        >>> clip = np.zeros((2, 8, 8, 3), dtype=np.uint8)
        >>> compose_frames([[clip, clip]], columns=["video", "slots"], rows=["0"], cell=32).shape[0]
        2
    """
    if not panels or len(rows) != len(panels) or any(len(clips) != len(columns) for clips in panels):
        got = f"{len(rows)} row captions, {len(columns)} column captions, panels {[len(clips) for clips in panels]}"
        raise ShapeError(f"Expected a row caption a video and a column caption a clip, but got {got}.")
    length = max(clip.shape[0] for clips in panels for clip in clips)
    pictures = []
    for time in range(length):
        lines = [
            SheetRow(caption, np.stack([clip[min(time, clip.shape[0] - 1)] for clip in clips]))
            for caption, clips in zip(rows, panels, strict=True)
        ]
        pictures.append(draw_sheet(lines, title=title, columns=columns, cell=cell))
    return np.stack(pictures)


def encode_mp4(frames: Bytes, *, fps: int = 6) -> bytes:
    """Encode frames as an H.264 video, or MPEG-4 where PyAV was built without x264.

    Args:
        frames: uint8 array (T, H, W, 3), RGB. Odd heights and widths get one white line more: the codec
            needs even ones.
        fps: Frames a second.

    Returns:
        The bytes of an MP4 file.

    Raises:
        ModuleNotFoundError: PyAV is not installed.
        ShapeError: The frames are not (T, H, W, 3) with T of 1 or more.

    Example:
        >>> clip = np.zeros((2, 16, 16, 3), dtype=np.uint8)
        >>> not mp4_available() or encode_mp4(clip)[4:8] == b"ftyp"
        True
    """
    encoder = Mp4Encoder(fps)
    encoder.add(frames)
    return encoder.close()


class Mp4Encoder:
    """Encodes a video piece by piece, so that a long one need not be in memory as a whole.

    Args:
        fps: Frames a second.

    Example:
        >>> encoder = Mp4Encoder(6)
        >>> if mp4_available():
        ...     encoder.add(np.zeros((2, 16, 16, 3), dtype=np.uint8))
        ...     assert encoder.close()[4:8] == b"ftyp"
    """

    def __init__(self, fps: int = 6) -> None:
        self.fps = fps
        self._buffer = io.BytesIO()
        self._container: Any = None
        self._stream: Any = None

    def add(self, frames: Bytes) -> None:
        """Encode the next frames.

        Args:
            frames: uint8 array (T, H, W, 3), RGB, of the same size in every call. Odd heights and widths get one white
                line more: the codec needs even ones.

        Raises:
            ModuleNotFoundError: PyAV is not installed.
            ShapeError: The frames are not (T, H, W, 3) with T of 1 or more.
        """
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.shape[0] == 0:
            raise ShapeError(f"Expected argument `frames` to be (T, H, W, 3) with T >= 1, but got {frames.shape}.")
        if not mp4_available():
            raise ModuleNotFoundError("Expected PyAV for MP4 files, but it is not installed. Run `pip install av`.")
        import av

        height, width = frames.shape[1:3]
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), constant_values=255)
        if self._container is None:
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            self._container = av.open(self._buffer, mode="w", format="mp4")
            self._stream = self._container.add_stream(codec, rate=self.fps)
            self._stream.height, self._stream.width = frames.shape[1:3]
            self._stream.pix_fmt = "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self._container.mux(self._stream.encode(picture))

    def close(self) -> bytes:
        """Finish the video.

        Returns:
            The bytes of an MP4 file.

        Raises:
            ShapeError: There is no frame.
        """
        if self._container is None:
            raise ShapeError("Expected at least one frame before the video is finished, but got none.")
        self._container.mux(self._stream.encode())
        self.discard()
        return self._buffer.getvalue()

    def discard(self) -> None:
        """Close what is open; of an unfinished video nothing is left."""
        if self._container is not None:
            self._container.close()
            self._container = self._stream = None
