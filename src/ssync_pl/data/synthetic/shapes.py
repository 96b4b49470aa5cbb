"""Sphere, cube and cylinder: ray hits, surface normals, signed distances, contact points, volume and inertia.

All shapes are centred at the origin of their own frame and have one parameter, the half-size ``h``: a sphere of radius
``h``, a cube of half-edge ``h``, a cylinder of radius ``h`` and half-height ``h`` about the z axis.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "BOUNDS",
    "CUBE",
    "CYLINDER",
    "SHAPES",
    "SPHERE",
    "contact_points",
    "inertia",
    "intersect",
    "normal",
    "signed_distance",
    "volume",
]

SPHERE, CUBE, CYLINDER = 0, 1, 2
"""Codes of the shapes."""

SHAPES = ("sphere", "cube", "cylinder")
"""Names of the shapes, in the order of their codes."""

BOUNDS = (1.0, math.sqrt(3.0), math.sqrt(2.0))
"""Radius of the bounding sphere divided by the half-size."""

_Array = npt.NDArray[Any]


def volume(shape: int, half: float) -> float:
    """Return a shape's volume."""
    return (4.0 / 3.0 * math.pi, 8.0, 2.0 * math.pi)[shape] * half**3


def inertia(shape: int, half: float) -> tuple[float, float, float]:
    """Return a shape's principal moments of inertia at unit mass."""
    x, z = ((0.4, 0.4), (2.0 / 3.0, 2.0 / 3.0), (7.0 / 12.0, 0.5))[shape]
    return x * half**2, x * half**2, z * half**2


def intersect(shape: int, origin: tuple[Any, Any, Any], direction: tuple[Any, Any, Any], half: float) -> _Array:
    """Return where rays enter a shape."""
    ox, oy, oz = origin
    dx, dy, dz = direction
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if shape == SPHERE:
            enter, leave = _roots(
                dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz, half
            )
        elif shape == CUBE:
            enter, leave = _slab(ox, dx, half)
            for o, d in ((oy, dy), (oz, dz)):
                low, high = _slab(o, d, half)
                enter, leave = np.maximum(enter, low), np.minimum(leave, high)
        else:
            enter, leave = _roots(dx * dx + dy * dy, ox * dx + oy * dy, ox * ox + oy * oy, half)
            low, high = _slab(oz, dz, half)
            enter, leave = np.maximum(enter, low), np.minimum(leave, high)
        # comparisons with NaN are false, so rays that miss fall out here
        return np.where((enter <= leave) & (enter > 0.0), enter, np.float32(np.inf))


def _roots(a: Any, b: Any, c: Any, half: float) -> tuple[Any, Any]:
    root = np.sqrt(b * b - a * (c - half * half))
    return (-b - root) / a, (root - b) / a


def _slab(origin: Any, direction: Any, half: float) -> tuple[Any, Any]:
    inverse = 1.0 / np.asarray(direction)
    near, far = (-half - origin) * inverse, (half - origin) * inverse
    return np.minimum(near, far), np.maximum(near, far)


def normal(shape: int, x: _Array, y: _Array, z: _Array, half: float) -> tuple[_Array, _Array, _Array]:
    """Return the outward normal at points on a shape's surface."""
    if shape == SPHERE:
        scale = 1.0 / half
        return x * scale, y * scale, z * scale
    if shape == CUBE:
        ax, ay, az = np.abs(x), np.abs(y), np.abs(z)
        on_x = (ax >= ay) & (ax >= az)
        on_y = ~on_x & (ay >= az)
        return np.sign(x) * on_x, np.sign(y) * on_y, np.sign(z) * ~(on_x | on_y)
    rho = np.sqrt(x * x + y * y)
    cap = np.abs(z) >= rho
    scale = ~cap / np.maximum(rho, np.float32(1e-6))
    return x * scale, y * scale, np.sign(z) * cap


def signed_distance(shape: int, points: _Array, half: _Array) -> tuple[_Array, _Array]:
    """Return the distance of points to a shape's surface, and the way out."""
    if shape == SPHERE:
        length = np.sqrt((points * points).sum(-1))
        return length - half, points / np.maximum(length, 1e-9)[..., None]
    if shape == CUBE:
        faces = np.abs(points) - half[..., None]
        outward = np.sign(points)
    else:
        rho = np.sqrt(points[..., 0] ** 2 + points[..., 1] ** 2)
        radial = points[..., :2] / np.maximum(rho, 1e-9)[..., None]
        faces = np.stack([rho - half, np.abs(points[..., 2]) - half], -1)
        outward = np.sign(points[..., 2])
    beyond = np.maximum(faces, 0.0)
    outside = np.sqrt((beyond * beyond).sum(-1))
    inside = np.minimum(faces.max(-1), 0.0)
    nearest_face = faces == faces.max(-1, keepdims=True)
    weights = np.where(outside[..., None] > 0.0, beyond / np.maximum(outside, 1e-9)[..., None], nearest_face)
    # a point on a diagonal is equally near to several faces: share, so that the direction stays of unit length
    weights = weights / np.sqrt((weights * weights).sum(-1, keepdims=True))
    if shape == CUBE:
        return outside + inside, weights * outward
    direction = np.concatenate([weights[..., :1] * radial, (weights[..., 1] * outward)[..., None]], -1)
    return outside + inside, direction


def contact_points(shape: int, half: float) -> tuple[_Array, _Array, _Array]:
    """Return the balls that stand for a shape when it touches the floor or another shape."""
    middle = np.zeros((1, 3))
    if shape == SPHERE:
        return middle, np.array([half]), np.array([1.0])
    if shape == CUBE:
        corners = np.array([[x, y, z] for x in (-half, half) for y in (-half, half) for z in (-half, half)])
        return np.concatenate([middle, corners]), np.array([half] + [0.0] * 8), np.array([1.0] + [0.4] * 8)
    angles = np.arange(12) * (2.0 * math.pi / 12.0)
    rim = np.stack([np.cos(angles), np.sin(angles), np.ones(12)], -1) * half
    points = np.concatenate([middle, rim, rim * [1.0, 1.0, -1.0]])
    return points, np.array([half] + [0.0] * 24), np.array([1.0] + [0.25] * 24)
