"""Sphere, cube and cylinder: ray hits, surface normals, signed distances and the balls that touch for them.

All are centred at the origin of their own frame and have one parameter, the half-size ``h``: a sphere of radius ``h``,
a cube of half-edge ``h``, a cylinder of radius ``h`` and half-height ``h`` about the z axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

SPHERE, CUBE, CYLINDER = 0, 1, 2
VOLUMES = (4.0 / 3.0 * math.pi, 8.0, 2.0 * math.pi)  # over the cubed half-size
INERTIA = ((0.4, 0.4, 0.4), (2.0 / 3.0, 2.0 / 3.0, 2.0 / 3.0), (7.0 / 12.0, 7.0 / 12.0, 0.5))  # at unit mass and size

Array = npt.NDArray[Any]


def bounds(shapes: Array, half: Array) -> Array:
    """Returns the radii of bounding spheres."""
    return np.array([1.0, math.sqrt(3.0), math.sqrt(2.0)])[shapes] * half


def intersect(shape: int, origin: Sequence[Any], direction: Sequence[Any], half: float) -> Array:
    """Returns where rays enter a shape, in lengths of their directions; infinity where they miss."""
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if shape == SPHERE:
            squares = (dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz)
            spans = [_between_roots(*squares, half)]
        elif shape == CUBE:
            spans = [_between_planes(o, d, half) for o, d in zip(origin, direction, strict=True)]
        else:
            squares = (dx * dx + dy * dy, ox * dx + oy * dy, ox * ox + oy * oy)
            spans = [_between_roots(*squares, half), _between_planes(oz, dz, half)]
        enter, leave = spans[0]
        for low, high in spans[1:]:
            enter, leave = np.maximum(enter, low), np.minimum(leave, high)
        # comparisons with NaN are false, so rays that miss fall out here
        return np.where((enter <= leave) & (enter > 0.0), enter, np.float32(np.inf))


def _between_roots(a: Any, b: Any, c: Any, half: float) -> tuple[Any, Any]:
    root = np.sqrt(b * b - a * (c - half * half))
    return (-b - root) / a, (root - b) / a


def _between_planes(origin: Any, direction: Any, half: float) -> tuple[Any, Any]:
    inverse = 1.0 / np.asarray(direction)
    near, far = (-half - origin) * inverse, (half - origin) * inverse
    return np.minimum(near, far), np.maximum(near, far)


def normal(shape: int, x: Array, y: Array, z: Array, half: float) -> tuple[Array, Array, Array]:
    """Returns the outward normals at points on a shape's surface."""
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


def signed_distance(shape: int, points: Array, half: Array) -> tuple[Array, Array]:
    """Returns the distances ``(..., P)`` of points ``(..., P, 3)`` to a shape's surface, and the ways out."""
    if shape == SPHERE:
        length = np.sqrt((points * points).sum(-1))
        return length - half, points / np.maximum(length, 1e-9)[..., None]
    if shape == CUBE:
        faces = np.abs(points) - half[..., None]
    else:
        rho = np.sqrt(points[..., 0] ** 2 + points[..., 1] ** 2)
        faces = np.stack([rho - half, np.abs(points[..., 2]) - half], -1)
    beyond = np.maximum(faces, 0.0)
    outside = np.sqrt((beyond * beyond).sum(-1))
    inside = np.minimum(faces.max(-1), 0.0)
    nearest_face = faces == faces.max(-1, keepdims=True)
    weights = np.where(outside[..., None] > 0.0, beyond / np.maximum(outside, 1e-9)[..., None], nearest_face)
    # a point on a diagonal is equally near to several faces: share, so that the direction stays of unit length
    weights = weights / np.sqrt((weights * weights).sum(-1, keepdims=True))
    if shape == CUBE:
        return outside + inside, weights * np.sign(points)
    radial = points[..., :2] / np.maximum(rho, 1e-9)[..., None]
    along = (weights[..., 1] * np.sign(points[..., 2]))[..., None]
    return outside + inside, np.concatenate([weights[..., :1] * radial, along], -1)


def contact_balls(shape: int, half: float) -> tuple[Array, Array, Array]:
    """Returns centres, radii and shares of mass of the balls that stand for a shape in contacts."""
    if shape == SPHERE:
        corners, share = np.zeros((0, 3)), 0.0
    elif shape == CUBE:
        corners = np.array([[x, y, z] for x in (-half, half) for y in (-half, half) for z in (-half, half)])
        share = 0.4
    else:
        angles = np.arange(12) * (2.0 * math.pi / 12.0)
        rim = np.stack([np.cos(angles), np.sin(angles), np.ones(12)], -1) * half
        corners, share = np.concatenate([rim, rim * [1.0, 1.0, -1.0]]), 0.25
    radii, shares = [half] + [0.0] * len(corners), [1.0] + [share] * len(corners)
    return np.concatenate([np.zeros((1, 3)), corners]), np.array(radii), np.array(shares)
