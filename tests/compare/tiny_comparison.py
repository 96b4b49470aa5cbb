"""A comparison that trains in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
TINY = {
    "num_slots": 3,
    "slot_dim": 8,
    "feature_dim": 8,
    "encoder_channels": [8],
    "encoder_strides": [2],
    "encoder_mlp_hidden": 8,
    "corrector_mlp_hidden": 8,
    "predictor_mlp_hidden": 8,
    "decoder_broadcast": [4, 4],
    "decoder_channels": [8],
    "decoder_strides": [2],
    "warmup_steps": 1,
}


def tiny_config(root: Path, max_steps: int = 16) -> dict[str, Any]:
    data = {
        "root": str(root),
        "num_train": 8,
        "num_validation": 2,
        "resolution": 16,
        "frames": 2,
        "generate_workers": 0,
        "scene": {"antialias": 1},
        "batch_size": 2,
        "clip_length": 2,
        "num_workers": 0,
    }
    return {
        "trainer": {
            "max_steps": max_steps,
            "accelerator": "cpu",
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "check_val_every_n_epoch": 2,
            "callbacks": [
                {"class_path": "SSyncCallback", "init_args": {"warmup_ratio": 0.5}},
                {"class_path": "ValidationSummary", "init_args": {"untrained": True}},
            ],
        },
        "model": {"class_path": "SAVi", "init_args": TINY},
        "data": {"class_path": "SyntheticDataModule", "init_args": data},
    }


def write_tiny(path: Path, root: Path, max_steps: int = 16) -> Path:
    path.write_text(yaml.safe_dump(tiny_config(root, max_steps)), encoding="utf-8")
    return path
