from __future__ import annotations

import numpy as np
import pytest

from ssync_pl.data.synthetic.textures import PATTERNS, SolidTexture, random_texture


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_varies_within_range(pattern: str) -> None:
    rng = np.random.default_rng(0)
    palette = np.array([[0.0, 0.1, 0.2], [1.0, 0.9, 0.8]])
    texture = SolidTexture(pattern, palette, np.eye(3), np.zeros(3), rng.random((16, 16, 16), dtype=np.float32))
    points = rng.uniform(-20.0, 20.0, (3, 4000)).astype(np.float32)
    red, green, _ = texture(*points)
    assert red.dtype == np.float32
    assert red.min() >= 0.0
    assert red.max() <= 1.0
    assert red.std() > 0.1
    np.testing.assert_allclose(green, 0.1 + 0.8 * red, atol=1e-5)


def test_noise_patterns_are_continuous() -> None:
    rng = np.random.default_rng(0)
    palette = np.array([[0.0] * 3, [1.0] * 3])
    lattice = rng.random((16, 16, 16), dtype=np.float32)
    points = rng.uniform(-20.0, 20.0, (3, 4000))
    # across lattice borders too, where interpolation would show its mistakes
    points[0, :500] = np.round(points[0, :500])
    for pattern in ("clouds", "marble", "rings"):
        texture = SolidTexture(pattern, palette, np.eye(3), np.zeros(3), lattice)
        before, after = (texture(points[0] + shift, points[1], points[2])[0] for shift in (-1e-3, 1e-3))
        assert np.abs(before - after).max() < 0.04


def test_textures_follow_their_seed() -> None:
    points = np.random.default_rng(1).normal(size=(3, 50))
    one, same, other = (random_texture(np.random.default_rng(seed), 1.0)(*points) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))
