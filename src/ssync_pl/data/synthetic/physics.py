"""Rigid bodies that fall, bounce, slide, roll and push each other, with NumPy only.

Contacts are springs with dampers (a penalty method): stiffness follows from the time step, so that the fastest contact
stays well inside the stability limit of the symplectic Euler scheme; damping follows from the restitution. Angular
momentum, not angular velocity, is integrated, so that free rotation conserves it.
"""

from __future__ import annotations

import math

import numpy as np

from ssync_pl.data.synthetic.shapes import INERTIA, SPHERE, VOLUMES, Array, bounds, contact_balls, signed_distance

_GRAVITY = 9.81  # world units per squared second, downwards along z
_RESTITUTION, _DENSITY, _FRICTION = np.array([0.3, 0.7]), np.array([1.1, 2.7]), np.array([0.5, 0.25])  # rubber, metal
_STEPS_PER_SECOND = 240.0
_STIFFNESS = 0.45  # natural frequency of a contact times the time step; 2 would be unstable
_SPIN_LOSS = 0.3  # share of angular momentum lost per second, or spheres would roll for ever
_FAR = -1.0e6  # radius of balls that only pad an array: they never touch anything


def simulate(
    shape: Array, half: Array, metal: Array, start: tuple[Array, Array, Array], frames: int, fps: float
) -> tuple[Array, Array]:
    """Lets bodies move over a floor at z = 0, from first centres ``(n, 3)``, turns ``(n, 3, 3)`` and velocities.

    Returns centres ``(F, n, 3)`` and turns to the world ``(F, n, 3, 3)``.
    """
    world = _World(shape, half, metal, start, fps)
    positions, rotations = [world.position], [world.rotation]
    for _ in range(frames - 1):
        for _ in range(world.substeps):
            world.step()
        positions.append(world.position)
        rotations.append(world.rotation)
    return np.stack(positions), np.stack(rotations)


class _World:
    """The mutable state of a simulation and one time step of it."""

    def __init__(self, shape: Array, half: Array, metal: Array, start: tuple[Array, Array, Array], fps: float) -> None:
        self.position, self.rotation, self.velocity = (part.copy() for part in start)
        self.momentum = np.zeros_like(self.position)
        self.substeps = max(1, math.ceil(_STEPS_PER_SECOND / fps))
        self.dt = 1.0 / (fps * self.substeps)
        self.stiffness = (_STIFFNESS / self.dt) ** 2
        self.shape, self.half, self.friction = shape, half, _FRICTION[metal]
        kinds = list(zip(shape.tolist(), half.tolist(), strict=True))
        self.mass = _DENSITY[metal] * np.array([VOLUMES[code] * size**3 for code, size in kinds])
        moments = np.array([[share * size**2 for share in INERTIA[code]] for code, size in kinds])
        self.inverse_moments = 1.0 / (self.mass[:, None] * moments)
        logs = np.log(_RESTITUTION[metal])
        # damping ratio of a linear spring and damper that gives back this share of the speed
        self.damping = -logs / np.sqrt(math.pi**2 + logs**2) * 2.0 * (_STIFFNESS / self.dt)
        self.ids = np.arange(len(kinds))[:, None]
        self.first, self.second = np.triu_indices(len(kinds), 1)
        bound = bounds(shape, half)
        self.reach = (bound[self.first] + bound[self.second]) ** 2
        balls = [contact_balls(code, size) for code, size in kinds]
        padded = (len(kinds), max(len(radius) for _, radius, _ in balls))
        self.points, self.radius, self.weight = np.zeros((*padded, 3)), np.full(padded, _FAR), np.zeros(padded)
        for row, (points, radius, weight) in enumerate(balls):
            self.points[row, : len(radius)] = points
            self.radius[row, : len(radius)], self.weight[row, : len(radius)] = radius, weight
        # inscribed balls would double the force of a face that lies on the floor
        self.floor_radius = self.radius.copy()
        self.floor_radius[self.shape != SPHERE, 0] = _FAR

    def spin(self) -> Array:
        """Returns the angular velocities ``(n, 3)``."""
        local = np.matmul(self.momentum[:, None, :], self.rotation)[:, 0] * self.inverse_moments
        return np.asarray(np.matmul(self.rotation, local[:, :, None])[:, :, 0])

    def step(self) -> None:
        """Advances by one time step."""
        spin = self.spin()
        force, torque = np.zeros_like(self.velocity), np.zeros_like(self.velocity)
        offsets = np.matmul(self.points, self.rotation.transpose(0, 2, 1))
        self._touch_floor(offsets, spin, force, torque)
        self._touch_each_other(offsets, spin, force, torque)
        self.velocity += self.dt * force / self.mass[:, None]
        self.velocity[:, 2] -= self.dt * _GRAVITY
        self.momentum += self.dt * torque
        self.momentum *= 1.0 - _SPIN_LOSS * self.dt
        self.position = self.position + self.dt * self.velocity
        turned = self.rotation + self.dt * np.matmul(_skew(self.spin()), self.rotation)
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


def _cross(a: Array, b: Array) -> Array:
    # np.cross gives the same bits, slower
    out = np.empty_like(b)
    out[:, 0] = a[:, 1] * b[:, 2] - a[:, 2] * b[:, 1]
    out[:, 1] = a[:, 2] * b[:, 0] - a[:, 0] * b[:, 2]
    out[:, 2] = a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
    return out


def _skew(v: Array) -> Array:
    out = np.zeros((len(v), 3, 3))
    out[:, 2, 1], out[:, 0, 2], out[:, 1, 0] = v[:, 0], v[:, 1], v[:, 2]
    out[:, 1, 2], out[:, 2, 0], out[:, 0, 1] = -v[:, 0], -v[:, 1], -v[:, 2]
    return out
