"""Settings of the synthetic scenes, and their presets."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from ssync_pl.errors import require

_RANGES: dict[str, tuple[float, float]] = {
    "resolution": (8, 1024),
    "frames": (1, 1000),
    "fps": (1, 240),
    "min_objects": (1, 64),
    "max_objects": (1, 64),
    "zoom": (0.5, 10),
    "antialias": (1, 4),
    "spawn_extent": (0.1, 10),
    "object_sizes": (0.1, 4),
    "spawn_height": (0, 5),
    "camera_shell": (3, 14),
    "camera_elevation": (5, 80),
}


@dataclass(frozen=True)
class SceneConfig:
    """Everything but the seed that decides how a synthetic video looks and moves.

    The defaults follow the MOVi-A recipe (Greff et al., "Kubric: A scalable dataset generator", CVPR 2022). Lengths are
    world units; the camera stands still and looks at the origin.

    Args:
        name: Letters, digits, ``_`` and ``-``; the first part of shard and folder names.
        resolution: Height and width of a frame in pixels, 8 to 1024.
        frames: Frames per video, 1 to 1000.
        fps: Frames per second of simulated time, 1 to 240.
        min_objects: Least number of objects per scene, at least 1.
        max_objects: Largest number of objects per scene, at most 64.
        object_sizes: Edges or diameters, 0.1 to 4; each object takes one of them, evenly.
        zoom: Magnification of the camera, 0.5 to 10; the motion of the objects does not depend on it.
        antialias: Rays along each side of a pixel, 1 to 4; masks always come from the pixel's centre.
        textured: Procedural textures on objects, floor and a surrounding wall, instead of plain colours on grey.
        spawn_extent: Objects start with x and y in [-spawn_extent, spawn_extent], 0.1 to 10.
        spawn_height: Lowest and highest start of an object's centre above the floor, 0 to 5.
        camera_shell: Least and largest distance of the camera from the origin, 3 to 14; None: near (8, -6, 6).
        camera_elevation: Lowest and highest angle of the camera above the floor with a `camera_shell`, 5 to 80 degrees.

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
    spawn_extent: float = 5.0
    spawn_height: tuple[float, float] = (1.0, 5.0)
    camera_shell: tuple[float, float] | None = None
    camera_elevation: tuple[float, float] = (20.0, 65.0)

    def __post_init__(self) -> None:
        # one spelling only, or equal settings would hash apart: YAML gives lists, and ints where floats are meant
        for name, ends in _RANGES.items():
            value, default = getattr(self, name), getattr(SceneConfig, name)
            if isinstance(default, (int, float)):
                value = number(name, value, type(default), *ends)
            elif value is not None or default is not None:
                known = isinstance(value, (list, tuple)) and len(value) > 0
                require(known, f"`{name}` to be a list of numbers", repr(value))
                value = tuple(number(name, item, float, *ends) for item in value)
                ordered = name == "object_sizes" or (len(value) == 2 and value[0] <= value[1])
                require(ordered, f"`{name}` to be (lowest, highest)", value)
            object.__setattr__(self, name, value)
        plain = isinstance(self.name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name)
        require(bool(plain), "`name` to be ASCII letters, digits, `_` and `-`, for files", repr(self.name))
        require(isinstance(self.textured, bool), "`textured` to be true or false", repr(self.textured))
        most = f"`min_objects` to be at most `max_objects` ({self.max_objects})"
        require(self.min_objects <= self.max_objects, most, self.min_objects)
        alone = self.camera_shell is None and self.camera_elevation != SceneConfig.camera_elevation
        require(not alone, "`camera_shell` beside `camera_elevation`", "none")


def number(name: str, value: Any, kind: type[int] | type[float], low: float, high: float) -> Any:
    """Returns a number of this kind; raises `ConfigError` where it is another kind or out of range."""
    good = isinstance(value, (int, kind)) and not isinstance(value, bool) and low <= value <= high
    what = "a whole number" if kind is int else "a number"
    require(good, f"`{name}` to be {what} from {low:g} to {high:g}", repr(value))
    return kind(value)


def preset(name: str, /, **changes: Any) -> SceneConfig:
    """Returns the preset of a name, with some fields of `SceneConfig` changed.

    Raises:
        ConfigError: There is no such preset, or no such field.
    """
    require(name in PRESETS, f"a preset among {sorted(PRESETS)}", repr(name))
    unknown = sorted(set(changes) - set(SceneConfig.__dataclass_fields__))
    require(not unknown, f"settings among {list(SceneConfig.__dataclass_fields__)}", unknown)
    return dataclasses.replace(PRESETS[name], **changes)


_LARGER: dict[str, Any] = {"object_sizes": (1.0, 1.6), "zoom": 1.25, "spawn_extent": 3.0, "spawn_height": (1.0, 3.0)}
PRESETS: dict[str, SceneConfig] = {
    "a": SceneConfig(),
    "a_zoom": SceneConfig(name="a_zoom", resolution=64, frames=12, max_objects=7, **_LARGER),
    "c": SceneConfig(name="c", textured=True),
}
"""Settings by name.

``a``: plain colours on a grey floor (like MOVi-A). ``a_zoom``: the same at 64x64 with at most 7 objects that fill 13 to
17 % of the pixels, so that small models learn in minutes. ``c``: textured objects, floor and wall (like MOVi-C).
"""
