from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ssync_pl.hosts.nn.backbones import FrozenBackbone

TINY_SAVI: dict[str, Any] = {"num_slots": 3, "slot_dim": 8, "feature_dim": 8, "warmup_steps": 1}
TINY_SAVI |= {"encoder_channels": [8], "encoder_strides": [2], "decoder_channels": [8], "decoder_strides": [2]}
TINY_SAVI |= dict.fromkeys(("encoder_mlp_hidden", "corrector_mlp_hidden", "predictor_mlp_hidden"), 8)
TINY_SAVI["decoder_broadcast"] = [4, 4]


def tiny_config(root: Path, **trainer: Any) -> dict[str, Any]:
    """SAVi on four rendered videos below `root`, for two steps unless `trainer` says otherwise."""
    data = {"root": str(root), "num_train": 4, "num_validation": 2, "resolution": 16, "frames": 2}
    data |= {"generate_workers": 0, "scene": {"antialias": 1}, "batch_size": 2, "clip_length": 2, "num_workers": 0}
    return {
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_model_summary": False, **trainer},
        "model": {"class_path": "SAVi", "init_args": TINY_SAVI},
        "data": {"class_path": "SyntheticDataModule", "init_args": data},
    }


def write_tiny(path: Path, root: Path, **trainer: Any) -> Path:
    path.write_text(yaml.safe_dump(tiny_config(root, **trainer)), encoding="utf-8")
    return path


class PatchBackbone(FrozenBackbone):
    """Gives what its model makes of frames, a vector per patch."""

    def extract(self, frames: Tensor) -> tuple[Tensor, tuple[int, int]]:
        maps = self.model(frames)
        return maps.flatten(2).mT, (maps.shape[2], maps.shape[3])
