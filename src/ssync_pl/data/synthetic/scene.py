"""Draws a scene from a seed: objects and their motion, materials, distractors, lights and the camera's path."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ssync_pl.data.synthetic.config import SceneConfig
from ssync_pl.data.synthetic.physics import Bodies, Trajectory, simulate
from ssync_pl.data.synthetic.placement import place_bodies
from ssync_pl.data.synthetic.textures import SolidTexture, random_texture
from ssync_pl.data.synthetic.viewpoint import camera_path
from ssync_pl.errors import ConfigError

__all__ = ["COLOURS", "FOCAL", "SENSOR", "WALL_RADIUS", "Material", "Patch", "Scene", "sample_scene"]

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
_CAMERA_AZIMUTH = math.atan2(-6.0, 8.0)  # where a camera without a shell stands, about
_PATCHES_ON_THE_FLOOR, _PATCHES_REACH = 0.65, 9.0  # share, and largest distance from the origin, world units

_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Material:
    """How one object reflects light."""

    name: str
    colour_name: str
    colour: tuple[float, float, float]
    texture: SolidTexture | None


@dataclass(frozen=True)
class Patch:
    """A flat distractor: whatever of floor and wall lies within a ball or a cube is painted with another texture."""

    centre: _Array
    rotation: _Array
    half: float
    square: bool
    texture: SolidTexture


@dataclass(frozen=True)
class Scene:
    """All that a renderer needs."""

    bodies: Bodies
    path: Trajectory
    materials: tuple[Material, ...]
    camera: _Array
    light: _Array
    fills: _Array
    floor: SolidTexture | None
    wall: SolidTexture | None
    patches: tuple[Patch, ...] = ()


def sample_scene(config: SceneConfig, seed: int, index: int) -> Scene:
    """Draw one scene and simulate it."""
    for name, value in (("seed", seed), ("index", index)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise ConfigError(f"Expected argument `{name}` to be a whole number, 0 or more, but got {value!r}.")
    streams = np.random.SeedSequence(entropy=int(seed), spawn_key=(int(index),)).spawn(3)
    motion, looks, view = (np.random.default_rng(stream) for stream in streams)
    start = place_bodies(config, motion)
    path = simulate(
        start.bodies, start.position, start.rotation, start.velocity, config.frames, config.fps, start.asleep
    )
    materials = tuple(
        _sample_material(config, looks, bool(shiny), float(half))
        for shiny, half in zip(start.metal, start.bodies.half, strict=True)
    )
    floor = random_texture(looks, 0.8) if config.textured else None
    wall = random_texture(looks, 0.3) if config.textured else None
    patches: tuple[Patch, ...] = ()
    if floor is not None and wall is not None:
        materials = tuple(_camouflaged(config, looks, material, (floor, wall)) for material in materials)
        patches = _sample_patches(config, looks, materials, start.bodies.half)
    camera = camera_path(config, view)
    lights = [_direction(view, towards) for towards in ((0.0, -0.75, 1.15), (0.9, 0.3, 0.7), (-0.7, 0.5, 0.8))]
    if config.camera_shell is not None:
        # lamps keep their side of the camera: objects seen against the light would all be dark
        turn = math.atan2(camera[0, 1], camera[0, 0]) - _CAMERA_AZIMUTH
        lights = [_turned(light, turn) for light in lights]
    return Scene(
        bodies=start.bodies,
        path=path,
        materials=materials,
        camera=camera,
        light=lights[0],
        fills=np.stack(lights[1:]),
        floor=floor,
        wall=wall,
        patches=patches,
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


def _turned(direction: _Array, angle: float) -> _Array:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([c * direction[0] - s * direction[1], s * direction[0] + c * direction[1], direction[2]])


def _camouflaged(
    config: SceneConfig, rng: np.random.Generator, material: Material, grounds: tuple[SolidTexture, ...]
) -> Material:
    """Draw a material's colours towards those of one of the background's textures."""
    if not config.camouflage or material.texture is None:
        return material
    share = config.camouflage * rng.uniform()
    ground = grounds[int(rng.integers(len(grounds)))]
    palette = (1.0 - share) * material.texture.palette + share * ground.palette
    red, green, blue = palette.mean(0).tolist()
    return replace(material, colour=(red, green, blue), texture=replace(material.texture, palette=palette))


def _sample_patches(
    config: SceneConfig, rng: np.random.Generator, materials: tuple[Material, ...], half: _Array
) -> tuple[Patch, ...]:
    """Draw flat patches with textures and sizes of the scene's objects."""
    patches = []
    for _ in range(config.distractors):
        k, angle = int(rng.integers(len(materials))), rng.uniform(0.0, 2.0 * math.pi)
        if rng.random() < _PATCHES_ON_THE_FLOOR:
            away, height = _PATCHES_REACH * math.sqrt(rng.uniform()), 0.0
        else:
            away, height = WALL_RADIUS, rng.uniform(0.5, 5.0)
        turn = rng.uniform(0.0, 2.0 * math.pi)
        c, s = math.cos(turn), math.sin(turn)
        texture = materials[k].texture
        if texture is not None:
            patches.append(
                Patch(
                    centre=np.array([away * math.cos(angle), away * math.sin(angle), height]),
                    rotation=np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]),
                    # what is farther away is larger, to look alike
                    half=float(half[k]) * rng.uniform(0.8, 1.2) * (1.0 + away / WALL_RADIUS),
                    square=bool(rng.integers(2)),
                    texture=texture,
                )
            )
    return tuple(patches)
