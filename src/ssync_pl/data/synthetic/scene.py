"""Draws a scene from a seed: objects, their motion and textures, camera and lamps.

Objects are spheres, cubes and cylinders (about the z axis of their own frame) of one half-size ``h``: rigid bodies that
fall, bounce, slide, roll and push each other. Contacts are springs with dampers: stiffness follows from the time step,
so that the fastest contact stays well inside the stability limit of the symplectic Euler scheme; damping follows from
the restitution. Angular momentum, not angular velocity, is integrated, so that free rotation conserves it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssync_pl.data.synthetic.config import SceneConfig, number
from ssync_pl.errors import require

Array = npt.NDArray[Any]

SPHERE, CUBE, CYLINDER = 0, 1, 2
_VOLUMES = (4.0 / 3.0 * math.pi, 8.0, 2.0 * math.pi)  # over the cubed half-size
_INERTIA = ((0.4, 0.4, 0.4), (2.0 / 3.0, 2.0 / 3.0, 2.0 / 3.0), (7.0 / 12.0, 7.0 / 12.0, 0.5))  # at unit mass and size
_GRAVITY = 9.81  # world units per squared second, downwards along z
_RESTITUTION, _DENSITY, _FRICTION = np.array([0.3, 0.7]), np.array([1.1, 2.7]), np.array([0.5, 0.25])  # rubber, metal
_STEPS_PER_SECOND = 240.0
_STIFFNESS = 0.45  # natural frequency of a contact times the time step; 2 would be unstable
_SPIN_LOSS = 0.3  # share of angular momentum lost per second, or spheres would roll for ever
_FAR = -1.0e6  # radius of balls that only pad an array: they never touch anything
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

Surface = Callable[[Array, Array, Array], Sequence[Any]]  # linear red, green and blue at points
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
    same = (shape.tolist(), half.tolist(), _bounds(shape, half).tolist(), (metal > 0).tolist(), surfaces)
    world = _World(shape, half, metal, centres, turns, velocity, config.fps)
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
    metal, reach = rng.integers(0, 2, most), _bounds(shape, half)
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


def _bounds(shapes: Array, half: Array) -> Array:
    """Returns the radii of bounding spheres."""
    return np.array([1.0, math.sqrt(3.0), math.sqrt(2.0)])[shapes] * half


class _World:
    """Bodies over a floor at z = 0, with first centres ``(n, 3)``, turns to the world ``(n, 3, 3)`` and velocities."""

    def __init__(
        self, shape: Array, half: Array, metal: Array, position: Array, rotation: Array, velocity: Array, fps: float
    ) -> None:
        self.position, self.rotation, self.velocity = position, rotation, velocity
        self.momentum = np.zeros_like(position)
        self.substeps = max(1, math.ceil(_STEPS_PER_SECOND / fps))
        self.dt = 1.0 / (fps * self.substeps)
        self.stiffness = (_STIFFNESS / self.dt) ** 2
        self.shape, self.half, self.friction = shape, half, _FRICTION[metal]
        kinds = list(zip(shape.tolist(), half.tolist(), strict=True))
        self.mass = _DENSITY[metal] * np.array([_VOLUMES[code] * size**3 for code, size in kinds])
        moments = np.array([[share * size**2 for share in _INERTIA[code]] for code, size in kinds])
        self.inverse_moments = 1.0 / (self.mass[:, None] * moments)
        logs = np.log(_RESTITUTION[metal])
        # damping ratio of a linear spring and damper that gives back this share of the speed
        self.damping = -logs / np.sqrt(math.pi**2 + logs**2) * 2.0 * (_STIFFNESS / self.dt)
        self.ids = np.arange(len(kinds))[:, None]
        self.first, self.second = np.triu_indices(len(kinds), 1)
        bound = _bounds(shape, half)
        self.reach = (bound[self.first] + bound[self.second]) ** 2
        # the balls that stand for a body in contacts: one inscribed, and its corners, which have no radius
        corners = [_corners(code, size) for code, size in kinds]
        self.points = np.zeros((len(kinds), 1 + max(map(len, corners)), 3))
        self.radius, self.weight = np.full(self.points.shape[:2], _FAR), np.zeros(self.points.shape[:2])
        self.radius[:, 0], self.weight[:, 0] = half, 1.0
        for row, (places, code) in enumerate(zip(corners, shape.tolist(), strict=True)):
            own = (row, slice(1, 1 + len(places)))
            self.points[own], self.radius[own], self.weight[own] = places, 0.0, 0.4 if code == CUBE else 0.25
        # inscribed balls would double the force of a face that lies on the floor
        self.floor_radius = self.radius.copy()
        self.floor_radius[self.shape != SPHERE, 0] = _FAR

    def advance(self) -> None:
        """Moves the bodies by the time between two frames; the arrays of before stay as they were."""
        for _ in range(self.substeps):
            self._step()

    def _spin(self) -> Array:
        """Returns the angular velocities ``(n, 3)``."""
        local = np.matmul(self.momentum[:, None, :], self.rotation)[:, 0] * self.inverse_moments
        return np.asarray(np.matmul(self.rotation, local[:, :, None])[:, :, 0])

    def _step(self) -> None:
        spin = self._spin()
        force, torque = np.zeros_like(self.velocity), np.zeros_like(self.velocity)
        offsets = np.matmul(self.points, self.rotation.transpose(0, 2, 1))
        self._touch_floor(offsets, spin, force, torque)
        self._touch_each_other(offsets, spin, force, torque)
        self.velocity += self.dt * force / self.mass[:, None]
        self.velocity[:, 2] -= self.dt * _GRAVITY
        self.momentum += self.dt * torque
        self.momentum *= 1.0 - _SPIN_LOSS * self.dt
        self.position = self.position + self.dt * self.velocity
        x, y, z = self._spin().T
        zero = np.zeros_like(x)
        turning = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3)
        turned = self.rotation + self.dt * np.matmul(turning, self.rotation)
        # one Newton step towards the nearest rotation undoes the first-order scheme's stretch
        self.rotation = 1.5 * turned - 0.5 * np.matmul(turned, np.matmul(turned.transpose(0, 2, 1), turned))

    def _touch_floor(self, offsets: Array, spin: Array, force: Array, torque: Array) -> None:
        depth = self.floor_radius - offsets[:, :, 2] - self.position[:, None, 2]
        body, point = np.nonzero(depth > 0.0)
        if not body.size:
            return
        arm = offsets[body, point]
        arm[:, 2] -= self.floor_radius[body, point]
        push = self._push(
            depth[body, point],
            np.broadcast_to([0.0, 0.0, 1.0], arm.shape),
            self.velocity[body] + _cross(spin[body], arm),
            self.mass[body] * self.weight[body, point],
            self.damping[body],
            self.friction[body],
        )
        hit = (self.ids == body).astype(np.float64)
        force += hit @ push
        torque += hit @ _cross(arm, push)

    def _touch_each_other(self, offsets: Array, spin: Array, force: Array, torque: Array) -> None:
        gap = self.position[self.first] - self.position[self.second]
        near = np.nonzero((gap * gap).sum(-1) < self.reach)[0]
        # the balls of each against the exact surface of the other, both ways
        ball = np.concatenate([self.first[near], self.second[near]])
        other = np.concatenate([self.second[near], self.first[near]])
        relative = offsets[ball] + (self.position[ball] - self.position[other])[:, None]
        local = np.matmul(relative, self.rotation[other])
        for shape in set(self.shape[other].tolist()):
            rows = np.nonzero(self.shape[other] == shape)[0]
            distance, outward = _signed_distance(shape, local[rows], self.half[other[rows], None])
            depth = self.radius[ball[rows]] - distance
            hit, point = np.nonzero(depth > 0.0)
            if not hit.size:
                continue
            rows = rows[hit]
            b, o = ball[rows], other[rows]
            direction = np.matmul(self.rotation[o], outward[hit, point][:, :, None])[:, :, 0]
            inset = direction * self.radius[b, point][:, None]
            arm_b, arm_o = offsets[b, point] - inset, relative[rows, point] - inset
            push = self._push(
                np.minimum(depth[hit, point], 0.3 * np.minimum(self.half[b], self.half[o])),
                direction,
                self.velocity[b] + _cross(spin[b], arm_b) - self.velocity[o] - _cross(spin[o], arm_o),
                # half, because both ways of a pair push
                0.5 * self.weight[b, point] * self.mass[b] * self.mass[o] / (self.mass[b] + self.mass[o]),
                0.5 * (self.damping[b] + self.damping[o]),
                0.5 * (self.friction[b] + self.friction[o]),
            )
            hit_b, hit_o = (self.ids == b).astype(np.float64), (self.ids == o).astype(np.float64)
            force += hit_b @ push - hit_o @ push
            torque += hit_b @ _cross(arm_b, push) - hit_o @ _cross(arm_o, push)

    def _push(
        self, depth: Array, direction: Array, sliding: Array, mass: Array, damping: Array, friction: Array
    ) -> Array:
        """Returns the contact forces ``(m, 3)``: spring and damper along the direction, Coulomb friction across it."""
        approach = (sliding * direction).sum(-1)
        # a contact never pulls
        pressure = np.maximum(mass * (self.stiffness * depth - damping * approach), 0.0)
        across = sliding - approach[:, None] * direction
        speed = np.sqrt((across * across).sum(-1)) + 1e-9
        # near rest the friction is a damper, or it would overshoot and shake
        grip = np.minimum(friction * pressure / speed, 0.15 * mass / self.dt)
        return np.asarray(pressure[:, None] * direction - grip[:, None] * across)


def _signed_distance(shape: int, points: Array, half: Array) -> tuple[Array, Array]:
    """Returns the distances ``(..., P)`` of points ``(..., P, 3)`` to a shape's surface, and the ways out."""
    if shape == SPHERE:
        length = np.sqrt((points * points).sum(-1))
        return length - half, points / np.maximum(length, 1e-9)[..., None]
    rho = np.sqrt(points[..., 0] ** 2 + points[..., 1] ** 2)
    if shape == CUBE:
        faces = np.abs(points) - half[..., None]
    else:
        faces = np.stack([rho - half, np.abs(points[..., 2]) - half], -1)
    beyond = np.maximum(faces, 0.0)
    outside = np.sqrt((beyond * beyond).sum(-1))
    inside = np.minimum(faces.max(-1), 0.0)
    nearest_face = faces == faces.max(-1, keepdims=True)
    weights = np.where(outside[..., None] > 0.0, beyond / np.maximum(outside, 1e-9)[..., None], nearest_face)
    # a point on a diagonal is equally near to several faces: share, so that the direction stays of unit length
    weights = weights / np.sqrt((weights * weights).sum(-1, keepdims=True))
    if shape == CUBE:
        return outside + inside, weights * np.sign(points)
    radial = points[..., :2] / np.maximum(rho, 1e-9)[..., None]
    along = (weights[..., 1] * np.sign(points[..., 2]))[..., None]
    return outside + inside, np.concatenate([weights[..., :1] * radial, along], -1)


def _corners(shape: int, half: float) -> Array:
    """Returns the corners ``(P, 3)`` of a cube, points on the rims of a cylinder, and none for a sphere."""
    if shape == SPHERE:
        return np.zeros((0, 3))
    if shape == CUBE:
        return np.array([[x, y, z] for x in (-half, half) for y in (-half, half) for z in (-half, half)])
    angles = np.arange(12) * (2.0 * math.pi / 12.0)
    rim = np.stack([np.cos(angles), np.sin(angles), np.ones(12)], -1) * half
    return np.concatenate([rim, rim * [1.0, 1.0, -1.0]])


def _cross(a: Array, b: Array) -> Array:
    # np.cross gives the same bits, slower
    (ax, ay, az), (bx, by, bz) = a.T, b.T
    return np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], -1)
