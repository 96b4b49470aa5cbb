from __future__ import annotations

import numpy as np
import pytest

from ssync_pl.data.synthetic import SceneConfig, sample_scene
from ssync_pl.data.synthetic.physics import GRAVITY, Bodies, Trajectory, simulate
from ssync_pl.data.synthetic.shapes import CUBE, CYLINDER, SPHERE, contact_points


def _bodies(*shapes: int, half: float = 0.5, restitution: float = 0.5, friction: float = 0.5) -> Bodies:
    ones = np.ones(len(shapes))
    return Bodies(np.array(shapes), half * ones, ones, restitution * ones, friction * ones)


def _lowest(bodies: Bodies, path: Trajectory) -> np.ndarray:
    """Height of each body's lowest point, (F, n)."""
    columns = []
    for k in range(len(bodies.half)):
        centres, radii, _ = contact_points(int(bodies.shape[k]), float(bodies.half[k]))
        heights = path.position[:, k, 2, None] + path.rotation[:, k, 2] @ centres.T - radii
        columns.append(heights.min(-1))
    return np.stack(columns, -1)


def test_free_fall_is_a_parabola() -> None:
    velocity = np.array([[1.0, 2.0, 3.0]])
    path = simulate(_bodies(CUBE), np.array([[0.0, 0.0, 5.0]]), np.eye(3)[None], velocity, 7, 12.0)
    t = np.arange(7) / 12.0
    np.testing.assert_allclose(path.position[:, 0, 0], t, atol=1e-9)
    np.testing.assert_allclose(path.position[:, 0, 2], 5.0 + 3.0 * t - GRAVITY / 2 * t**2, atol=0.02)


@pytest.mark.parametrize("shape", [SPHERE, CUBE, CYLINDER])
@pytest.mark.parametrize("restitution", [0.3, 0.7])
def test_bounce_gives_back_about_its_share(shape: int, restitution: float) -> None:
    bodies = _bodies(shape, restitution=restitution)
    path = simulate(bodies, np.array([[0.0, 0.0, 2.0]]), np.eye(3)[None], np.zeros((1, 3)), 110, 120.0)
    speed = path.velocity[:, 0, 2]
    assert speed.max() / -speed.min() == pytest.approx(restitution, abs=0.15)


@pytest.mark.parametrize("shape", [SPHERE, CUBE, CYLINDER])
def test_everything_comes_to_rest_on_the_floor(shape: int) -> None:
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    bodies = _bodies(shape, restitution=0.3)
    path = simulate(bodies, np.array([[0.0, 0.0, 1.5]]), turn[None], np.zeros((1, 3)), 72, 12.0)
    low = _lowest(bodies, path)[-1, 0]
    assert -0.01 < low < 0.03
    assert np.abs(path.velocity[-1, 0, 2]) < 0.05


def test_friction_stops_a_sliding_cube_in_its_distance() -> None:
    bodies = _bodies(CUBE, friction=0.5)
    path = simulate(bodies, np.array([[0.0, 0.0, 0.5]]), np.eye(3)[None], np.array([[2.0, 0.0, 0.0]]), 24, 12.0)
    assert path.position[-1, 0, 0] == pytest.approx(2.0**2 / (2 * 0.5 * GRAVITY), rel=0.15)
    assert np.abs(path.velocity[-1]).max() < 0.05


def test_friction_makes_a_sphere_roll() -> None:
    path = simulate(
        _bodies(SPHERE), np.array([[0.0, 0.0, 0.5]]), np.eye(3)[None], np.array([[2.0, 0.0, 0.0]]), 12, 12.0
    )
    # rolling without sliding: 5/7 of the speed is left, and the spin matches it
    assert path.velocity[-1, 0, 0] == pytest.approx(2.0 * 5 / 7, rel=0.2)
    assert path.spin[-1, 0, 1] * 0.5 == pytest.approx(path.velocity[-1, 0, 0], rel=0.1)


def test_a_collision_keeps_momentum_and_parts_the_bodies() -> None:
    bodies = _bodies(SPHERE, CUBE, restitution=0.7)
    position = np.array([[-1.5, 0.0, 40.0], [1.0, 0.1, 40.0]])
    velocity = np.array([[6.0, 0.0, 0.0], [-2.0, 0.0, 0.0]])
    path = simulate(bodies, position, np.stack([np.eye(3)] * 2), velocity, 12, 12.0)
    momentum = (bodies.mass[:, None] * path.velocity[:, :, :2]).sum(1)
    np.testing.assert_allclose(momentum, np.broadcast_to(momentum[0], momentum.shape), atol=1e-9)
    assert path.velocity[-1, 1, 0] > 0 > path.velocity[-1, 0, 0] - path.velocity[-1, 1, 0]
    assert path.energy(bodies)[-1] < path.energy(bodies)[0]


def test_crowded_scenes_stay_sane() -> None:
    config = SceneConfig(min_objects=8, frames=24, spawn_extent=2.5, object_sizes=(0.7, 1.4))
    for index in range(6):
        scene = sample_scene(config, seed=5, index=index)
        path, bodies = scene.path, scene.bodies
        for part in (path.position, path.rotation, path.velocity, path.spin):
            assert np.isfinite(part).all()
        energy = path.energy(bodies)
        # contacts store a little energy for the moment of a recorded frame
        assert (energy[1:] <= np.minimum.accumulate(energy)[:-1] + 0.04 * energy[0]).all()
        assert _lowest(bodies, path).min() > -0.15
        unit = np.einsum("fnij,fnik->fnjk", path.rotation, path.rotation)
        np.testing.assert_allclose(unit, np.broadcast_to(np.eye(3), unit.shape), atol=1e-3)
        for i in range(len(bodies.half)):
            for j in range(i):
                gap = np.linalg.norm(path.position[:, i] - path.position[:, j], axis=-1)
                assert (gap > 0.75 * (bodies.half[i] + bodies.half[j])).all()


def _row(asleep: bool) -> Trajectory:
    """A ball that rolls at a cube and a ball behind it, which touch nothing at first, and a ball far away."""
    bodies = _bodies(SPHERE, CUBE, SPHERE, SPHERE)
    position = np.array([[-2.0, 0.0, 0.5], [0.0, 0.0, 0.5], [1.1, 0.0, 0.5], [0.0, 4.0, 0.5]])
    velocity = np.zeros((4, 3))
    velocity[0, 0] = 6.0
    mask = np.array([False, True, True, True]) if asleep else None
    return simulate(bodies, position, np.stack([np.eye(3)] * 4), velocity, 24, 24.0, mask)


def test_sleeping_bodies_hold_still_until_hit() -> None:
    path = _row(asleep=True)
    moving = (path.position != path.position[0]).any(-1)
    hit, pushed = int(moving[:, 1].argmax()), int(moving[:, 2].argmax())
    # a gap of one unit at a little under six units a second takes four frames
    assert 4 <= hit <= 7
    assert hit < pushed <= hit + 4
    assert not moving[:, 3].any()
    assert (path.rotation[:, 3] == np.eye(3)).all()
    assert (path.spin[:hit, 1] == 0.0).all()
    assert path.position[-1, 1, 0] > 0.2
    assert path.position[-1, 2, 0] > 1.3


def test_sleep_changes_little_but_the_trembling() -> None:
    np.testing.assert_allclose(_row(asleep=True).position, _row(asleep=False).position, atol=0.02)


def test_sleeping_bodies_take_their_share_of_a_hit() -> None:
    bodies = _bodies(SPHERE, SPHERE, restitution=0.7)
    position = np.array([[0.0, 0.0, 0.5], [0.0, 0.0, 2.0]])
    speed = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    path = simulate(bodies, position, np.stack([np.eye(3)] * 2), speed, 24, 24.0, np.array([True, False]))
    # the ball below may not be pushed through the floor, and the one above comes to rest on it or beside it
    assert path.position[:, 0, 2].min() > 0.4
    assert path.position[:, 1, 2].min() > 0.4
    assert path.energy(bodies)[-1] < path.energy(bodies)[0]
