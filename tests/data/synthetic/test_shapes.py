from __future__ import annotations

import numpy as np
import pytest

from ssync_pl.data.synthetic.shapes import (
    BOUNDS,
    CUBE,
    CYLINDER,
    SPHERE,
    contact_points,
    inertia,
    intersect,
    normal,
    signed_distance,
    volume,
)

SHAPE_CODES = (SPHERE, CUBE, CYLINDER)


def _inside(shape: int, points: np.ndarray, half: float) -> np.ndarray:
    x, y, z = points.T
    if shape == SPHERE:
        return x**2 + y**2 + z**2 <= half**2
    if shape == CUBE:
        return np.abs(points).max(-1) <= half
    return (x**2 + y**2 <= half**2) & (np.abs(z) <= half)


@pytest.mark.parametrize("shape", SHAPE_CODES)
def test_ray_entry_agrees_with_marching(shape: int) -> None:
    rng = np.random.default_rng(shape)
    half, steps = 0.8, np.linspace(0.0, 8.0, 8001)
    for _ in range(60):
        start = rng.normal(size=3)
        start *= 3.0 / np.linalg.norm(start)
        way = rng.normal(0.0, 0.5, 3) - start
        way /= np.linalg.norm(way)
        entry = float(intersect(shape, tuple(start), tuple(np.array([part]) for part in way), half)[0])
        inside = np.nonzero(_inside(shape, start + steps[:, None] * way, half))[0]
        if len(inside) > 2:
            assert entry == pytest.approx(steps[inside[0]], abs=2e-3)
        elif not len(inside):
            # a chord shorter than a step may be missed by marching
            assert np.isinf(entry) or signed_distance(shape, start + entry * way, np.array(half))[0] < 1e-3


def test_no_entry_behind_or_from_inside() -> None:
    for shape in SHAPE_CODES:
        away = intersect(shape, (0.0, 0.0, 3.0), (0.0, 0.0, np.array([1.0])), 1.0)
        within = intersect(shape, (0.0, 0.0, 0.0), (0.1, 0.2, np.array([1.0])), 1.0)
        assert np.isinf(away).all()
        assert np.isinf(within).all()


@pytest.mark.parametrize("shape", SHAPE_CODES)
def test_distance_gradient_and_normal(shape: int) -> None:
    rng = np.random.default_rng(3 + shape)
    points = rng.normal(0.0, 1.2, (300, 3))
    half = np.full(300, 0.7)
    distance, outward = signed_distance(shape, points, half)
    assert ((distance < 0) == _inside(shape, points, 0.7)).all()
    np.testing.assert_allclose(np.linalg.norm(outward, axis=-1), 1.0, atol=1e-9)
    moved, _ = signed_distance(shape, points + 1e-5 * outward, half)
    np.testing.assert_allclose(moved - distance, 1e-5, rtol=1e-3, atol=1e-8)
    outside = distance > 0.05
    surface = points[outside] - distance[outside, None] * outward[outside]
    np.testing.assert_allclose(signed_distance(shape, surface, half[outside])[0], 0.0, atol=1e-9)
    # off edges and rims the surface normal is the distance's gradient
    facing = np.stack(normal(shape, *surface.T, 0.7), -1)
    flat = (facing * outward[outside]).sum(-1) > 0.999
    np.testing.assert_allclose(np.linalg.norm(facing, axis=-1), 1.0, atol=1e-6)
    assert flat.mean() > (0.99 if shape == SPHERE else 0.15)


@pytest.mark.parametrize("shape", SHAPE_CODES)
def test_volume_inertia_and_bounds_by_sampling(shape: int) -> None:
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (200_000, 3))
    inside = points[_inside(shape, points, 0.5)]
    assert volume(shape, 0.5) == pytest.approx(len(inside) / len(points), rel=0.02)
    squares = (inside**2).mean(0)
    expected = [squares[1] + squares[2], squares[0] + squares[2], squares[0] + squares[1]]
    np.testing.assert_allclose(inertia(shape, 0.5), expected, rtol=0.02)
    assert np.linalg.norm(inside, axis=1).max() <= BOUNDS[shape] * 0.5 + 1e-12


@pytest.mark.parametrize("shape", SHAPE_CODES)
def test_contact_balls_touch_the_surface_from_inside(shape: int) -> None:
    centres, radii, weights = contact_points(shape, 0.6)
    distance, _ = signed_distance(shape, centres, np.full(len(centres), 0.6))
    np.testing.assert_allclose(distance, -radii, atol=1e-12)
    assert (weights > 0).all()
