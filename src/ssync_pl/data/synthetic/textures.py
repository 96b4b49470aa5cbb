"""Procedural solid textures: colour as a function of a 3-D point, so that a pattern turns with its object."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssync_pl.data.synthetic.shapes import Array

_LATTICE = 16  # the noise repeats after this many cells, a power of two


_PATTERNS = ("clouds", "marble", "stripes", "checks", "dots", "rings")


@dataclass(frozen=True)
class Texture:
    """A pattern in space, coloured by a palette of linear RGB ``(3, 3)``."""

    pattern: str
    palette: Array
    axes: Array
    offset: Array
    lattice: Array

    def __call__(self, x: Array, y: Array, z: Array) -> list[Array]:
        """Returns the linear red, green and blue at points, each of the points' shape, float32."""
        rows = zip(self.axes.tolist(), self.offset.tolist(), strict=True)
        points = [(a * x + b * y + c * z + shift).astype(np.float32) for (a, b, c), shift in rows]
        value = np.clip(self._value(*points), 0.0, 1.0)
        stops = np.linspace(0.0, 1.0, len(self.palette))
        return [np.interp(value, stops, channel).astype(np.float32) for channel in self.palette.T]

    def _value(self, x: Array, y: Array, z: Array) -> Array:
        if self.pattern == "clouds":
            return (0.6 * self._noise(x, y, z) + 0.4 * self._noise(2.3 * x, 2.3 * y, 2.3 * z) - 0.5) * 1.8 + 0.5
        if self.pattern == "marble":
            return _wave(0.5 * x + 1.5 * self._noise(x, y, z))
        if self.pattern == "stripes":
            return (_wave(x) - 0.5) * 3.0 + 0.5 + 0.3 * (self._noise(x, y, z) - 0.5)
        if self.pattern == "checks":
            odd: Array = (np.floor(x) + np.floor(y) + np.floor(z)) % 2.0
            return 0.15 + 0.7 * odd + 0.3 * (self._noise(2.0 * x, 2.0 * y, 2.0 * z) - 0.5)
        if self.pattern == "dots":
            near = sum((part - np.floor(part) - 0.5) ** 2 for part in (x, y, z))
            return np.clip((0.16 - near) * 12.0, 0.0, 0.7) + 0.3 * self._noise(x, y, z)
        return _wave(np.sqrt(x * x + y * y) + 0.6 * self._noise(0.5 * x, 0.5 * y, 0.5 * z))

    def _noise(self, x: Array, y: Array, z: Array) -> Array:
        """Smoothly interpolated lattice noise in [0, 1]."""
        cells, steps = [], []
        for part in (x, y, z):
            floor = np.floor(part)
            step = part - floor
            # the lattice is a power of two: masking wraps negative cells too, and faster than a division
            cell = floor.astype(np.int64) & (_LATTICE - 1)
            cells.append((cell, (cell + 1) & (_LATTICE - 1)))
            steps.append(step * step * (3.0 - 2.0 * step))
        total: Any = 0.0
        values = self.lattice.ravel()
        for i in (0, 1):
            wx = steps[0] if i else 1.0 - steps[0]
            for j in (0, 1):
                wxy = wx * (steps[1] if j else 1.0 - steps[1])
                row = (cells[0][i] * _LATTICE + cells[1][j]) * _LATTICE
                # one flat index: several would cost twice the time
                low, high = values.take(row + cells[2][0]), values.take(row + cells[2][1])
                total = total + wxy * (low + steps[2] * (high - low))
        return np.asarray(total)


def random_texture(rng: np.random.Generator, frequency: float) -> Texture:
    """Draws a texture."""
    pattern = _PATTERNS[int(rng.integers(len(_PATTERNS)))]
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    hue = rng.uniform()
    # neighbouring hues with one strong step of brightness look like materials, not like confetti
    hues = hue + rng.normal(0.0, 0.12, 3)
    saturations = rng.uniform(0.15, 0.9, 3)
    values = np.array([rng.uniform(0.1, 0.35), rng.uniform(0.35, 0.65), rng.uniform(0.65, 1.0)])
    palette = np.stack([_hsv_to_linear(*stop) for stop in zip(hues, saturations, rng.permutation(values), strict=True)])
    axes = turn * frequency * rng.uniform(0.7, 1.4)
    offset = rng.uniform(0.0, _LATTICE, 3)
    return Texture(pattern, palette, axes, offset, rng.random((_LATTICE,) * 3, dtype=np.float32))


def _hsv_to_linear(hue: float, saturation: float, value: float) -> Array:
    wheel = np.abs((np.array([0.0, 2.0 / 3.0, 1.0 / 3.0]) + hue) % 1.0 * 6.0 - 3.0) - 1.0
    srgb = value * (1.0 - saturation * (1.0 - np.clip(wheel, 0.0, 1.0)))
    return np.asarray(srgb**2.2)


def _wave(phase: Array) -> Array:
    return np.asarray(0.5 + 0.5 * np.sin(2.0 * math.pi * phase))
