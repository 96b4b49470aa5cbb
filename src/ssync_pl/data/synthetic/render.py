"""Renders scenes by casting rays at exact shapes: colours, shadows, highlights and instance masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ssync_pl.data.synthetic.camera import Box, Camera, look_at_origin
from ssync_pl.data.synthetic.config import SceneConfig
from ssync_pl.data.synthetic.scene import Scene, sample_scene
from ssync_pl.data.synthetic.shading import Background, Lights, paint_background, shade
from ssync_pl.data.synthetic.shapes import SHAPES, intersect

__all__ = ["render_scene", "render_video"]

_Array = npt.NDArray[Any]

# linear light to 8-bit sRGB; 4096 steps are finer than the darkest 8-bit step after the root
_TO_SRGB = np.round((np.arange(4096) / 4095.0) ** (1.0 / 2.2) * 255.0).astype(np.uint8)


def render_video(config: SceneConfig, seed: int, index: int) -> dict[str, _Array]:
    """Render one video with exact instance masks.

    Args:
        config: Settings.
        seed: Seed of the data set, at least 0.
        index: Number of the video, at least 0.

    Returns:
        ``video`` uint8 ``(F, H, W, 3)``, sRGB, and ``segmentations`` uint8 ``(F, H, W, 1)``: 0 is background, 1 the
        object with most visible pixels over the clip, and so on. Equal for equal arguments, whatever ran before.

    Raises:
        ConfigError: A seed or index is negative, or the objects do not fit where they start.
    """
    arrays, _ = render_scene(config, seed, index)
    return arrays


def render_scene(config: SceneConfig, seed: int, index: int) -> tuple[dict[str, _Array], dict[str, Any]]:
    """Render one video and describe its objects.

    Args:
        config: Settings.
        seed: Seed of the data set, at least 0.
        index: Number of the video, at least 0.

    Returns:
        The arrays of ``render_video``, and what JSON can carry: ``camera`` positions (one, or one a frame) and
        ``instances``, sorted by id, each with ``id``, ``shape``, ``material``, ``colour`` (name), ``rgb`` (linear, 0 to
        1), ``size`` (world units), ``visible_pixels`` (one a frame), ``positions`` (world, one a frame) and
        ``image_positions`` (x, y of the centre, one a frame; 0 to 1 inside the image).

    Raises:
        ConfigError: A seed or index is negative, or the objects do not fit where they start.
    """
    scene = sample_scene(config, seed, index)
    lights = Lights(scene, config.antialias)
    frames, resolution = config.frames, config.resolution
    video = np.empty((frames, resolution, resolution, 3), np.uint8)
    ids = np.empty((frames, resolution, resolution), np.uint8)
    background: Background | None = None
    cameras = [look_at_origin(place, config.zoom, resolution, config.antialias) for place in scene.camera]
    for frame in range(frames):
        camera = cameras[frame % len(cameras)]
        depth, hits, boxes = _cast(scene, camera, frame)
        if len(cameras) > 1:
            background = paint_background(scene, camera, lights, hits > 0)
        elif background is None:
            background = paint_background(scene, camera, lights)
        if config.antialias % 2:
            middle = config.antialias // 2
            ids[frame] = hits[:, middle, :, middle]
        else:
            centres = look_at_origin(camera.origin, config.zoom, resolution, 1)
            ids[frame] = _cast(scene, centres, frame)[1][:, 0, :, 0]
        video[frame] = _develop(shade(scene, camera, lights, background, frame, depth, hits, boxes))
    count = len(scene.materials)
    pixels = np.stack([np.bincount(part.ravel(), minlength=count + 1)[1:] for part in ids])
    # a stable sort, so that ties (objects never seen) have one answer
    order = np.argsort(-pixels.sum(0), kind="stable")
    renamed = np.zeros(count + 1, np.uint8)
    renamed[order + 1] = np.arange(1, count + 1)
    arrays = {"video": video, "segmentations": renamed[ids][..., None]}
    return arrays, _describe(scene, cameras, order, pixels)


def _cast(scene: Scene, camera: Camera, frame: int) -> tuple[_Array, _Array, list[Box | None]]:
    """Return the depth and the object (1-based, 0 for none) of every ray, and each object's box."""
    size, rays = camera.resolution, camera.rays
    depth = np.full((size, rays, size, rays), np.inf, np.float32)
    hits = np.zeros((size, rays, size, rays), np.uint8)
    across, up = camera.axes()
    boxes: list[Box | None] = []
    for k, (shape, half) in enumerate(zip(scene.bodies.shape.tolist(), scene.bodies.half.tolist(), strict=True)):
        centre, rotation = scene.path.position[frame, k], scene.path.rotation[frame, k]
        box = camera.ball_box(centre, float(scene.bodies.bound[k]))
        boxes.append(box)
        if box is None:
            continue
        rows, columns = box
        origin = ((camera.origin - centre) @ rotation).tolist()
        right, upward, forward = (camera.basis @ rotation).tolist()
        u, v = across[columns], up[rows]
        direction = [
            (upward[axis] * v)[:, :, None, None] + (forward[axis] + right[axis] * u)[None, None] for axis in range(3)
        ]
        entry = intersect(shape, (origin[0], origin[1], origin[2]), (direction[0], direction[1], direction[2]), half)
        before = depth[rows, :, columns]
        nearer = entry < before
        depth[rows, :, columns] = np.where(nearer, entry, before)
        hits[rows, :, columns][nearer] = k + 1
    return depth, hits, boxes


def _develop(light: _Array) -> _Array:
    """Average the rays of each pixel and convert linear light ``(3, H, s, W, s)`` to 8-bit sRGB ``(H, W, 3)``."""
    rays = light.shape[2]
    total = sum(light[:, :, i, :, j] for i in range(rays) for j in range(rays))
    steps = np.clip(np.asarray(total) * (4095.0 / (rays * rays)) + 0.5, 0.0, 4095.0).astype(np.intp)
    return np.ascontiguousarray(_TO_SRGB[steps].transpose(1, 2, 0))


def _describe(scene: Scene, cameras: list[Camera], order: _Array, pixels: _Array) -> dict[str, Any]:
    frames = range(len(scene.path.position))
    places = np.stack([cameras[f % len(cameras)].project(scene.path.position[f]) for f in frames])
    instances = []
    for rank, k in enumerate(order.tolist()):
        material = scene.materials[k]
        instances.append(
            {
                "id": rank + 1,
                "shape": SHAPES[int(scene.bodies.shape[k])],
                "material": material.name,
                "colour": material.colour_name,
                "rgb": [round(value, 5) for value in material.colour],
                "size": float(scene.bodies.half[k]) * 2.0,
                "visible_pixels": pixels[:, k].tolist(),
                "positions": scene.path.position[:, k].round(5).tolist(),
                "image_positions": places[:, k].round(5).tolist(),
            }
        )
    return {"camera": scene.camera.round(5).tolist(), "instances": instances}
