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
    """A camera and its rays.

    Args:
        origin: Position ``(3,)``, world units.
        basis: Rows are the unit vectors right, up and forward ``(3, 3)``.
        half_width: Tangent of half the field of view.
        resolution: Pixels a side.
        rays: Rays along each side of a pixel.

    Example:
        >>> camera = look_at_origin(np.array([8.0, -6.0, 5.0]), zoom=1.0, resolution=64, rays=1)
        >>> camera.project(np.zeros((1, 3))).round(3).tolist()
        [[0.5, 0.5]]
    """

    origin: _Array
    basis: _Array
    half_width: float
    resolution: int
    rays: int

    def axes(self) -> tuple[_Array, _Array]:
        """Return the rays' sideways and upward slopes ``(W, s)`` and ``(H, s)``, float32.

        Returns:
            Slopes of the columns (rightwards) and rows (upwards).

        Example:
            >>> camera = look_at_origin(np.array([8.0, -6.0, 5.0]), zoom=1.0, resolution=2, rays=1)
            >>> bool((camera.axes()[0][:, 0] == -camera.axes()[0][::-1, 0]).all())
            True
        """
        count = self.resolution * self.rays
        centres = ((np.arange(count) + 0.5) / count * 2.0 - 1.0) * self.half_width
        across = centres.reshape(self.resolution, self.rays).astype(np.float32)
        return across, -across

    def project(self, points: _Array) -> _Array:
        """Return where points appear in the image.

        Args:
            points: World points ``(..., 3)`` in front of the camera.

        Returns:
            x and y ``(..., 2)``: 0 at the left and top edge, 1 at the right and bottom edge; beyond when out of view.

        Example:
            >>> camera = look_at_origin(np.array([8.0, -6.0, 5.0]), zoom=1.0, resolution=64, rays=1)
            >>> bool(camera.project(np.array([0.0, 0.0, 1.0]))[1] < 0.5)
            True
        """
        right, up, forward = np.moveaxis((points - self.origin) @ self.basis.T, -1, 0)
        depth = np.maximum(forward, _NEAR) * self.half_width * 2.0
        return np.stack([0.5 + right / depth, 0.5 - up / depth], -1)

    def ball_box(self, centre: _Array, radius: float) -> Box | None:
        """Return the smallest box of pixels that holds a ball's picture.

        Args:
            centre: World point ``(3,)``.
            radius: World units.

        Returns:
            The box, or None when the ball is out of view.

        Example:
            >>> camera = look_at_origin(np.array([8.0, -6.0, 5.0]), zoom=1.0, resolution=64, rays=1)
            >>> camera.ball_box(np.array([80.0, 0.0, 0.0]), 1.0) is None
            True
        """
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
        """Return a box of pixels that holds a polygon's picture.

        Args:
            corners: World points ``(K, 3)``.

        Returns:
            The box, the whole image when a corner lies behind the camera, or None when the polygon is out of view.

        Example:
            >>> camera = look_at_origin(np.array([8.0, -6.0, 5.0]), zoom=1.0, resolution=64, rays=1)
            >>> camera.floor_box(np.zeros((1, 3)))
            (slice(31, 33, None), slice(31, 33, None))
        """
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
    """Return a camera of the recipe's focal length that looks at the origin, upright.

    Args:
        position: Where it stands ``(3,)``, world units, not on the z axis.
        zoom: Magnification; 1 is the recipe's 49 degree view.
        resolution: Pixels a side.
        rays: Rays along each side of a pixel.

    Returns:
        The camera.

    Example:
        >>> look_at_origin(np.array([0.0, -5.0, 0.0]), 1.0, 8, 1).basis[2].tolist() == [0.0, 1.0, 0.0]
        True
    """
    forward = -position / np.sqrt((position * position).sum())
    right = np.array([forward[1], -forward[0], 0.0]) / math.hypot(forward[0], forward[1])
    up = np.cross(right, forward)
    return Camera(position, np.stack([right, up, forward]), SENSOR / 2.0 / FOCAL / zoom, resolution, rays)
