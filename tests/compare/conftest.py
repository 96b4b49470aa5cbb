from pathlib import Path

import pytest
import yaml

from tiny_run import tiny_config


def comparable(root, **trainer):
    """The tiny configuration with slots drawn at random, and SSync from half of 16 steps on."""
    ssync = {"class_path": "SSyncCallback", "init_args": {"warmup_ratio": 0.5, "guard_window": 1}}
    summary = {"class_path": "ValidationSummary"}
    usual = {"max_steps": 16, "log_every_n_steps": 1, "check_val_every_n_epoch": 4, "callbacks": [ssync, summary]}
    config = tiny_config(root, **(usual | trainer))
    config["model"]["init_args"] = {**config["model"]["init_args"], "slot_init": "gaussian"}
    return config


@pytest.fixture
def tiny():
    return comparable(Path("data"))


@pytest.fixture(scope="session")
def write_config():
    """A function that writes this configuration into a folder, where its data go too, and returns its path."""

    def write(root, **trainer):
        path = root / "tiny.yaml"
        path.write_text(yaml.safe_dump(comparable(root / "data", **trainer)), encoding="utf-8")
        return path

    return write
