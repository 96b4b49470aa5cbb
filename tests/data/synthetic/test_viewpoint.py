from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ssync_pl.data.synthetic import SceneConfig, preset
from ssync_pl.data.synthetic.viewpoint import camera_path


def _paths(config: SceneConfig, count: int = 60) -> list[np.ndarray]:
    return [camera_path(config, np.random.default_rng(seed)) for seed in range(count)]


def _elevation(points: np.ndarray) -> np.ndarray:
    return np.degrees(np.arcsin(points[..., 2] / np.linalg.norm(points, axis=-1)))


def test_straight_paths_start_and_end_in_the_shell() -> None:
    config = preset("e", frames=5)
    lengths = []
    for path in _paths(config):
        steps = np.diff(path, axis=0)
        np.testing.assert_allclose(steps, np.broadcast_to(steps[0], steps.shape), atol=1e-9)
        lengths.append(np.linalg.norm(path[-1] - path[0]))
        ends = np.linalg.norm(path[[0, -1]], axis=1)
        assert (ends > 7.0 - 1e-6).all()
        assert (ends < 9.0 + 1e-6).all()
        assert (_elevation(path[[0, -1]]) > 20.0 - 1e-6).all()
        assert (_elevation(path[[0, -1]]) < 65.0 + 1e-6).all()
    assert min(lengths) > 0.0
    assert max(lengths) <= 4.0 + 1e-9
    assert np.mean(lengths) == pytest.approx(2.0, abs=0.4)


def test_orbits_keep_their_distance_and_height() -> None:
    for path in _paths(preset("cluttered", frames=5)):
        assert np.ptp(np.linalg.norm(path, axis=1)) < 1e-9
        assert np.ptp(path[:, 2]) == 0.0
        assert (np.linalg.norm(np.diff(path, axis=0), axis=1) > 0.0).all()


def test_a_thin_shell_still_gives_a_path_of_its_length() -> None:
    changes: dict[str, Any] = {"camera_shell": (8.0, 8.0), "camera_elevation": (30.0, 30.0)}
    for path in _paths(preset("e", frames=3, **changes), 10):
        np.testing.assert_allclose(np.linalg.norm(path[[0, -1]], axis=1), 8.0)
        np.testing.assert_allclose(_elevation(path[[0, -1]]), 30.0)
        assert 0.0 < np.linalg.norm(path[-1] - path[0]) <= 4.0


def test_static_cameras_of_a_shell_look_from_all_sides() -> None:
    config = SceneConfig(camera_shell=(7.0, 9.0))
    places = np.concatenate(_paths(config))
    assert places.shape == (60, 3)
    quarters = {(bool(x > 0), bool(y > 0)) for x, y, _ in places}
    assert len(quarters) == 4
