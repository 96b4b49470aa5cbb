from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_run import tiny_config


def comparable(root: Path) -> dict[str, Any]:
    """The tiny configuration with SSync from half of 16 steps on."""
    ssync = {"class_path": "SSyncCallback", "init_args": {"warmup_ratio": 0.5}}
    summary = {"class_path": "ValidationSummary", "init_args": {"untrained": True}}
    config = tiny_config(root, max_steps=16, log_every_n_steps=1, check_val_every_n_epoch=4)
    config["trainer"]["callbacks"] = [ssync, summary]
    return config
