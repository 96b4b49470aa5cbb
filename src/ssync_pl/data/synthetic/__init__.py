"""Synthetic rigid-body videos with exact instance masks: a MOVi-like data set that needs no download."""

from __future__ import annotations

from ssync_pl.data.synthetic.config import CAMERA_MOTIONS, GENERATOR_VERSION, PRESETS, SceneConfig, preset
from ssync_pl.data.synthetic.dataset import DEFAULT_SPLITS, dataset_folder, generate, split_seed
from ssync_pl.data.synthetic.render import render_scene, render_video
from ssync_pl.data.synthetic.scene import Scene, sample_scene

__all__ = [
    "CAMERA_MOTIONS",
    "DEFAULT_SPLITS",
    "GENERATOR_VERSION",
    "PRESETS",
    "Scene",
    "SceneConfig",
    "dataset_folder",
    "generate",
    "preset",
    "render_scene",
    "render_video",
    "sample_scene",
    "split_seed",
]
