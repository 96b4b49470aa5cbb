"""Settings of the synthetic scenes, their presets and the hash that names a generated folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from ssync_pl.errors import ConfigError

__all__ = ["CAMERA_MOTIONS", "GENERATOR_VERSION", "PRESETS", "SceneConfig", "preset"]

GENERATOR_VERSION = 1
"""Raised whenever the same settings would give other pixels; part of every content hash."""

CAMERA_MOTIONS = ("static", "linear", "orbit")
"""What the camera may do during a clip; it always looks at the origin."""

_MAX_OBJECTS = 64


@dataclass(frozen=True)
class SceneConfig:
    """Everything but the seed that decides how a synthetic video looks and moves.

    The defaults follow the MOVi-A recipe (Greff et al., "Kubric: A scalable dataset generator", CVPR 2022): focal
    length 35, sensor 32, a camera near (8, -6, 6) that looks at the origin, objects that are thrown towards the middle.

    Args:
        name: Letters, digits, ``_`` and ``-``; the first part of shard and folder names.
        resolution: Height and width of a frame in pixels, 8 to 1024.
        frames: Frames a video, 1 to 1000.
        fps: Frames a second of simulated time, 1 to 240.
        min_objects: Least number of objects a scene, at least 1.
        max_objects: Largest number of objects a scene, at most 64.
        object_sizes: Edge or diameter in world units; each object takes one of them, evenly.
        zoom: Magnification of the camera: the half-width of the view is divided by it. It changes how many pixels the
            objects fill without touching their motion, so it works alike for every preset.
        antialias: Rays along each side of a pixel, 1 to 4. Masks always come from the pixel's centre.
        textured: Procedural textures on objects, floor and a surrounding wall, instead of plain colours on grey.
        camera_motion: ``"static"``, ``"linear"`` (straight path) or ``"orbit"`` (circle about the vertical axis).
        camera_travel: Length of the camera's path over the clip in world units; 0 for a static camera.
        spawn_extent: Objects start with x and y in [-spawn_extent, spawn_extent], world units.
        spawn_height: Lowest and highest start of an object's centre above the floor, world units.
        max_speed: Starting velocity in x and y is U(-max_speed, max_speed) minus the position, world units a second.

    Raises:
        ConfigError: A value is out of range, or values contradict each other.

    Example:
        >>> SceneConfig(resolution=64, frames=12).resolution
        64
    """

    name: str = "a"
    resolution: int = 128
    frames: int = 24
    fps: float = 12.0
    min_objects: int = 3
    max_objects: int = 10
    object_sizes: tuple[float, ...] = (0.7, 1.4)
    zoom: float = 1.0
    antialias: int = 2
    textured: bool = False
    camera_motion: str = "static"
    camera_travel: float = 0.0
    spawn_extent: float = 5.0
    spawn_height: tuple[float, float] = (1.0, 5.0)
    max_speed: float = 4.0

    def __post_init__(self) -> None:
        # YAML gives lists, and ints where floats are meant: one spelling only, or equal settings would hash apart
        object.__setattr__(self, "object_sizes", _floats("object_sizes", self.object_sizes))
        object.__setattr__(self, "spawn_height", _floats("spawn_height", self.spawn_height))
        for field in ("fps", "zoom", "camera_travel", "spawn_extent", "max_speed"):
            object.__setattr__(self, field, _float(field, getattr(self, field)))
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            raise ConfigError(
                "Expected argument `name` to be ASCII letters, digits, `_` and `-`, because files are named after it, "
                f"but got {self.name!r}."
            )
        _whole("resolution", self.resolution, 8, 1024)
        _whole("frames", self.frames, 1, 1000)
        _whole("min_objects", self.min_objects, 1, _MAX_OBJECTS)
        _whole("max_objects", self.max_objects, 1, _MAX_OBJECTS)
        _whole("antialias", self.antialias, 1, 4)
        if self.min_objects > self.max_objects:
            raise ConfigError(
                "Expected argument `min_objects` to be at most `max_objects`, but got "
                f"{self.min_objects} > {self.max_objects}. Lower one or raise the other."
            )
        _between("fps", self.fps, 1.0, 240.0)
        _between("zoom", self.zoom, 0.5, 10.0)
        _between("camera_travel", self.camera_travel, 0.0, 20.0)
        _between("spawn_extent", self.spawn_extent, 0.1, 10.0)
        _between("max_speed", self.max_speed, 0.0, 20.0)
        if not self.object_sizes:
            raise ConfigError("Expected argument `object_sizes` to name at least one size, but got none.")
        for size in self.object_sizes:
            _between("object_sizes", size, 0.1, 4.0)
        if len(self.spawn_height) != 2 or not 0.0 <= self.spawn_height[0] <= self.spawn_height[1] <= 5.0:
            raise ConfigError(
                "Expected argument `spawn_height` to be (low, high) with 0 <= low <= high <= 5, but got "
                f"{self.spawn_height}."
            )
        if not isinstance(self.textured, bool):
            raise ConfigError(f"Expected argument `textured` to be true or false, but got {self.textured!r}.")
        if self.camera_motion not in CAMERA_MOTIONS:
            raise ConfigError(
                f"Expected argument `camera_motion` to be one of {CAMERA_MOTIONS}, but got {self.camera_motion!r}."
            )
        if (self.camera_motion == "static") != (self.camera_travel == 0.0):
            raise ConfigError(
                "Expected argument `camera_travel` to be 0 for a static camera and positive for a moving one, but got "
                f"{self.camera_travel} with camera_motion={self.camera_motion!r}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values that JSON can carry.

        Returns:
            One entry a field; tuples become lists.

        Example:
            >>> SceneConfig().to_dict()["object_sizes"]
            [0.7, 1.4]
        """
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def content_hash(self) -> str:
        """Return a hash of the settings and the generator's version.

        Returns:
            64 hexadecimal digits, equal for equal settings on every machine.

        Example:
            >>> SceneConfig().content_hash() == SceneConfig(fps=12).content_hash()
            True
        """
        text = json.dumps({"version": GENERATOR_VERSION, "config": self.to_dict()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def preset(name: str, /, **changes: Any) -> SceneConfig:
    """Return a preset, with some settings changed.

    Args:
        name: A key of ``PRESETS``.
        **changes: Fields of ``SceneConfig`` to replace.

    Returns:
        The settings.

    Raises:
        ConfigError: There is no such preset, or no such field.

    Example:
        >>> preset("a", resolution=64, frames=12).frames
        12
    """
    if name not in PRESETS:
        raise ConfigError(f"Expected argument `name` to be one of {sorted(PRESETS)}, but got {name!r}.")
    fields = [field.name for field in dataclasses.fields(SceneConfig)]
    unknown = sorted(set(changes) - set(fields))
    if unknown:
        raise ConfigError(f"Expected settings among {fields}, but got {unknown}.")
    return dataclasses.replace(PRESETS[name], **changes)


def _float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"Expected argument `{name}` to be a number, but got {value!r}.")
    return float(value)


def _floats(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"Expected argument `{name}` to be a list of numbers, but got {value!r}.")
    return tuple(_float(name, item) for item in value)


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"Expected argument `{name}` to be a whole number from {low} to {high}, but got {value!r}.")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"Expected argument `{name}` to be from {low:g} to {high:g}, but got {value!r}.")


PRESETS: dict[str, SceneConfig] = {
    "a": SceneConfig(),
    "a_zoom": SceneConfig(
        name="a_zoom",
        resolution=64,
        frames=12,
        min_objects=3,
        max_objects=7,
        object_sizes=(1.0, 1.6),
        zoom=1.25,
        spawn_extent=3.0,
        spawn_height=(1.0, 3.0),
    ),
    "c": SceneConfig(name="c", textured=True),
}
"""Settings by name.

``a``: plain colours, grey floor, static camera (like MOVi-A). ``a_zoom``: the same at 64x64 with larger objects, a
narrower view, lower starts and at most 7 objects (8 slots): objects fill 13 to 17 % of the pixels on average, so that
small models learn in minutes. ``c``: textured objects, floor and wall.
"""
