"""Videos encoded as MP4 in memory, with PyAV."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssync_pl.errors import require_shape


def mp4_available() -> bool:
    """Whether PyAV, which writes the MP4 files, is installed."""
    return importlib.util.find_spec("av") is not None


class Mp4Encoder:
    """Encodes an H.264 video piece by piece (MPEG-4 without x264), so that a long one need not be in memory."""

    def __init__(self, fps: int = 6) -> None:
        import av

        self._buffer = io.BytesIO()
        self._container: Any = av.open(self._buffer, mode="w", format="mp4")
        self._stream: Any = self._container.add_stream(
            "libx264" if "libx264" in av.codecs_available else "mpeg4", rate=fps, pix_fmt="yuv420p"
        )

    def add(self, frames: NDArray[np.uint8]) -> None:
        """Encodes frames (T, H, W, 3), RGB; odd heights and widths get one white line more, as the codec asks."""
        fits = frames.ndim == 4 and frames.shape[3] == 3 and frames.shape[0] > 0
        require_shape(fits, "argument `frames` to be (T, H, W, 3) with T >= 1", frames)
        from av import VideoFrame

        height, width = frames.shape[1:3]
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), constant_values=255)
        if not self._stream.codec_context.is_open:
            self._stream.height, self._stream.width = frames.shape[1:3]
        for frame in frames:
            self._container.mux(self._stream.encode(VideoFrame.from_ndarray(frame, format="rgb24")))

    def close(self) -> bytes:
        """Finishes the video and returns its bytes."""
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._buffer.getvalue()
