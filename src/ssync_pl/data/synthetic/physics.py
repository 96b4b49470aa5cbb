"""Rigid bodies that fall, bounce, slide, roll and push each other, with NumPy only.

Bodies are spheres, cubes and cylinders (about the z axis of their own frame) of one half-size ``h``. Contacts are
springs with dampers: stiffness follows from the time step, so that the fastest contact stays well inside the stability
limit of the symplectic Euler scheme; damping follows from the restitution. Angular momentum, not angular velocity, is
integrated, so that free rotation conserves it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

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


def bounds(shapes: Array, half: Array) -> Array:
    """Returns the radii of bounding spheres."""
    return np.array([1.0, math.sqrt(3.0), math.sqrt(2.0)])[shapes] * half


class World:
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
        bound = bounds(shape, half)
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
