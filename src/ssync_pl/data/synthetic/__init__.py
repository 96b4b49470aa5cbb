"""Synthetic rigid-body videos with exact instance masks: a MOVi-like data set that needs no download."""

from ssync_pl.data.synthetic.config import PRESETS, SceneConfig, preset
from ssync_pl.data.synthetic.dataset import dataset_folder, generate
from ssync_pl.data.synthetic.render import render_video

__all__ = ["PRESETS", "SceneConfig", "dataset_folder", "generate", "preset", "render_video"]
