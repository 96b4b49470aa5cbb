"""Light: what the floor, the wall and the objects look like under one shadow-casting light, two fills and the sky."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssync_pl.data.synthetic.camera import Box, Camera
from ssync_pl.data.synthetic.scene import WALL_RADIUS, Patch, Scene
from ssync_pl.data.synthetic.shapes import BOUNDS, CUBE, SPHERE, intersect, normal

__all__ = ["Background", "Lights", "paint_background", "shade"]

_FLOOR_ALBEDO = 0.36
_SKY = (0.60, 0.62, 0.66)
_KEY, _FILL, _AMBIENT = 0.85, 0.14, 0.28  # brightness of the main light, each fill, and the surroundings
_PENUMBRA = 0.03  # radius of the main light as an angle in radians
_FADE = 22.0  # world units from the origin after which the plain floor fades into the sky
_BLOCKED_SKY = 0.9  # how much of the surroundings' light an object takes from the floor under it

_Array = npt.NDArray[Any]


class Lights:
    """The main light as one direction a ray of a pixel, so that averaging the pixel gives soft shadows."""

    def __init__(self, scene: Scene, rays: int) -> None:
        self.key: _Array = scene.light
        self.fills: _Array = scene.fills
        side = np.cross(self.key, [1.0, 0.0, 0.0])
        side /= np.sqrt((side * side).sum())
        steps = ((np.arange(rays) + 0.5) / rays * 2.0 - 1.0) * _PENUMBRA
        moves = side[:, None, None] * steps[:, None] + np.cross(self.key, side)[:, None, None] * steps
        # mirrored, so that light and ray do not step the same way: shadow edges would alias
        spread = self.key[:, None, None] + moves[:, :, ::-1]
        self.spread = (spread / np.sqrt((spread * spread).sum(0))).astype(np.float32)


@dataclass(frozen=True)
class Background:
    """The picture without objects, split by what a shadow takes away."""

    ambient: _Array
    direct: _Array
    x: _Array
    y: _Array
    floor: _Array


def paint_background(
    scene: Scene, camera: Camera, lights: Lights, covered: npt.NDArray[np.bool_] | None = None
) -> Background:
    """Paint the floor, and the wall or sky behind it."""
    across, up = camera.axes()
    right, upward, forward = camera.basis.tolist()
    ox, oy, oz = camera.origin.tolist()
    dx, dy, dz = (
        (upward[axis] * up)[:, :, None, None] + (forward[axis] + right[axis] * across)[None, None] for axis in range(3)
    )
    below = dz < -1e-4
    distance = np.where(below, -oz / np.where(below, dz, np.float32(-1.0)), np.float32(1e4))
    floor = below
    if scene.wall is not None:
        a, b = dx * dx + dy * dy, ox * dx + oy * dy
        to_wall = (np.sqrt(b * b - a * (ox * ox + oy * oy - WALL_RADIUS**2)) - b) / a
        floor = below & (distance < to_wall)
        distance = np.where(floor, distance, to_wall)
    x, y, z = ox + distance * dx, oy + distance * dy, oz + distance * dz
    reach = x * x + y * y
    # lamps near the middle: brightness falls off towards the edges of the stage
    pool = 0.45 + 0.55 / (1.0 + reach * np.float32(1.0 / 110.0))
    slopes = (_FILL * lights.fills[:, 2]).sum()
    ambient_light, direct_light = (_AMBIENT + float(slopes)) * pool, _KEY * float(lights.key[2]) * pool
    ambient = np.empty((3, *x.shape), np.float32)
    direct = np.empty_like(ambient)
    if scene.floor is None or scene.wall is None:
        fade = np.exp(reach * np.float32(-1.0 / _FADE**2)) * floor
        for channel in range(3):
            ambient[channel] = _FLOOR_ALBEDO * ambient_light * fade + 0.4 * _SKY[channel] * (1.0 - fade)
            direct[channel] = _FLOOR_ALBEDO * direct_light * fade
        return Background(ambient, direct, x, y, floor)
    shown = np.ones_like(floor) if covered is None else ~covered
    colours = np.zeros((3, *x.shape), np.float32)
    here = floor & shown
    colours[:, here] = scene.floor(x[here], y[here], np.zeros_like(x[here]))
    here = ~floor & shown
    colours[:, here] = scene.wall(x[here], y[here], z[here])
    for patch in scene.patches:
        _paint_patch(patch, camera, (x, y, z), shown, colours)
    glow = np.float32(0.35) + np.clip(z * np.float32(0.06), 0.0, 0.4)
    for channel in range(3):
        # pale albedo keeps textured floors from swallowing dark objects
        albedo = 0.08 + 0.8 * colours[channel]
        ambient[channel] = np.where(floor, albedo * ambient_light, (0.1 + 0.8 * colours[channel]) * glow)
        direct[channel] = np.where(floor, albedo * direct_light, 0.0)
    return Background(ambient, direct, x, y, floor)


def _paint_patch(
    patch: Patch, camera: Camera, points: tuple[_Array, _Array, _Array], shown: _Array, colours: _Array
) -> None:
    """Put a patch's colours ``(3, H, s, W, s)`` where it covers the points that are shown."""
    box = camera.ball_box(patch.centre, patch.half * BOUNDS[CUBE if patch.square else SPHERE])
    if box is None:
        return
    rows, columns = box
    away = [part[rows, :, columns] - np.float32(shift) for part, shift in zip(points, patch.centre, strict=True)]
    local = [sum(np.float32(patch.rotation[i, j]) * away[i] for i in range(3)) for j in range(3)]
    if patch.square:
        inside = np.maximum(np.maximum(np.abs(local[0]), np.abs(local[1])), np.abs(local[2])) <= patch.half
    else:
        inside = local[0] * local[0] + local[1] * local[1] + local[2] * local[2] <= patch.half**2
    inside &= shown[rows, :, columns]
    if inside.any():
        painted = patch.texture(local[0][inside], local[1][inside], local[2][inside])
        colours[:, rows, :, columns][:, inside] = painted


def shade(
    scene: Scene,
    camera: Camera,
    lights: Lights,
    background: Background,
    frame: int,
    depth: _Array,
    hits: _Array,
    boxes: list[Box | None],
) -> _Array:
    """Return the light of every ray of a frame."""
    lit = np.ones(hits.shape, np.float32)
    open_sky = np.ones(hits.shape, np.float32)
    for k in range(len(boxes)):
        _shadow_floor(scene, camera, lights, background, frame, k, lit, open_sky)
    light = background.ambient * open_sky
    light += background.direct * lit
    for k, box in enumerate(boxes):
        if box is not None:
            rows, columns = box
            chosen = np.nonzero(hits[rows, :, columns] == k + 1)
            if chosen[0].size:
                colours = _shade_object(scene, camera, lights, frame, k, box, chosen, depth)
                light[:, rows, :, columns][:, chosen[0], chosen[1], chosen[2], chosen[3]] = colours
    return light


def _shadow_floor(
    scene: Scene,
    camera: Camera,
    lights: Lights,
    background: Background,
    frame: int,
    k: int,
    lit: _Array,
    open_sky: _Array,
) -> None:
    """Darken the floor in an object's shadow (``lit``) and beneath it (``open_sky``)."""
    centre, rotation = scene.path.position[frame, k], scene.path.rotation[frame, k]
    bound, half = float(scene.bodies.bound[k]), float(scene.bodies.half[k])
    if centre[2] + bound <= 0.0:
        return
    key = lights.key
    flat = np.array([key[0], key[1], 0.0]) / max(float(np.hypot(key[0], key[1])), 1e-6)
    square = np.array([-flat[1], flat[0], 0.0])
    fall = centre - key * (centre[2] / key[2])
    slack = _PENUMBRA * 2.0 * abs(float(centre[2])) / float(key[2]) ** 2
    long, wide = bound / float(key[2]) + slack, bound + slack
    corners = np.stack([fall + i * long * flat + j * wide * square for i in (-1, 1) for j in (-1, 1)])
    box = camera.floor_box(corners)
    if box is not None:
        rows, columns = box
        x = background.x[rows, :, columns] - float(centre[0])
        y = background.y[rows, :, columns] - float(centre[1])
        z = -float(centre[2])
        m = rotation.tolist()
        start = [m[0][axis] * x + m[1][axis] * y + m[2][axis] * z for axis in range(3)]
        towards = np.tensordot(rotation.T.astype(np.float32), lights.spread, 1)[:, None, :, None, :]
        entry = intersect(
            int(scene.bodies.shape[k]), (start[0], start[1], start[2]), (towards[0], towards[1], towards[2]), half
        )
        lit[rows, :, columns][np.isfinite(entry) & background.floor[rows, :, columns]] = 0.0
    under = 2.5 * half
    if centre[2] < under:
        ground = np.array([centre[0], centre[1], 0.0])
        box = camera.floor_box(ground + under * np.array([[-1, -1, 0], [-1, 1, 0], [1, -1, 0], [1, 1, 0]]))
        if box is not None:
            rows, columns = box
            x = background.x[rows, :, columns] - float(centre[0])
            y = background.y[rows, :, columns] - float(centre[1])
            height = max(float(centre[2]), half)
            squared = x * x + y * y + np.float32(height * height)
            # share of the sky that a ball takes from a point: cosine times squared radius over squared distance,
            # minus its value at the box's edge, so that it ends without a step
            share = np.float32(height * half * half) / (squared * np.sqrt(squared))
            edge = height * half * half / (under * under + height * height) ** 1.5
            taken = np.clip(share - np.float32(edge), 0.0, 1.0) * background.floor[rows, :, columns]
            open_sky[rows, :, columns] *= 1.0 - _BLOCKED_SKY * taken


def _shade_object(
    scene: Scene,
    camera: Camera,
    lights: Lights,
    frame: int,
    k: int,
    box: Box,
    chosen: tuple[_Array, ...],
    depth: _Array,
) -> _Array:
    """Return the light ``(3, P)`` of the rays of a box that meet an object."""
    rows, columns = box
    across, up = camera.axes()
    shape, half = int(scene.bodies.shape[k]), float(scene.bodies.half[k])
    centre, rotation = scene.path.position[frame, k], scene.path.rotation[frame, k]
    u, v = across[columns][chosen[2], chosen[3]], up[rows][chosen[0], chosen[1]]
    t = depth[rows, :, columns][chosen]
    # everything in the object's frame: normals are simple there
    origin = ((camera.origin - centre) @ rotation).tolist()
    right, upward, forward = (camera.basis @ rotation).tolist()
    ray = [forward[axis] + right[axis] * u + upward[axis] * v for axis in range(3)]
    point = [origin[axis] + t * ray[axis] for axis in range(3)]
    facing = normal(shape, point[0], point[1], point[2], half)
    z_axis = rotation[2].tolist()
    nz = sum(z_axis[axis] * facing[axis] for axis in range(3))
    key = (lights.key @ rotation).tolist()
    slope = np.maximum(sum(key[axis] * facing[axis] for axis in range(3)), 0.0)
    slope = slope * ~_shadowed(scene, lights, frame, k, point, chosen)
    diffuse = _KEY * slope
    for fill in (lights.fills @ rotation).tolist():
        diffuse = diffuse + _FILL * np.maximum(sum(fill[axis] * facing[axis] for axis in range(3)), 0.0)
    height = np.maximum(sum(z_axis[axis] * point[axis] for axis in range(3)) + float(centre[2]), 0.0)
    # less light reaches what faces a near floor
    diffuse = diffuse + _AMBIENT * (0.5 + 0.5 * nz + 0.3 * (1.0 - nz) * height / (height + half))
    towards = 1.0 / np.sqrt(ray[0] * ray[0] + ray[1] * ray[1] + ray[2] * ray[2])
    cosine = sum(ray[axis] * facing[axis] for axis in range(3)) * towards
    mirror = [ray[axis] * towards - 2.0 * cosine * facing[axis] for axis in range(3)]
    gleam = np.maximum(sum(key[axis] * mirror[axis] for axis in range(3)), 0.0)
    material = scene.materials[k]
    if material.texture is None:
        colours: Any = material.colour
    else:
        colours = material.texture(point[0], point[1], point[2])
    if material.name == "rubber":
        shine = 0.10 * (gleam**12 * (slope > 0.0))
        return np.stack([colours[channel] * diffuse + shine for channel in range(3)]).astype(np.float32)
    rising = sum(z_axis[axis] * mirror[axis] for axis in range(3))
    blend = np.clip(0.5 + 1.2 * rising, 0.0, 1.0)
    glare = 0.8 * (gleam**90 * (slope > 0.0))
    # a metal mirrors the floor below and the sky above, tinted by its colour, brighter at grazing angles
    rim = (1.0 + cosine) ** 4
    out = []
    for channel in range(3):
        around = 0.22 + (_SKY[channel] - 0.22) * blend
        tint = colours[channel] * 0.85 + 0.06
        out.append(colours[channel] * 0.5 * diffuse + (tint + (1.0 - tint) * 0.4 * rim) * around * 0.75 + glare)
    return np.stack(out).astype(np.float32)


def _shadowed(
    scene: Scene, lights: Lights, frame: int, k: int, point: list[_Array], chosen: tuple[_Array, ...]
) -> _Array:
    """Return which points of an object lie in the shadow of another one."""
    position, rotation, bound = scene.path.position[frame], scene.path.rotation[frame], scene.bodies.bound
    dark = np.zeros(point[0].shape, bool)
    away = position - position[k]
    along = away @ lights.key
    beside = (away * away).sum(-1) - along * along
    reach = bound + bound[k]
    # the other object must lie towards the light, and near enough to the line to it
    near = (along >= -reach) & (beside <= (reach + _PENUMBRA * 2.0 * np.abs(along)) ** 2)
    near[k] = False
    for j in np.nonzero(near)[0].tolist():
        turn = (rotation[k].T @ rotation[j]).tolist()
        shift = (-away[j] @ rotation[j]).tolist()
        start = [
            turn[0][axis] * point[0] + turn[1][axis] * point[1] + turn[2][axis] * point[2] + shift[axis]
            for axis in range(3)
        ]
        spread = np.tensordot(rotation[j].T.astype(np.float32), lights.spread, 1)[:, chosen[1], chosen[3]]
        entry = intersect(
            int(scene.bodies.shape[j]),
            (start[0], start[1], start[2]),
            (spread[0], spread[1], spread[2]),
            float(scene.bodies.half[j]),
        )
        dark |= np.isfinite(entry)
    return dark
