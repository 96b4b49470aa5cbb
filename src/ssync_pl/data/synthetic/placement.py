"""Draws the bodies of a scene and where they start: in the air, or at rest on the floor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssync_pl.data.synthetic.config import SceneConfig
from ssync_pl.data.synthetic.physics import Bodies
from ssync_pl.data.synthetic.shapes import BOUNDS, CYLINDER, SHAPES, SPHERE
from ssync_pl.errors import ConfigError

__all__ = ["Start", "place_bodies"]

_RESTITUTION, _DENSITY, _FRICTION = (0.3, 0.7), (1.1, 2.7), (0.5, 0.25)  # rubber, metal
_PLACEMENT_TRIES = 200
_SCENE_TRIES = 20
_LYING = 0.4  # share of the cylinders at rest that lie on their side
_GAP = 0.02  # least room between objects at rest, world units
_BESIDE = 0.15  # most room between an object of a clump and the one that it stands beside

_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Start:
    """Bodies and their first state."""

    bodies: Bodies
    metal: _Array
    position: _Array
    rotation: _Array
    velocity: _Array
    asleep: _Array


def place_bodies(config: SceneConfig, rng: np.random.Generator) -> Start:
    """Draw bodies that do not touch each other, some thrown, some at rest."""
    resting = 0
    if config.thrown is None:
        wanted = int(rng.integers(config.min_objects, config.max_objects + 1))
    else:
        low, high = config.thrown
        resting = int(rng.integers(config.min_objects - low, config.max_objects - high + 1))
        wanted = resting + int(rng.integers(low, high + 1))
    shapes = rng.integers(0, len(SHAPES), wanted)
    half = rng.choice(config.object_sizes, wanted) * 0.5
    metal = rng.integers(0, 2, wanted)
    bound = np.asarray(BOUNDS)[shapes] * half
    lying = rng.random(resting) < _LYING
    flat = (shapes[:resting] == SPHERE) | ((shapes[:resting] == CYLINDER) & ~lying)
    footprint = np.where(flat, 1.0, math.sqrt(2.0)) * half[:resting]
    # one unlucky layout says little about the settings; without objects at rest, the first one counts
    for _ in range(_SCENE_TRIES if resting else 1):
        kept, centres = _on_the_floor(config, rng, half, footprint)
        settled = len(kept)
        for k in range(resting, wanted):
            centre = _free_place(config, rng, centres, bound[kept], bound[k])
            if centre is None:
                break
            kept.append(k)
            centres.append(centre)
        if len(kept) == wanted:
            break
    thrown = len(kept) - settled
    least = (0, config.min_objects) if config.thrown is None else (config.min_objects - low, config.thrown[0])
    _refuse_too_few(config, (settled, thrown), least)
    bodies = _make_bodies(shapes[kept], half[kept], metal[kept])
    position = np.stack(centres)
    turns = [_resting_rotation(rng, int(shapes[k]), bool(lying[k])) for k in kept[:settled]]
    rotation = np.stack(turns + [_random_rotation(rng) for _ in range(thrown)])
    velocity = np.zeros_like(position)
    speed = rng.uniform(-config.max_speed, config.max_speed, (thrown, 2))
    velocity[settled:, :2] = speed - position[settled:, :2]
    return Start(bodies, metal[kept], position, rotation, velocity, np.arange(len(kept)) < settled)


def _refuse_too_few(config: SceneConfig, found: tuple[int, int], least: tuple[int, int]) -> None:
    if found[0] < least[0]:
        raise ConfigError(
            f"Expected {least[0]} objects of sizes {config.object_sizes} to rest apart on the floor, but only "
            f"{found[0]} did with resting_extent={config.resting_extent:g}. "
            "Raise `resting_extent`, or lower `object_sizes` or `min_objects`."
        )
    if found[1] < least[1]:
        raise ConfigError(
            f"Expected {least[1]} objects of sizes {config.object_sizes} to fit apart where they "
            f"start, but only {found[1]} did with spawn_extent={config.spawn_extent:g} and "
            f"spawn_height={config.spawn_height}. "
            "Raise `spawn_extent`, or lower `object_sizes` or `min_objects`."
        )


def _make_bodies(shapes: _Array, half: _Array, metal: _Array) -> Bodies:
    restitution, density, friction = (np.array(pair)[metal] for pair in (_RESTITUTION, _DENSITY, _FRICTION))
    return Bodies(shapes, half, density, restitution, friction)


def _on_the_floor(
    config: SceneConfig, rng: np.random.Generator, half: _Array, footprint: _Array
) -> tuple[list[int], list[_Array]]:
    """Return which objects found room on the floor, and their centres."""
    kept: list[int] = []
    places = np.zeros((0, 2))
    for k, own in enumerate(footprint.tolist()):
        angle = rng.uniform(0.0, 2.0 * math.pi, _PLACEMENT_TRIES)
        away = np.stack([np.cos(angle), np.sin(angle)], -1)
        if kept and rng.random() < config.clumping:
            beside = rng.integers(0, len(kept), _PLACEMENT_TRIES)
            room = rng.uniform(_GAP, _BESIDE, _PLACEMENT_TRIES) + footprint[kept][beside] + own
            tries = places[beside] + away * room[:, None]
        else:
            tries = away * (config.resting_extent * np.sqrt(rng.random(_PLACEMENT_TRIES)))[:, None]
        apart = np.sqrt(((tries[:, None] - places) ** 2).sum(-1)) - (footprint[kept] + own)
        free = (apart >= _GAP).all(-1) & ((tries**2).sum(-1) <= config.resting_extent**2)
        if free.any():
            kept.append(k)
            places = np.concatenate([places, tries[free.argmax()][None]])
    return kept, [np.array([x, y, half[k]]) for k, (x, y) in zip(kept, places.tolist(), strict=True)]


def _free_place(
    config: SceneConfig, rng: np.random.Generator, taken: list[_Array], reach: _Array, own: float
) -> _Array | None:
    extent, (low, high) = config.spawn_extent, config.spawn_height
    for _ in range(_PLACEMENT_TRIES):
        centre = rng.uniform((-extent, -extent, low), (extent, extent, high))
        centre[2] = max(centre[2], own + 0.01)
        if all(((centre - other) ** 2).sum() > (own + reach[i]) ** 2 for i, other in enumerate(taken)):
            return centre
    return None


def _resting_rotation(rng: np.random.Generator, shape: int, lying: bool) -> _Array:
    """Return a turn in which a body stands or lies on the floor with its centre one half-size above it."""
    if shape == SPHERE:
        return _random_rotation(rng)
    angle = rng.uniform(0.0, 2.0 * math.pi)
    c, s = math.cos(angle), math.sin(angle)
    if lying:
        # about the vertical after a quarter turn about x; whole numbers keep the lowest points at height 0 exactly
        return np.array([[c, 0.0, s], [s, 0.0, -c], [0.0, 1.0, 0.0]])
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _random_rotation(rng: np.random.Generator) -> _Array:
    w, x, y, z = (q := rng.normal(size=4)) / np.sqrt((q * q).sum())
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
