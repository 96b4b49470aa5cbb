"""Draws a scene from a seed: objects, their motion and textures, camera and lamps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssync_pl.data.synthetic.config import SceneConfig, number
from ssync_pl.data.synthetic.physics import Array, World, bounds
from ssync_pl.errors import require

# blue, brown, cyan, grey, green, purple, red and yellow, in 8-bit sRGB
_COLOURS = (
    *((45, 80, 215), (130, 76, 28), (45, 205, 208), (85, 85, 87)),
    *((32, 112, 26), (130, 42, 190), (178, 36, 36), (250, 232, 50)),
)
_LAMPS = ((0.0, -0.75, 1.15), (0.9, 0.3, 0.7), (-0.7, 0.5, 0.8))  # main light and fills, about
_MAX_SPEED = 4.0  # world units per second along x and y
_TRIES = 200
_PATTERNS = ("clouds", "marble", "stripes", "checks", "dots", "rings")
_LATTICE = 16  # the noise repeats after this many cells, a power of two
_CAMERA_AZIMUTH = math.atan2(-6.0, 8.0)  # where a camera without a shell stands, about

Surface = Callable[[Array, Array, Array], Sequence[Any]]
"""Linear red, green and blue at points: numbers, or float32 arrays of the points' shape."""
_Noise = Callable[[Array, Array, Array], Array]  # in [0, 1] at points


@dataclass(frozen=True)
class Solid:
    """An object in one frame; the rotation turns its own frame to the world."""

    shape: int
    half: float
    bound: float
    metal: bool
    surface: Surface
    centre: Array
    rotation: Array


@dataclass(frozen=True)
class Scene:
    """All that a renderer needs: objects by frame, the camera's place, directions to the lamps, floor and wall."""

    frames: list[list[Solid]]
    camera: Array
    key: Array
    fills: Array
    ground: tuple[Surface, Surface] | None


def sample_scene(config: SceneConfig, seed: int, index: int) -> Scene:
    """Draws one scene and simulates it."""
    seed, index = (number(name, n, int, 0, 2**64) for name, n in (("seed", seed), ("index", index)))
    streams = np.random.SeedSequence(entropy=seed, spawn_key=(index,)).spawn(3)
    motion, looks, view = (np.random.default_rng(stream) for stream in streams)
    shape, half, metal, centres = _place(config, motion)
    turns = np.stack([_random_rotation(motion) for _ in centres])
    velocity = np.zeros_like(centres)
    velocity[:, :2] = motion.uniform(-_MAX_SPEED, _MAX_SPEED, (len(centres), 2)) - centres[:, :2]
    surfaces = [_surface(config, looks, size) for size in half.tolist()]
    same = (shape.tolist(), half.tolist(), bounds(shape, half).tolist(), (metal > 0).tolist(), surfaces)
    world = World(shape, half, metal, centres, turns, velocity, config.fps)
    frames: list[list[Solid]] = []
    while len(frames) < config.frames:
        if frames:
            world.advance()
        frames.append([Solid(*row) for row in zip(*same, world.position, world.rotation, strict=True)])
    ground = (_texture(looks, 0.8), _texture(looks, 0.3)) if config.textured else None
    camera, turn = _camera(config, view)
    key, *fills = (_lamp(view, towards, turn) for towards in _LAMPS)
    return Scene(frames, camera, key, np.stack(fills), ground)


def _place(config: SceneConfig, rng: np.random.Generator) -> list[Array]:
    """Draws shapes, half-sizes, which are of metal, and first centres at which the objects do not touch each other."""
    most = int(rng.integers(config.min_objects, config.max_objects + 1))
    shape = rng.integers(0, 3, most)
    half = rng.choice(config.object_sizes, most) * 0.5
    metal, reach = rng.integers(0, 2, most), bounds(shape, half)
    extent, (low, high) = config.spawn_extent, config.spawn_height
    centres: list[Array] = []
    for own in reach:
        for _ in range(_TRIES):
            centre = rng.uniform((-extent, -extent, low), (extent, extent, high))
            centre[2] = max(centre[2], own + 0.01)
            if all(((centre - c) ** 2).sum() > (own + b) ** 2 for c, b in zip(centres, reach, strict=False)):
                centres.append(centre)
                break
        else:  # there is no room for more
            break
    count = len(centres)
    wanted = f"{config.min_objects} objects of sizes {config.object_sizes} to fit apart where they start"
    found = f"{count} with spawn_extent={extent:g} and spawn_height={config.spawn_height}"
    advice = "Raise `spawn_extent`, or lower `object_sizes` or `min_objects`."
    require(count >= config.min_objects, wanted, found, advice=advice)
    return [shape[:count], half[:count], metal[:count], np.stack(centres)]


def _camera(config: SceneConfig, rng: np.random.Generator) -> tuple[Array, float]:
    """Draws the camera's place, and the angle about the vertical by which the lamps turn with it."""
    if config.camera_shell is None:
        place, turn = np.array([7.48113, -6.50764, 5.34367]) + rng.uniform(0.0, 1.0, 3), 0.0
    else:
        distance, azimuth = rng.uniform(*config.camera_shell), rng.uniform(0.0, 2.0 * math.pi)
        elevation = math.radians(rng.uniform(*config.camera_elevation))
        flat = distance * math.cos(elevation)
        place = np.array([flat * math.cos(azimuth), flat * math.sin(azimuth), distance * math.sin(elevation)])
        # lamps keep their side of the camera: objects seen against the light would all be dark
        turn = math.atan2(place[1], place[0]) - _CAMERA_AZIMUTH
    rng.random(2)  # moving cameras took these: without them the lamps of existing sets would stand elsewhere
    return place, turn


def _lamp(rng: np.random.Generator, towards: tuple[float, float, float], turn: float) -> Array:
    x, y, z = (vector := np.array(towards) + rng.normal(0.0, 0.12, 3)) / np.sqrt((vector * vector).sum())
    c, s = math.cos(turn), math.sin(turn)
    return np.array([c * x - s * y, s * x + c * y, z])


def _random_rotation(rng: np.random.Generator) -> Array:
    w, x, y, z = (q := rng.normal(size=4)) / np.sqrt((q * q).sum())
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _surface(config: SceneConfig, rng: np.random.Generator, half: float) -> Surface:
    colour = [(value / 255.0) ** 2.2 for value in _COLOURS[int(rng.integers(len(_COLOURS)))]]
    return _texture(rng, 1.1 / half) if config.textured else lambda *_: colour


def _texture(rng: np.random.Generator, frequency: float) -> Surface:
    """Draws a pattern in space, which turns with its object, and a palette of three colours for it."""
    pattern = _PATTERNS[int(rng.integers(len(_PATTERNS)))]
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    # neighbouring hues with one strong step of brightness look like materials, not like confetti
    hues = rng.uniform() + rng.normal(0.0, 0.12, 3)
    saturations = rng.uniform(0.15, 0.9, 3)
    values = rng.permutation([rng.uniform(0.1, 0.35), rng.uniform(0.35, 0.65), rng.uniform(0.65, 1.0)])
    wheel = np.abs((hues[:, None] + np.array([0.0, 2.0 / 3.0, 1.0 / 3.0])) % 1.0 * 6.0 - 3.0) - 1.0
    srgb = values[:, None] * (1.0 - saturations[:, None] * (1.0 - np.clip(wheel, 0.0, 1.0)))
    palette, stops = srgb**2.2, np.linspace(0.0, 1.0, 3)
    axes = (turn * frequency * rng.uniform(0.7, 1.4)).tolist()
    offset = rng.uniform(0.0, _LATTICE, 3).tolist()
    noise = _lattice_noise(rng.random(_LATTICE**3, dtype=np.float32))

    def surface(x: Array, y: Array, z: Array) -> list[Array]:
        rows = zip(axes, offset, strict=True)
        points = [(a * x + b * y + c * z + shift).astype(np.float32) for (a, b, c), shift in rows]
        value = np.clip(_pattern(pattern, noise, *points), 0.0, 1.0)
        return [np.interp(value, stops, channel).astype(np.float32) for channel in palette.T]

    return surface


def _lattice_noise(values: Array) -> _Noise:
    """Returns noise that interpolates smoothly between the values of a lattice."""

    def noise(x: Array, y: Array, z: Array) -> Array:
        cells, steps = [], []
        for part in (x, y, z):
            floor = np.floor(part)
            step = part - floor
            # the lattice is a power of two: masking wraps negative cells too, and faster than a division
            cell = floor.astype(np.int64) & (_LATTICE - 1)
            cells.append((cell, (cell + 1) & (_LATTICE - 1)))
            steps.append(step * step * (3.0 - 2.0 * step))
        total: Any = 0.0
        for i in (0, 1):
            wx = steps[0] if i else 1.0 - steps[0]
            for j in (0, 1):
                wxy = wx * (steps[1] if j else 1.0 - steps[1])
                row = (cells[0][i] * _LATTICE + cells[1][j]) * _LATTICE
                # one flat index: several would cost twice the time
                low, high = values.take(row + cells[2][0]), values.take(row + cells[2][1])
                total = total + wxy * (low + steps[2] * (high - low))
        return np.asarray(total)

    return noise


def _pattern(name: str, noise: _Noise, x: Array, y: Array, z: Array) -> Array:
    if name == "clouds":
        return (0.6 * noise(x, y, z) + 0.4 * noise(2.3 * x, 2.3 * y, 2.3 * z) - 0.5) * 1.8 + 0.5
    if name == "marble":
        return _wave(0.5 * x + 1.5 * noise(x, y, z))
    if name == "stripes":
        return (_wave(x) - 0.5) * 3.0 + 0.5 + 0.3 * (noise(x, y, z) - 0.5)
    if name == "checks":
        odd: Array = (np.floor(x) + np.floor(y) + np.floor(z)) % 2.0
        return 0.15 + 0.7 * odd + 0.3 * (noise(2.0 * x, 2.0 * y, 2.0 * z) - 0.5)
    if name == "dots":
        near = sum((part - np.floor(part) - 0.5) ** 2 for part in (x, y, z))
        return np.clip((0.16 - near) * 12.0, 0.0, 0.7) + 0.3 * noise(x, y, z)
    return _wave(np.sqrt(x * x + y * y) + 0.6 * noise(0.5 * x, 0.5 * y, 0.5 * z))


def _wave(phase: Array) -> Array:
    return np.asarray(0.5 + 0.5 * np.sin(2.0 * math.pi * phase))
