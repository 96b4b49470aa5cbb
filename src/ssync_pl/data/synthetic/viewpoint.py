"""Draws where the camera stands and how it moves; it always looks at the origin."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ssync_pl.data.synthetic.config import SceneConfig

__all__ = ["camera_path"]

_TRIES = 100

_Array = npt.NDArray[Any]


def camera_path(config: SceneConfig, rng: np.random.Generator) -> _Array:
    """Draw the camera's path."""
    if config.camera_shell is not None:
        return _shell_path(config, config.camera_shell, rng)
    start = np.array([7.48113, -6.50764, 5.34367]) + rng.uniform(0.0, 1.0, 3)
    side = float(rng.choice([-1.0, 1.0]))
    heading = rng.uniform(-0.4, 0.4)
    if config.camera_motion == "static":
        return start[None]
    way = np.linspace(-0.5, 0.5, config.frames) * side * config.camera_travel
    if config.camera_motion == "orbit":
        return _circle(start, way)
    # across the view, turned a little up or down: never towards the objects
    across = np.array([-start[1], start[0], 0.0]) / math.hypot(start[0], start[1])
    return start + way[:, None] * (math.cos(heading) * across + math.sin(heading) * np.array([0.0, 0.0, 0.4]))


def _shell_path(config: SceneConfig, shell: tuple[float, float], rng: np.random.Generator) -> _Array:
    distance, azimuth = rng.uniform(*shell), rng.uniform(0.0, 2.0 * math.pi)
    elevation = math.radians(rng.uniform(*config.camera_elevation))
    flat = distance * math.cos(elevation)
    start = np.array([flat * math.cos(azimuth), flat * math.sin(azimuth), distance * math.sin(elevation)])
    length, side = config.camera_travel * rng.uniform(), float(rng.choice([-1.0, 1.0]))
    if config.camera_motion == "static":
        return start[None]
    if config.camera_motion == "orbit":
        return _circle(start, np.linspace(-0.5, 0.5, config.frames) * side * length)
    end = _straight_end(config, shell, start, length, rng)
    if end is None:
        # a chord of the circle about the vertical axis: both ends at one distance and elevation
        angle = azimuth + side * 2.0 * math.asin(min(1.0, 0.5 * length / flat))
        end = np.array([flat * math.cos(angle), flat * math.sin(angle), start[2]])
    return start + np.linspace(0.0, 1.0, config.frames)[:, None] * (end - start)


def _straight_end(
    config: SceneConfig, shell: tuple[float, float], start: _Array, length: float, rng: np.random.Generator
) -> _Array | None:
    """Return the first of some random ends that lies in the shell and between the elevations."""
    way = rng.normal(size=(_TRIES, 3))
    ends = start + length * way / np.sqrt((way * way).sum(-1, keepdims=True))
    distance = np.sqrt((ends * ends).sum(-1))
    lowest, highest = (math.sin(math.radians(angle)) for angle in config.camera_elevation)
    height = ends[:, 2] / distance
    inside = (distance >= shell[0]) & (distance <= shell[1]) & (height >= lowest) & (height <= highest)
    return ends[inside.argmax()] if inside.any() else None


def _circle(start: _Array, way: _Array) -> _Array:
    radius = math.hypot(start[0], start[1])
    angle = math.atan2(start[1], start[0]) + way / radius
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full_like(way, start[2])], -1)
