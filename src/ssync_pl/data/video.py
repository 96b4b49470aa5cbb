"""Videos encoded as MP4 in memory, with PyAV."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssync_pl.errors import ShapeError, require_shape


def mp4_available() -> bool:
    """Whether PyAV, which writes the MP4 files, is installed."""
    return importlib.util.find_spec("av") is not None


class Mp4Encoder:
    """Encodes an H.264 video piece by piece (MPEG-4 without x264), so that a long one need not be in memory."""

    def __init__(self, fps: int = 6) -> None:
        self.fps = fps
        self._buffer = io.BytesIO()
        self._container: Any = None
        self._stream: Any = None

    def add(self, frames: NDArray[np.uint8]) -> None:
        """Encodes frames (T, H, W, 3), RGB; odd heights and widths get one white line more, as the codec asks."""
        fits = frames.ndim == 4 and frames.shape[3] == 3 and frames.shape[0] > 0
        require_shape(fits, "argument `frames` to be (T, H, W, 3) with T >= 1", frames)
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
        """Finishes the video and returns its bytes."""
        if self._container is None:
            raise ShapeError("Expected at least one frame before the video is finished, but got none.")
        self._container.mux(self._stream.encode())
        self.discard()
        return self._buffer.getvalue()

    def discard(self) -> None:
        """Closes what is open; of an unfinished video nothing is left."""
        if self._container is not None:
            self._container.close()
            self._container = self._stream = None
