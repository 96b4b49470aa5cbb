"""A pinhole camera that looks at the origin, and the screen boxes of what it sees.

Images are 4-D: ``(H, s, W, s)`` with s rays along each side of a pixel, so that averaging over axes 1 and 3 gives
pixels, and patterns within a pixel broadcast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssync_pl.data.synthetic.scene import FOCAL, SENSOR

__all__ = ["Box", "Camera", "look_at_origin"]

_NEAR = 0.05

_Array = npt.NDArray[Any]

Box = tuple[slice, slice]
"""Rows and columns of pixels."""


@dataclass(frozen=True)
class Camera:
    """A camera and its rays."""

    origin: _Array
    basis: _Array
    half_width: float
    resolution: int
    rays: int

    def axes(self) -> tuple[_Array, _Array]:
        """Return the rays' sideways and upward slopes ``(W, s)`` and ``(H, s)``, float32."""
        count = self.resolution * self.rays
        centres = ((np.arange(count) + 0.5) / count * 2.0 - 1.0) * self.half_width
        across = centres.reshape(self.resolution, self.rays).astype(np.float32)
        return across, -across

    def project(self, points: _Array) -> _Array:
        """Return where points appear in the image."""
        right, up, forward = np.moveaxis((points - self.origin) @ self.basis.T, -1, 0)
        depth = np.maximum(forward, _NEAR) * self.half_width * 2.0
        return np.stack([0.5 + right / depth, 0.5 - up / depth], -1)

    def ball_box(self, centre: _Array, radius: float) -> Box | None:
        """Return the smallest box of pixels that holds a ball's picture."""
        right, up, forward = (self.basis @ (centre - self.origin)).tolist()
        if forward < -radius:
            return None
        spans = []
        for side in (right, -up):
            distance = math.hypot(side, forward)
            if distance <= radius * 1.001:
                spans.append((-math.inf, math.inf))
                continue
            middle, spread = math.atan2(side, forward), math.asin(radius / distance)
            low, high = middle - spread, middle + spread
            limit = math.pi / 2.0 - 1e-3
            if low > limit or high < -limit:
                return None
            spans.append((math.tan(low) if low > -limit else -math.inf, math.tan(high) if high < limit else math.inf))
        return self._box(spans[0], spans[1])

    def floor_box(self, corners: _Array) -> Box | None:
        """Return a box of pixels that holds a polygon's picture."""
        right, up, forward = self.basis @ (corners - self.origin).T
        if (forward < _NEAR).any():
            return (slice(0, self.resolution), slice(0, self.resolution))
        across, down = right / forward, -up / forward
        return self._box((float(across.min()), float(across.max())), (float(down.min()), float(down.max())))

    def _box(self, across: tuple[float, float], down: tuple[float, float]) -> Box | None:
        spans = []
        for low, high in (down, across):
            ends = [(min(max(end / self.half_width, -1.5), 1.5) + 1.0) * 0.5 * self.resolution for end in (low, high)]
            # a little slack against rounding
            start = max(0, math.floor(ends[0] - 0.01))
            stop = min(self.resolution, math.ceil(ends[1] + 0.01))
            if start >= stop:
                return None
            spans.append(slice(start, stop))
        return spans[0], spans[1]


def look_at_origin(position: _Array, zoom: float, resolution: int, rays: int) -> Camera:
    """Return a camera of the recipe's focal length that looks at the origin, upright."""
    forward = -position / np.sqrt((position * position).sum())
    right = np.array([forward[1], -forward[0], 0.0]) / math.hypot(forward[0], forward[1])
    up = np.cross(right, forward)
    return Camera(position, np.stack([right, up, forward]), SENSOR / 2.0 / FOCAL / zoom, resolution, rays)
