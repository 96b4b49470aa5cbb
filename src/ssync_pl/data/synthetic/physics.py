"""Rigid bodies that fall, bounce, slide, roll and push each other, with NumPy only.

Contacts are springs with dampers (a penalty method): stiffness follows from the time step, so that the fastest contact
stays well inside the stability limit of the symplectic Euler scheme; damping follows from the restitution. Angular
momentum, not angular velocity, is integrated, so that free rotation conserves it. Bodies may sleep: they stay exactly
where they are until a moving body touches them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssync_pl.data.synthetic.shapes import BOUNDS, SPHERE, contact_points, inertia, signed_distance, volume

__all__ = ["Bodies", "Trajectory", "simulate"]

GRAVITY = 9.81
"""World units a squared second, downwards along z."""

_STEPS_PER_SECOND = 240.0
_STIFFNESS = 0.45  # natural frequency of a contact times the time step; 2 would be unstable
_SPIN_LOSS = 0.3  # share of angular momentum lost a second, or spheres would roll for ever
_FAR = -1.0e6  # radius of balls that only pad an array: they never touch anything

_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Bodies:
    """The bodies of a scene."""

    shape: _Array
    half: _Array
    density: _Array
    restitution: _Array
    friction: _Array

    @property
    def mass(self) -> _Array:
        """Masses ``(n,)``."""
        return self.density * np.array([volume(int(s), float(h)) for s, h in zip(self.shape, self.half, strict=True)])

    @property
    def moments(self) -> _Array:
        """Principal moments of inertia ``(n, 3)``."""
        unit = [inertia(int(s), float(h)) for s, h in zip(self.shape, self.half, strict=True)]
        return self.mass[:, None] * np.array(unit)

    @property
    def bound(self) -> _Array:
        """Radii of the bounding spheres ``(n,)``."""
        return np.asarray(BOUNDS)[self.shape] * self.half


@dataclass(frozen=True)
class Trajectory:
    """Centres (F, n, 3) in world units and rotations from body to world (F, n, 3, 3) of all bodies at every frame."""

    position: _Array
    rotation: _Array


def simulate(
    bodies: Bodies,
    position: _Array,
    rotation: _Array,
    velocity: _Array,
    frames: int,
    fps: float,
    asleep: _Array | None = None,
) -> Trajectory:
    """Let the bodies move over an infinite floor at z = 0."""
    world = _World(bodies, position, rotation, velocity, fps, asleep)
    states = []
    for frame in range(frames):
        if frame:
            for _ in range(world.substeps):
                world.step()
        states.append((world.position.copy(), world.rotation.copy()))
    return Trajectory(np.stack([state[0] for state in states]), np.stack([state[1] for state in states]))


class _World:
    """The mutable state of a simulation and one time step of it."""

    def __init__(
        self,
        bodies: Bodies,
        position: _Array,
        rotation: _Array,
        velocity: _Array,
        fps: float,
        asleep: _Array | None,
    ) -> None:
        count = len(bodies.half)
        self.asleep = np.zeros(count, bool) if asleep is None else np.array(asleep, dtype=bool)
        self.position = np.array(position, dtype=np.float64)
        self.rotation = np.array(rotation, dtype=np.float64)
        self.velocity = np.array(velocity, dtype=np.float64)
        self.momentum = np.zeros_like(self.position)
        self.substeps = max(1, math.ceil(_STEPS_PER_SECOND / fps))
        self.dt = 1.0 / (fps * self.substeps)
        self.stiffness = (_STIFFNESS / self.dt) ** 2
        self.shape, self.half, self.friction = bodies.shape, bodies.half, bodies.friction
        self.mass = bodies.mass
        self.inverse_moments = 1.0 / bodies.moments
        logs = np.log(bodies.restitution)
        # damping ratio of a linear spring and damper that gives back this share of the speed
        self.damping = -logs / np.sqrt(math.pi**2 + logs**2) * 2.0 * (_STIFFNESS / self.dt)
        self._pad_contact_points()
        self.first, self.second = np.triu_indices(len(self.half), 1)
        self.reach = (bodies.bound[self.first] + bodies.bound[self.second]) ** 2
        self.ids = np.arange(len(self.half))[:, None]

    def _pad_contact_points(self) -> None:
        parts = [contact_points(int(s), float(h)) for s, h in zip(self.shape, self.half, strict=True)]
        count, most = len(parts), max(len(part[1]) for part in parts)
        self.points = np.zeros((count, most, 3))
        self.radius = np.full((count, most), _FAR)
        self.weight = np.zeros((count, most))
        for row, (points, radius, weight) in enumerate(parts):
            size = len(radius)
            self.points[row, :size], self.radius[row, :size], self.weight[row, :size] = points, radius, weight
        # inscribed balls would double the force of a face that lies on the floor
        self.floor_radius = self.radius.copy()
        self.floor_radius[self.shape != SPHERE, 0] = _FAR

    def spin(self) -> _Array:
        """Return the angular velocities ``(n, 3)``."""
        local = np.matmul(self.momentum[:, None, :], self.rotation)[:, 0] * self.inverse_moments
        return np.matmul(self.rotation, local[:, :, None])[:, :, 0]

    def step(self) -> None:
        """Advance by one time step."""
        spin = self.spin()
        force = np.zeros_like(self.velocity)
        torque = np.zeros_like(self.velocity)
        offsets = np.matmul(self.points, self.rotation.transpose(0, 2, 1))
        self._touch_floor(offsets, spin, force, torque)
        self._touch_each_other(offsets, spin, force, torque)
        held = np.nonzero(self.asleep)[0]
        rotation = self.rotation
        force[held], torque[held] = 0.0, 0.0
        dt = self.dt
        self.velocity += dt * force / self.mass[:, None]
        self.velocity[:, 2] -= dt * GRAVITY
        self.velocity[held] = 0.0
        self.momentum += dt * torque
        self.momentum *= 1.0 - _SPIN_LOSS * dt
        self.position += dt * self.velocity
        turned = self.rotation + dt * np.matmul(_skew(self.spin()), self.rotation)
        # one Newton step towards the nearest rotation undoes the first-order scheme's stretch
        self.rotation = 1.5 * turned - 0.5 * np.matmul(turned, np.matmul(turned.transpose(0, 2, 1), turned))
        self.rotation[held] = rotation[held]

    def _touch_floor(self, offsets: _Array, spin: _Array, force: _Array, torque: _Array) -> None:
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

    def _touch_each_other(self, offsets: _Array, spin: _Array, force: _Array, torque: _Array) -> None:
        gap = self.position[self.first] - self.position[self.second]
        awake = ~self.asleep
        near = np.nonzero(((gap * gap).sum(-1) < self.reach) & (awake[self.first] | awake[self.second]))[0]
        if not near.size:
            return
        # the balls of each against the exact surface of the other, both ways
        ball = np.concatenate([self.first[near], self.second[near]])
        other = np.concatenate([self.second[near], self.first[near]])
        relative = offsets[ball] + (self.position[ball] - self.position[other])[:, None]
        local = np.matmul(relative, self.rotation[other])
        for shape in set(self.shape[other].tolist()):
            rows = np.nonzero(self.shape[other] == shape)[0]
            distance, outward = signed_distance(shape, local[rows], self.half[other[rows], None])
            depth = self.radius[ball[rows]] - distance
            hit, point = np.nonzero(depth > 0.0)
            if not hit.size:
                continue
            rows = rows[hit]
            b, o = ball[rows], other[rows]
            direction = np.matmul(self.rotation[o], outward[hit, point][:, :, None])[:, :, 0]
            arm_b = offsets[b, point] - direction * self.radius[b, point][:, None]
            arm_o = relative[rows, point] - direction * self.radius[b, point][:, None]
            sliding = self.velocity[b] + _cross(spin[b], arm_b) - self.velocity[o] - _cross(spin[o], arm_o)
            push = self._push(
                np.minimum(depth[hit, point], 0.3 * np.minimum(self.half[b], self.half[o])),
                direction,
                sliding,
                # half, because both ways of a pair push
                0.5 * self.weight[b, point] * self.mass[b] * self.mass[o] / (self.mass[b] + self.mass[o]),
                0.5 * (self.damping[b] + self.damping[o]),
                0.5 * (self.friction[b] + self.friction[o]),
            )
            hit_b, hit_o = (self.ids == b).astype(np.float64), (self.ids == o).astype(np.float64)
            force += hit_b @ push - hit_o @ push
            torque += hit_b @ _cross(arm_b, push) - hit_o @ _cross(arm_o, push)
            pressed = push.any(-1)
            self.asleep[b[pressed]] = False
            self.asleep[o[pressed]] = False

    def _push(
        self, depth: _Array, direction: _Array, sliding: _Array, mass: _Array, damping: _Array, friction: _Array
    ) -> _Array:
        """Return the contact forces ``(m, 3)``: spring and damper along the direction, Coulomb friction across it."""
        approach = (sliding * direction).sum(-1)
        # a contact never pulls
        pressure = np.maximum(mass * (self.stiffness * depth - damping * approach), 0.0)
        across = sliding - approach[:, None] * direction
        speed = np.sqrt((across * across).sum(-1)) + 1e-9
        # near rest the friction is a damper, or it would overshoot and shake
        grip = np.minimum(friction * pressure / speed, 0.15 * mass / self.dt)
        return pressure[:, None] * direction - grip[:, None] * across


def _cross(a: _Array, b: _Array) -> _Array:
    out = np.empty_like(b)
    out[:, 0] = a[:, 1] * b[:, 2] - a[:, 2] * b[:, 1]
    out[:, 1] = a[:, 2] * b[:, 0] - a[:, 0] * b[:, 2]
    out[:, 2] = a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
    return out


def _skew(v: _Array) -> _Array:
    out = np.zeros((len(v), 3, 3))
    out[:, 2, 1], out[:, 0, 2], out[:, 1, 0] = v[:, 0], v[:, 1], v[:, 2]
    out[:, 1, 2], out[:, 2, 0], out[:, 0, 1] = -v[:, 0], -v[:, 1], -v[:, 2]
    return out
