from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from ssync_pl.data.synthetic import PRESETS, SceneConfig, preset, sample_scene
from ssync_pl.data.synthetic.placement import Start, place_bodies
from ssync_pl.data.synthetic.shapes import SPHERE, contact_points, signed_distance
from ssync_pl.errors import ConfigError

RESTING = [name for name, config in PRESETS.items() if config.thrown is not None]


def _start(config: SceneConfig, seed: int) -> Start:
    return place_bodies(config, np.random.default_rng(seed))


def _surface(start: Start, k: int) -> np.ndarray:
    """World points on the surface of a body, (P, 3)."""
    shape, half = int(start.bodies.shape[k]), float(start.bodies.half[k])
    points = np.random.default_rng(k).normal(size=(400, 3))
    if shape != SPHERE:
        points = np.concatenate([points, contact_points(shape, half)[0]])
    for _ in range(20):
        distance, outward = signed_distance(shape, points, np.full(len(points), half))
        points = points - distance[:, None] * outward
    return start.position[k] + points @ start.rotation[k].T


@pytest.mark.parametrize("name", RESTING)
def test_numbers_of_objects_and_of_those_at_rest(name: str) -> None:
    config = PRESETS[name]
    low, high = config.thrown or (0, 0)
    resting, thrown = [], []
    for seed in range(150):
        asleep = _start(config, seed).asleep
        resting.append(int(asleep.sum()))
        thrown.append(int((~asleep).sum()))
    assert (min(thrown), max(thrown)) == (low, high)
    assert (min(resting), max(resting)) == (config.min_objects - low, config.max_objects - high)


@pytest.mark.parametrize("name", RESTING)
def test_objects_at_rest_touch_the_floor_and_nothing_else(name: str) -> None:
    for seed in range(6):
        start = _start(PRESETS[name], seed)
        assert (start.velocity[start.asleep] == 0.0).all()
        surfaces = [_surface(start, k) for k in range(len(start.asleep))]
        for k, points in enumerate(surfaces):
            if start.asleep[k]:
                assert -1e-9 < points[:, 2].min() < 0.03
                assert np.linalg.norm(start.position[k, :2]) <= PRESETS[name].resting_extent
            else:
                assert points[:, 2].min() > 0.0
            for j in range(len(surfaces)):
                if j != k:
                    local = (points - start.position[j]) @ start.rotation[j]
                    shape, half = int(start.bodies.shape[j]), np.full(len(points), start.bodies.half[j])
                    assert signed_distance(shape, local, half)[0].min() > 0.005


def test_cylinders_at_rest_stand_and_lie() -> None:
    lying = []
    for seed in range(20):
        start = _start(PRESETS["e"], seed)
        chosen = start.asleep & (start.bodies.shape == 2)
        lying += [abs(turn[2, 2]) < 0.5 for turn in start.rotation[chosen]]
    assert 0.25 < np.mean(lying) < 0.55


def test_rotations_are_proper() -> None:
    rotation = _start(PRESETS["e"], 0).rotation
    np.testing.assert_allclose(
        rotation @ rotation.transpose(0, 2, 1), np.broadcast_to(np.eye(3), rotation.shape), atol=1e-9
    )
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0)


def test_clumping_brings_objects_close() -> None:
    gaps = []
    for clumping in (0.0, 1.0):
        config = preset("e", clumping=clumping, resting_extent=8.0)
        nearest = []
        for seed in range(8):
            start = _start(config, seed)
            places = start.position[start.asleep, :2]
            apart = np.linalg.norm(places[:, None] - places, axis=-1) + 100.0 * np.eye(len(places))
            nearest.append(apart.min(1).mean())
        gaps.append(np.mean(nearest))
    assert gaps[1] < 0.75 * gaps[0]


@pytest.mark.parametrize("name", RESTING)
def test_objects_at_rest_stay_until_something_comes_near(name: str) -> None:
    moved = 0
    for index in range(6):
        config = preset(name, frames=12)
        scene = sample_scene(config, 0, index)
        path, bound = scene.path, scene.bodies.bound
        asleep = (path.velocity[0] == 0.0).all(-1)
        assert asleep.any()
        for k in np.nonzero(asleep)[0]:
            still = (path.position[:, k] == path.position[0, k]).all(-1)
            still &= (path.rotation[:, k] == path.rotation[0, k]).all((-2, -1))
            first = len(still) if still.all() else int(still.argmin())
            # what was hit may not freeze again in its old place
            assert not still[first:].any()
            assert (path.velocity[:first, k] == 0.0).all()
            if first < len(still):
                moved += 1
                apart = np.linalg.norm(path.position[first - 1 : first + 1] - path.position[first, k], axis=-1)
                # between two frames a body covers less than this
                near = apart.min(0) < bound + bound[k] + 12.0 / config.fps
                others = (path.position[first] != path.position[0]).any(-1)
                others[k] = False
                assert (near & others).any()
        assert path.position[:, asleep, 2].min() > 0.0
    assert moved > 3


def test_a_scene_may_rest_altogether() -> None:
    config = SceneConfig(thrown=(0, 0), frames=6, min_objects=4, max_objects=6)
    path = sample_scene(config, 0, 0).path
    assert (path.position == path.position[0]).all()
    assert (path.rotation == path.rotation[0]).all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        # passes the bound of the densest packing, yet random places cannot reach it
        ({"min_objects": 21, "resting_extent": 3.2, "object_sizes": (1.6,)}, "to rest apart.*Raise `resting_extent`"),
        ({"spawn_extent": 0.1, "spawn_height": (0.0, 0.0), "thrown": (3, 3)}, "fit apart.*Raise `spawn_extent`"),
    ],
)
def test_what_does_not_fit_is_refused_quickly(changes: dict[str, Any], match: str) -> None:
    config = preset("e", **changes)
    began = time.process_time()
    with pytest.raises(ConfigError, match=match):
        _start(config, 0)
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_always_fit(name: str) -> None:
    for seed in range(100):
        assert len(_start(PRESETS[name], seed).asleep) >= PRESETS[name].min_objects
