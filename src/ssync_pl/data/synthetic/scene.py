"""Draws a scene from a seed: objects and their motion, materials, lights and the camera's path."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssync_pl.data.synthetic.config import SceneConfig
from ssync_pl.data.synthetic.physics import Bodies, Trajectory, simulate
from ssync_pl.data.synthetic.shapes import BOUNDS, SHAPES
from ssync_pl.data.synthetic.textures import SolidTexture, random_texture
from ssync_pl.errors import ConfigError

__all__ = ["COLOURS", "FOCAL", "SENSOR", "WALL_RADIUS", "Material", "Scene", "sample_scene"]

FOCAL, SENSOR = 35.0, 32.0
"""Focal length and sensor width in millimetres; only their ratio counts."""

WALL_RADIUS = 15.0
"""Distance from the origin to the wall of textured scenes, world units."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "blue": (45, 80, 215),
    "brown": (130, 76, 28),
    "cyan": (45, 205, 208),
    "gray": (85, 85, 87),
    "green": (32, 112, 26),
    "purple": (130, 42, 190),
    "red": (178, 36, 36),
    "yellow": (250, 232, 50),
}
"""Names and 8-bit sRGB values of the plain object colours."""

_MATERIALS = ("rubber", "metal")
_RESTITUTION, _DENSITY, _FRICTION = (0.3, 0.7), (1.1, 2.7), (0.5, 0.25)
_PLACEMENT_TRIES = 200

_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Material:
    """How one object reflects light.

    Args:
        name: ``"rubber"`` or ``"metal"``.
        colour_name: A key of ``COLOURS``, or ``"textured"``.
        colour: Linear RGB in [0, 1]; the mean colour for textured objects.
        texture: Colour by point, or None for one plain colour.

    Example:
        >>> Material("metal", "red", (0.4, 0.02, 0.02), None).name
        'metal'
    """

    name: str
    colour_name: str
    colour: tuple[float, float, float]
    texture: SolidTexture | None


@dataclass(frozen=True)
class Scene:
    """All that a renderer needs.

    Args:
        bodies: Shapes and physical properties of n objects.
        path: Their states at every frame.
        materials: One an object.
        camera: Camera positions ``(F, 3)``, or ``(1, 3)`` for a static one; it looks at the origin.
        light: Unit direction towards the main light ``(3,)``.
        fills: Unit directions towards lights without shadow ``(2, 3)``.
        floor: Texture of the floor, or None for grey.
        wall: Texture of the wall, or None for no wall.

    Example:
        >>> sample_scene(SceneConfig(frames=2), seed=0, index=0).path.position.shape[0]
        2
    """

    bodies: Bodies
    path: Trajectory
    materials: tuple[Material, ...]
    camera: _Array
    light: _Array
    fills: _Array
    floor: SolidTexture | None
    wall: SolidTexture | None


def sample_scene(config: SceneConfig, seed: int, index: int) -> Scene:
    """Draw one scene and simulate it.

    Motion, looks and camera come from separate streams of random numbers, so that two settings that differ in looks
    alone show the same motion.

    Args:
        config: Settings.
        seed: Seed of the data set, at least 0.
        index: Number of the video, at least 0.

    Returns:
        The scene, equal for equal arguments.

    Raises:
        ConfigError: A seed or index is negative, or the objects do not fit where they start.

    Example:
        >>> plain, textured = SceneConfig(frames=2), SceneConfig(frames=2, textured=True)
        >>> one, other = sample_scene(plain, 0, 5), sample_scene(textured, 0, 5)
        >>> bool((one.path.position == other.path.position).all())
        True
    """
    for name, value in (("seed", seed), ("index", index)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise ConfigError(f"Expected argument `{name}` to be a whole number, 0 or more, but got {value!r}.")
    streams = np.random.SeedSequence(entropy=int(seed), spawn_key=(int(index),)).spawn(3)
    motion, looks, view = (np.random.default_rng(stream) for stream in streams)
    bodies, metal, position = _sample_bodies(config, motion)
    rotation = np.stack([_random_rotation(motion) for _ in metal])
    velocity = np.zeros_like(position)
    velocity[:, :2] = motion.uniform(-config.max_speed, config.max_speed, (len(metal), 2)) - position[:, :2]
    path = simulate(bodies, position, rotation, velocity, config.frames, config.fps)
    materials = tuple(
        _sample_material(config, looks, bool(shiny), float(half))
        for shiny, half in zip(metal, bodies.half, strict=True)
    )
    return Scene(
        bodies=bodies,
        path=path,
        materials=materials,
        camera=_camera_path(config, view),
        light=_direction(view, (0.0, -0.75, 1.15)),
        fills=np.stack([_direction(view, (0.9, 0.3, 0.7)), _direction(view, (-0.7, 0.5, 0.8))]),
        floor=random_texture(looks, 0.8) if config.textured else None,
        wall=random_texture(looks, 0.3) if config.textured else None,
    )


def _sample_bodies(config: SceneConfig, rng: np.random.Generator) -> tuple[Bodies, _Array, _Array]:
    wanted = int(rng.integers(config.min_objects, config.max_objects + 1))
    shapes = rng.integers(0, len(SHAPES), wanted)
    half = rng.choice(config.object_sizes, wanted) * 0.5
    metal = rng.integers(0, 2, wanted)
    bound = np.asarray(BOUNDS)[shapes] * half
    centres: list[_Array] = []
    for k in range(wanted):
        centre = _free_place(config, rng, centres, bound)
        if centre is None and k < config.min_objects:
            raise ConfigError(
                f"Expected {config.min_objects} objects of sizes {config.object_sizes} to fit apart where they "
                f"start, but only {k} did with spawn_extent={config.spawn_extent:g} and "
                f"spawn_height={config.spawn_height}. "
                "Raise `spawn_extent`, or lower `object_sizes` or `min_objects`."
            )
        if centre is None:
            break
        centres.append(centre)
    count = len(centres)
    shapes, half, metal = shapes[:count], half[:count], metal[:count]
    restitution, density, friction = (np.array(pair)[metal] for pair in (_RESTITUTION, _DENSITY, _FRICTION))
    return Bodies(shapes, half, density, restitution, friction), metal, np.stack(centres)


def _free_place(config: SceneConfig, rng: np.random.Generator, taken: list[_Array], bound: _Array) -> _Array | None:
    own = bound[len(taken)]
    extent, (low, high) = config.spawn_extent, config.spawn_height
    for _ in range(_PLACEMENT_TRIES):
        centre = rng.uniform((-extent, -extent, low), (extent, extent, high))
        centre[2] = max(centre[2], own + 0.01)
        if all(((centre - other) ** 2).sum() > (own + bound[i]) ** 2 for i, other in enumerate(taken)):
            return centre
    return None


def _random_rotation(rng: np.random.Generator) -> _Array:
    w, x, y, z = (q := rng.normal(size=4)) / np.sqrt((q * q).sum())
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _sample_material(config: SceneConfig, rng: np.random.Generator, metal: bool, half: float) -> Material:
    name = list(COLOURS)[int(rng.integers(len(COLOURS)))]
    red, green, blue = ((value / 255.0) ** 2.2 for value in COLOURS[name])
    if not config.textured:
        return Material(_MATERIALS[metal], name, (red, green, blue), None)
    texture = random_texture(rng, 1.1 / half)
    red, green, blue = texture.palette.mean(0).tolist()
    return Material(_MATERIALS[metal], "textured", (red, green, blue), texture)


def _direction(rng: np.random.Generator, towards: tuple[float, float, float]) -> _Array:
    vector = np.array(towards) + rng.normal(0.0, 0.12, 3)
    return vector / np.sqrt((vector * vector).sum())


def _camera_path(config: SceneConfig, rng: np.random.Generator) -> _Array:
    start = np.array([7.48113, -6.50764, 5.34367]) + rng.uniform(0.0, 1.0, 3)
    side = float(rng.choice([-1.0, 1.0]))
    heading = rng.uniform(-0.4, 0.4)
    if config.camera_motion == "static":
        return start[None]
    way = np.linspace(-0.5, 0.5, config.frames) * side * config.camera_travel
    radius = math.hypot(start[0], start[1])
    if config.camera_motion == "orbit":
        angle = math.atan2(start[1], start[0]) + way / radius
        return np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full_like(way, start[2])], -1)
    # across the view, turned a little up or down: never towards the objects
    across = np.array([-start[1], start[0], 0.0]) / radius
    return start + way[:, None] * (math.cos(heading) * across + math.sin(heading) * np.array([0.0, 0.0, 0.4]))
