"""Renders scenes by casting rays at exact shapes: colours, soft shadows, highlights and instance masks.

Images are ``(H, s, W, s)`` with s rays along each side of a pixel, so that averaging over axes 1 and 3 gives pixels,
and patterns within a pixel broadcast. Vectors are sequences of three numbers or images.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssync_pl.data.synthetic.config import SceneConfig
from ssync_pl.data.synthetic.scene import CUBE, SPHERE, Array, Scene, Solid, sample_scene

_TAN = 32.0 / 2.0 / 35.0  # of half the angle of view: sensor and focal length of MOVi
_NEAR = 0.05
_WALL = 15.0  # distance from the origin to the wall of textured scenes, world units
_FLOOR_ALBEDO, _SKY = 0.36, (0.60, 0.62, 0.66)
_KEY, _FILL, _AMBIENT = 0.85, 0.14, 0.28  # brightness of the main light, each fill, and the surroundings
_PENUMBRA = 0.03  # radius of the main light as an angle in radians
_FADE = 22.0  # world units from the origin after which the plain floor fades into the sky
_BLOCKED_SKY = 0.9  # how much of the surroundings' light an object takes from the floor under it
_CORNERS = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]).T
# linear light to 8-bit sRGB; 4096 steps are finer than the darkest 8-bit step after the root
_TO_SRGB = np.round((np.arange(4096) / 4095.0) ** (1.0 / 2.2) * 255.0).astype(np.uint8)

_Box = tuple[slice, slice]  # rows and columns of pixels


def render_video(config: SceneConfig, seed: int, index: int) -> dict[str, Array]:
    """Renders video number ``index`` of a data set with exact instance masks, equal for equal arguments.

    Returns ``video`` uint8 ``(F, H, W, 3)``, sRGB, and ``segmentations`` uint8 ``(F, H, W, 1)``: 0 is background, 1 the
    object with most visible pixels over the clip, and so on.
    """
    scene = sample_scene(config, seed, index)
    stage, centres = _Stage(scene, config), _Camera(scene.camera, config, 1)
    video = np.stack([stage.picture(solids) for solids in scene.frames])
    ids = np.stack([centres.cast(solids)[1][:, 0, :, 0] for solids in scene.frames])
    count = len(scene.frames[0])
    # a stable sort, so that ties (objects never seen) have one answer
    order = np.argsort(-np.bincount(ids.ravel(), minlength=count + 1)[1:], kind="stable")
    renamed = np.zeros(count + 1, np.uint8)
    renamed[order + 1] = np.arange(1, count + 1)
    return {"video": video, "segmentations": renamed[ids][..., None]}


class _Camera:
    """A pinhole camera that looks at the origin, upright."""

    def __init__(self, place: Array, config: SceneConfig, rays: int) -> None:
        self.place, self.size, self.half_width = place, config.resolution, _TAN / config.zoom
        forward = -place / np.sqrt((place * place).sum())
        right = np.array([forward[1], -forward[0], 0.0]) / math.hypot(forward[0], forward[1])
        self.basis = np.stack([right, np.cross(right, forward), forward])
        count = self.size * rays
        slopes = ((np.arange(count) + 0.5) / count * 2.0 - 1.0) * self.half_width
        self.slopes: Array = slopes.reshape(self.size, rays).astype(np.float32)

    def rays(self, box: _Box, rotation: Array | None = None) -> list[Array]:
        """Returns the directions of a box's rays, in the world or in the frame of an object with this rotation."""
        basis = self.basis if rotation is None else self.basis @ rotation
        u, v = self.slopes[box[1]], -self.slopes[box[0]][:, :, None, None]
        return [upward * v + (forward + right * u) for right, upward, forward in basis.T.tolist()]

    def box(self, corners: Array) -> _Box:
        """Returns a box that holds the picture of all between some points ``(3, P)``."""
        right, up, forward = self.basis @ (corners - self.place[:, None])
        if (forward < _NEAR).any():
            return (slice(0, self.size if (forward > 0.0).any() else 0),) * 2
        places = ((np.stack([-up, right]) / forward / self.half_width + 1.0) * 0.5 * self.size).tolist()
        # a little slack against rounding
        ends = [(math.floor(min(row) - 0.01), math.ceil(max(row) + 0.01)) for row in places]
        rows, columns = (slice(max(0, low), max(0, min(self.size, high))) for low, high in ends)
        return rows, columns

    def cast(self, solids: list[Solid]) -> tuple[Array, Array, list[tuple[_Box, list[Array]]]]:
        """Returns the depth and the object (1-based, 0 for none) of every ray, and each object's box and rays in it."""
        depth = np.full(self.slopes.shape * 2, np.inf, np.float32)
        hits = np.zeros(depth.shape, np.uint8)
        views = []
        for k, solid in enumerate(solids, start=1):
            rows, columns = box = self.box(solid.centre[:, None] + solid.bound * _CORNERS)
            rays = self.rays(box, solid.rotation)
            views.append((box, rays))
            origin = ((self.place - solid.centre) @ solid.rotation).tolist()
            entry = _intersect(solid, origin, rays)
            nearer = entry < depth[rows, :, columns]
            depth[rows, :, columns][nearer] = entry[nearer]
            hits[rows, :, columns][nearer] = k
        return depth, hits, views


class _Stage:
    """What stays over the clip: camera, lamps, and the picture without objects, split by what a shadow takes away."""

    def __init__(self, scene: Scene, config: SceneConfig) -> None:
        self.scene, self.key = scene, scene.key
        self.camera = _Camera(scene.camera, config, config.antialias)
        side = np.cross(self.key, [1.0, 0.0, 0.0])
        side /= np.sqrt((side * side).sum())
        steps = ((np.arange(config.antialias) + 0.5) / config.antialias * 2.0 - 1.0) * _PENUMBRA
        moves = side[:, None, None] * steps[:, None] + np.cross(self.key, side)[:, None, None] * steps
        # mirrored, so that light and ray do not step the same way: shadow edges would alias
        spread = self.key[:, None, None] + moves[:, :, ::-1]
        # a direction to the main light for each ray of a pixel: averaging the pixel gives soft shadows
        self.spread = (spread / np.sqrt((spread * spread).sum(0))).astype(np.float32)
        # the floor, and the wall or sky behind it
        ox, oy, oz = self.camera.place.tolist()
        dx, dy, dz = self.camera.rays((slice(None), slice(None)))
        floor = dz < -1e-4
        distance = np.where(floor, -oz / np.where(floor, dz, np.float32(-1.0)), np.float32(1e4))
        if scene.ground is not None:
            a, b = dx * dx + dy * dy, ox * dx + oy * dy
            to_wall = (np.sqrt(b * b - a * (ox * ox + oy * oy - _WALL**2)) - b) / a
            floor = floor & (distance < to_wall)
            distance = np.where(floor, distance, to_wall)
        x, y, z = ox + distance * dx, oy + distance * dy, oz + distance * dz
        self.x, self.y, self.floor, reach = x, y, floor, x * x + y * y
        # lamps near the middle: brightness falls off towards the edges of the stage
        pool = 0.45 + 0.55 / (1.0 + reach * np.float32(1.0 / 110.0))
        ambient_light = (_AMBIENT + float((_FILL * scene.fills[:, 2]).sum())) * pool
        direct_light = _KEY * float(self.key[2]) * pool
        if scene.ground is None:
            fade = np.exp(reach * np.float32(-1.0 / _FADE**2)) * floor
            sky = np.array([0.4 * part for part in _SKY], np.float32).reshape(3, 1, 1, 1, 1)
            self.ambient = _FLOOR_ALBEDO * ambient_light * fade + sky * (1.0 - fade)
            self.direct = _FLOOR_ALBEDO * direct_light * fade
        else:
            colours = np.zeros((3, *x.shape), np.float32)
            colours[:, floor] = scene.ground[0](x[floor], y[floor], np.zeros_like(x[floor]))
            colours[:, ~floor] = scene.ground[1](x[~floor], y[~floor], z[~floor])
            glow = np.float32(0.35) + np.clip(z * np.float32(0.06), 0.0, 0.4)
            # pale albedo keeps textured floors from swallowing dark objects
            albedo = 0.08 + 0.8 * colours
            self.ambient = np.where(floor, albedo * ambient_light, (0.1 + 0.8 * colours) * glow)
            self.direct = np.where(floor, albedo * direct_light, np.float32(0.0))

    def picture(self, solids: list[Solid]) -> Array:
        """Returns a frame as 8-bit sRGB ``(H, W, 3)``."""
        depth, hits, views = self.camera.cast(solids)
        lit, open_sky = np.ones((2, *hits.shape), np.float32)
        for solid in solids:
            if solid.centre[2] + solid.bound > 0.0:
                self._shadow_floor(solid, lit)
                self._cover_sky(solid, open_sky)
        light = self.ambient * open_sky
        light += self.direct * lit
        for k, ((rows, columns), rays) in enumerate(views):
            chosen = np.nonzero(hits[rows, :, columns] == k + 1)
            if chosen[0].size:
                met = [part[chosen] for part in rays]
                colours = self._shade_object(solids, k, met, depth[rows, :, columns][chosen], chosen)
                light[:, rows, :, columns][:, chosen[0], chosen[1], chosen[2], chosen[3]] = colours
        rays_per_side = light.shape[2]
        total: Any = sum(light[:, :, i, :, j] for i in range(rays_per_side) for j in range(rays_per_side))
        steps = np.clip(total * (4095.0 / (rays_per_side * rays_per_side)) + 0.5, 0.0, 4095.0).astype(np.intp)
        return np.ascontiguousarray(_TO_SRGB[steps].transpose(1, 2, 0))

    def _shadow_floor(self, solid: Solid, lit: Array) -> None:
        """Darkens the floor in a solid's shadow."""
        key, height = self.key, float(solid.centre[2])
        flat = np.array([key[0], key[1], 0.0]) / max(float(np.hypot(key[0], key[1])), 1e-6)
        across = np.array([-flat[1], flat[0], 0.0])
        slack = _PENUMBRA * 2.0 * abs(height) / float(key[2]) ** 2
        long, wide = solid.bound / float(key[2]) + slack, solid.bound + slack
        middle = solid.centre - key * (height / key[2])
        (rows, columns), x, y, floor = self._floor_around(solid, middle, long * flat, wide * across)
        start = [_dot(axis, (x, y, -height)) for axis in solid.rotation.T.tolist()]
        entry = _intersect(solid, start, list(self._to_light(solid)[:, None, :, None, :]))
        lit[rows, :, columns][np.isfinite(entry) & floor] = 0.0

    def _cover_sky(self, solid: Solid, open_sky: Array) -> None:
        """Darkens the floor beneath a solid, which hides the sky from it."""
        height, half = float(solid.centre[2]), solid.half
        reach = 2.5 * half
        if height < reach:
            beneath = solid.centre * [1.0, 1.0, 0.0]
            (rows, columns), x, y, floor = self._floor_around(solid, beneath, *(reach * np.eye(3)[:2]))
            height = max(height, half)
            squared = x * x + y * y + np.float32(height * height)
            # share of the sky that a ball takes from a point: cosine times squared radius over squared distance,
            # minus its value at the box's edge, so that it ends without a step
            share = np.float32(height * half * half) / (squared * np.sqrt(squared))
            edge = height * half * half / (reach * reach + height * height) ** 1.5
            taken = np.clip(share - np.float32(edge), 0.0, 1.0) * floor
            open_sky[rows, :, columns] *= 1.0 - _BLOCKED_SKY * taken

    def _floor_around(self, solid: Solid, middle: Array, long: Array, wide: Array) -> tuple[_Box, Array, Array, Array]:
        """Returns the box of a parallelogram, the way there from beneath a solid, and which rays meet the floor."""
        corners = [middle + i * long + j * wide for i in (-1, 1) for j in (-1, 1)]
        rows, columns = box = self.camera.box(np.stack(corners, 1))
        x, y, floor = (part[rows, :, columns] for part in (self.x, self.y, self.floor))
        return box, x - float(solid.centre[0]), y - float(solid.centre[1]), floor

    def _to_light(self, solid: Solid) -> Array:
        """Returns the directions ``(3, s, s)`` to the main light in a solid's own frame."""
        return np.tensordot(solid.rotation.T.astype(np.float32), self.spread, 1)

    def _shade_object(
        self, solids: list[Solid], k: int, ray: Sequence[Array], depth: Array, chosen: tuple[Array, ...]
    ) -> Array:
        """Returns the light ``(3, P)`` of P rays that meet an object, in whose own frame they are."""
        solid = solids[k]
        # everything in the object's frame: normals are simple there
        origin = ((self.camera.place - solid.centre) @ solid.rotation).tolist()
        point = [start + depth * step for start, step in zip(origin, ray, strict=True)]
        facing = _normal(solid, *point)
        z_axis, key = solid.rotation[2].tolist(), (self.key @ solid.rotation).tolist()
        rising = _dot(z_axis, facing)
        slope = np.maximum(_dot(key, facing), 0.0) * ~self._shadowed(solids, k, point, chosen)
        diffuse = _KEY * slope
        for fill in (self.scene.fills @ solid.rotation).tolist():
            diffuse = diffuse + _FILL * np.maximum(_dot(fill, facing), 0.0)
        height = np.maximum(_dot(z_axis, point) + float(solid.centre[2]), 0.0)
        # less light reaches what faces a near floor
        diffuse = diffuse + _AMBIENT * (0.5 + 0.5 * rising + 0.3 * (1.0 - rising) * height / (height + solid.half))
        towards = 1.0 / np.sqrt(_dot(ray, ray))
        cosine = _dot(ray, facing) * towards
        mirror = [step * towards - 2.0 * cosine * out for step, out in zip(ray, facing, strict=True)]
        gleam = np.maximum(_dot(key, mirror), 0.0)
        colours = solid.surface(*point)
        if not solid.metal:
            shine = 0.10 * (gleam**12 * (slope > 0.0))
            return np.stack([colour * diffuse + shine for colour in colours]).astype(np.float32)
        blend = np.clip(0.5 + 1.2 * _dot(z_axis, mirror), 0.0, 1.0)
        glare = 0.8 * (gleam**90 * (slope > 0.0))
        # a metal mirrors the floor below and the sky above, tinted by its colour, brighter at grazing angles
        rim = (1.0 + cosine) ** 4
        out = []
        for colour, sky in zip(colours, _SKY, strict=True):
            around = 0.22 + (sky - 0.22) * blend
            tint = colour * 0.85 + 0.06
            out.append(colour * 0.5 * diffuse + (tint + (1.0 - tint) * 0.4 * rim) * around * 0.75 + glare)
        return np.stack(out).astype(np.float32)

    def _shadowed(self, solids: list[Solid], k: int, point: Sequence[Array], chosen: tuple[Array, ...]) -> Array:
        """Returns which points of an object lie in the shadow of another one."""
        dark = np.zeros(point[0].shape, bool)
        for other in solids[:k] + solids[k + 1 :]:
            away = other.centre - solids[k].centre
            along, reach = float(away @ self.key), other.bound + solids[k].bound
            beside = float(away @ away) - along * along
            # it must lie towards the light, and near enough to the line to it
            if along >= -reach and beside <= (reach + _PENUMBRA * 2.0 * abs(along)) ** 2:
                turn = (solids[k].rotation.T @ other.rotation).T.tolist()
                shift = (-away @ other.rotation).tolist()
                start = [_dot(row, point) + offset for row, offset in zip(turn, shift, strict=True)]
                dark |= np.isfinite(_intersect(other, start, list(self._to_light(other)[:, chosen[1], chosen[3]])))
        return dark


def _intersect(solid: Solid, origin: Sequence[Any], ray: Sequence[Any]) -> Array:
    """Returns where rays in a solid's own frame enter it, in lengths of their directions; infinity where they miss."""
    (ox, oy, oz), (dx, dy, dz), half = origin, ray, solid.half
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if solid.shape == CUBE:
            spans = [_between_planes(o, d, half) for o, d in zip(origin, ray, strict=True)]
        else:
            a, b, c = dx * dx + dy * dy, ox * dx + oy * dy, ox * ox + oy * oy
            if solid.shape == SPHERE:
                a, b, c = a + dz * dz, b + oz * dz, c + oz * oz
            root = np.sqrt(b * b - a * (c - half * half))
            spans = [((-b - root) / a, (root - b) / a)]
            spans += [] if solid.shape == SPHERE else [_between_planes(oz, dz, half)]
        enter, leave = spans[0]
        for low, high in spans[1:]:
            enter, leave = np.maximum(enter, low), np.minimum(leave, high)
        # comparisons with NaN are false, so rays that miss fall out here
        return np.where((enter <= leave) & (enter > 0.0), enter, np.float32(np.inf))


def _between_planes(origin: Any, ray: Any, half: float) -> tuple[Any, Any]:
    inverse = 1.0 / np.asarray(ray)
    near, far = (-half - origin) * inverse, (half - origin) * inverse
    return np.minimum(near, far), np.maximum(near, far)


def _normal(solid: Solid, x: Array, y: Array, z: Array) -> tuple[Array, Array, Array]:
    """Returns the outward normals at points on a solid's surface, in its own frame."""
    if solid.shape == SPHERE:
        scale = 1.0 / solid.half
        return x * scale, y * scale, z * scale
    if solid.shape == CUBE:
        ax, ay, az = np.abs(x), np.abs(y), np.abs(z)
        on_x = (ax >= ay) & (ax >= az)
        on_y = ~on_x & (ay >= az)
        return np.sign(x) * on_x, np.sign(y) * on_y, np.sign(z) * ~(on_x | on_y)
    rho = np.sqrt(x * x + y * y)
    cap = np.abs(z) >= rho
    scale = ~cap / np.maximum(rho, np.float32(1e-6))
    return x * scale, y * scale, np.sign(z) * cap


def _dot(a: Sequence[Any], b: Sequence[Any]) -> Any:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
