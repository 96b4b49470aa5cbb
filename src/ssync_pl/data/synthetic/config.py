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

_DENSEST = math.pi / math.sqrt(12.0)  # share of the plane that equal discs can cover at most

_WHOLE = ("resolution", "frames", "min_objects", "max_objects", "antialias", "distractors", "thrown")
_RANGES: dict[str, tuple[float, float]] = {
    "resolution": (8, 1024),
    "frames": (1, 1000),
    "min_objects": (1, _MAX_OBJECTS),
    "max_objects": (1, _MAX_OBJECTS),
    "antialias": (1, 4),
    "distractors": (0, 64),
    "fps": (1.0, 240.0),
    "zoom": (0.5, 10.0),
    "camera_travel": (0.0, 20.0),
    "spawn_extent": (0.1, 10.0),
    "max_speed": (0.0, 20.0),
    "resting_extent": (0.1, 10.0),
    "clumping": (0.0, 1.0),
    "camouflage": (0.0, 1.0),
}
_PAIRS = {"spawn_height": (0.0, 5.0), "camera_elevation": (5.0, 80.0), "camera_shell": (3.0, 14.0)}

# Fields that came after the first data sets: left out of the hash at their defaults, so that those keep their folders.
_LATER_FIELDS = (
    *("thrown", "resting_extent", "clumping", "camouflage", "distractors"),
    *("camera_shell", "camera_elevation"),
)


@dataclass(frozen=True)
class SceneConfig:
    """Everything but the seed that decides how a synthetic video looks and moves.

    The defaults follow the MOVi-A recipe (Greff et al., "Kubric: A scalable dataset generator", CVPR 2022): focal
    length 35, sensor 32, a camera near (8, -6, 6) that looks at the origin, objects that are thrown towards the middle.

    Args:
        name: Letters, digits, ``_`` and ``-``; the first part of shard and folder names.
        resolution: Height and width of a frame in pixels, 8 to 1024.
        frames: Frames per video, 1 to 1000.
        fps: Frames per second of simulated time, 1 to 240.
        min_objects: Least number of objects per scene, at least 1.
        max_objects: Largest number of objects per scene, at most 64.
        object_sizes: Edge or diameter in world units; each object takes one of them, evenly.
        zoom: Magnification of the camera: the half-width of the view is divided by it. It changes how many pixels the
            objects fill without touching their motion, so it works alike for every preset.
        antialias: Rays along each side of a pixel, 1 to 4. Masks always come from the pixel's centre.
        textured: Procedural textures on objects, floor and a surrounding wall, instead of plain colours on grey.
        camera_motion: ``"static"``, ``"linear"`` (straight path) or ``"orbit"`` (circle about the vertical axis).
        camera_travel: Length of the camera's path over the clip in world units; 0 for a static camera. With a
            `camera_shell`, the longest path: each clip draws its own length, U(0, camera_travel).
        spawn_extent: Objects start with x and y in [-spawn_extent, spawn_extent], world units.
        spawn_height: Lowest and highest start of an object's centre above the floor, world units.
        max_speed: Starting velocity in x and y is U(-max_speed, max_speed) minus the position, world units per second.
        thrown: Fewest and most objects that are thrown in, while all others rest on the floor until something hits
            them; the number at rest is U(min_objects - fewest, max_objects - most). None: all are thrown.
        resting_extent: Objects at rest have their centres within this distance of the origin, world units.
        clumping: Chance that an object at rest stands right beside another one, 0 to 1.
        camouflage: How far the colours of textured objects are drawn towards those of floor and wall at most, 0 to 1.
        distractors: Flat patches on floor and wall that are painted like the objects and belong to the background, at
            most 64.
        camera_shell: Least and largest distance of the camera from the origin; it starts at a random place of that
            shell, and a straight path stays in it. None: near (8, -6, 6), as in MOVi-A.
        camera_elevation: Lowest and highest angle of the camera above the floor with a `camera_shell`, degrees.

    Raises:
        ConfigError: A value is out of range, or values contradict each other.
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
    thrown: tuple[int, int] | None = None
    resting_extent: float = 5.0
    clumping: float = 0.0
    camouflage: float = 0.0
    distractors: int = 0
    camera_shell: tuple[float, float] | None = None
    camera_elevation: tuple[float, float] = (20.0, 65.0)

    def __post_init__(self) -> None:
        # YAML gives lists, and ints where floats are meant: one spelling only, or equal settings would hash apart
        for field in (*_RANGES, *_PAIRS, "object_sizes"):
            value = getattr(self, field)
            if value is not None and field not in _WHOLE:
                object.__setattr__(self, field, _floats(field, value, single=field in _RANGES))
        if isinstance(self.thrown, list):
            object.__setattr__(self, "thrown", tuple(self.thrown))
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            raise ConfigError(
                "Expected argument `name` to be ASCII letters, digits, `_` and `-`, because files are named after it, "
                f"but got {self.name!r}."
            )
        for field, (low, high) in _RANGES.items():
            _between(field, getattr(self, field), low, high)
        for field, (low, high) in _PAIRS.items():
            pair = getattr(self, field)
            if pair is not None and (len(pair) != 2 or not low <= pair[0] <= pair[1] <= high):
                raise ConfigError(
                    f"Expected argument `{field}` to be (low, high) from {low:g} to {high:g}, but got {pair}."
                )
        if not self.object_sizes:
            raise ConfigError("Expected argument `object_sizes` to name at least one size, but got none.")
        for size in self.object_sizes:
            _between("object_sizes", size, 0.1, 4.0)
        if self.min_objects > self.max_objects:
            raise ConfigError(
                "Expected argument `min_objects` to be at most `max_objects`, but got "
                f"{self.min_objects} > {self.max_objects}. Lower one or raise the other."
            )
        if not isinstance(self.textured, bool) or self.camera_motion not in CAMERA_MOTIONS:
            raise ConfigError(
                f"Expected argument `textured` to be true or false and `camera_motion` one of {CAMERA_MOTIONS}, but "
                f"got {self.textured!r} and {self.camera_motion!r}."
            )
        if (self.camera_motion == "static") != (self.camera_travel == 0.0):
            raise ConfigError(
                "Expected argument `camera_travel` to be 0 for a static camera and positive for a moving one, but got "
                f"{self.camera_travel} with camera_motion={self.camera_motion!r}."
            )
        self._refuse_without("thrown", "resting_extent", "clumping")
        self._refuse_without("textured", "camouflage", "distractors")
        self._refuse_without("camera_shell", "camera_elevation")
        if self.thrown is not None:
            self._check_thrown(self.thrown)

    def _check_thrown(self, thrown: tuple[int, int]) -> None:
        if not isinstance(thrown, tuple) or len(thrown) != 2:
            raise ConfigError(f"Expected argument `thrown` to be (fewest, most), or None, but got {thrown!r}.")
        for count in thrown:
            _between("thrown", count, 0, _MAX_OBJECTS)
        low, high = thrown
        fewest, most = self.min_objects - low, self.max_objects - high
        if low > high or not 0 <= fewest <= most:
            raise ConfigError(
                "Expected argument `thrown` to be (fewest, most) so that U(min_objects - fewest, max_objects - most) "
                f"objects can rest, but got {thrown} with {self.min_objects} to {self.max_objects} objects. "
                "Raise `max_objects`, or lower `thrown`."
            )
        half = min(self.object_sizes) * 0.5
        if fewest * half**2 > _DENSEST * (self.resting_extent + half) ** 2:
            raise ConfigError(
                f"Expected {fewest} objects of sizes {self.object_sizes} to fit beside each other within "
                f"resting_extent={self.resting_extent:g}, but the floor there is too small. Raise `resting_extent`, or "
                "lower `object_sizes` or `min_objects`."
            )

    def _refuse_without(self, needed: str, *names: str) -> None:
        """Refuse settings that would have no effect."""
        for field in dataclasses.fields(self):
            if not getattr(self, needed) and field.name in names and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"Expected argument `{field.name}` to keep its default {field.default!r} without `{needed}`, but "
                    f"got {getattr(self, field.name)!r}. Set `{needed}` too."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values that JSON can carry."""
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in _LATER_FIELDS or value != field.default:
                values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    def content_hash(self) -> str:
        """Return a hash of the settings and the generator's version."""
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
    """
    if name not in PRESETS:
        raise ConfigError(f"Expected argument `name` to be one of {sorted(PRESETS)}, but got {name!r}.")
    fields = [field.name for field in dataclasses.fields(SceneConfig)]
    unknown = sorted(set(changes) - set(fields))
    if unknown:
        raise ConfigError(f"Expected settings among {fields}, but got {unknown}.")
    return dataclasses.replace(PRESETS[name], **changes)


def _floats(name: str, value: Any, single: bool) -> Any:
    values = [value] if single else value
    if not isinstance(values, (list, tuple)):
        raise ConfigError(f"Expected argument `{name}` to be a list of numbers, but got {value!r}.")
    for item in values:
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            raise ConfigError(f"Expected argument `{name}` to be a number, but got {item!r}.")
    return float(value) if single else tuple(float(item) for item in values)


def _between(name: str, value: Any, low: float, high: float) -> None:
    whole = name in _WHOLE
    good = isinstance(value, int if whole else float) and not isinstance(value, bool)
    if not good or not low <= value <= high:
        kind = "a whole number " if whole else ""
        raise ConfigError(f"Expected argument `{name}` to be {kind}from {low:g} to {high:g}, but got {value!r}.")


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
    "e": SceneConfig(
        name="e",
        min_objects=11,
        max_objects=23,
        object_sizes=(0.6, 0.9, 1.2, 1.6),
        textured=True,
        camera_motion="linear",
        camera_travel=4.0,
        spawn_extent=4.0,
        thrown=(1, 3),
        resting_extent=5.0,
        camera_shell=(7.0, 9.0),
    ),
    "cluttered": SceneConfig(
        name="cluttered",
        min_objects=15,
        max_objects=23,
        object_sizes=(0.9, 1.2, 1.6),
        textured=True,
        camera_motion="orbit",
        camera_travel=5.0,
        spawn_extent=3.5,
        spawn_height=(2.0, 5.0),
        thrown=(2, 4),
        resting_extent=4.5,
        clumping=0.8,
        camouflage=0.7,
        distractors=16,
        camera_shell=(8.0, 10.0),
        camera_elevation=(18.0, 36.0),
    ),
}
"""Settings by name.

``a``: plain colours, grey floor, static camera (like MOVi-A). ``a_zoom``: the same at 64x64 with larger objects, a
narrower view, lower starts and at most 7 objects (8 slots): objects fill 13 to 17 % of the pixels on average, so that
small models learn in minutes. ``c``: textured objects, floor and wall. ``e`` (like MOVi-E): as ``c``, but 10 to 20
objects rest on the floor, 1 to 3 more are thrown among them, and the camera moves along a straight line of up to 4
world units within a shell 7 to 9 from the origin. ``cluttered``: harder than ``e``: 13 to 19 objects stand in clumps
and 2 to 4 fall on them, a low camera circles them, so that they hide each other, their colours are drawn towards the
background's, and 16 flat patches that are painted like objects lie on floor and wall. In the last two the lamps stand
at the same side of the camera wherever it starts, and up to 23 objects need 24 channels with the background.
"""
