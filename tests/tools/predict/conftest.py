import sys
from pathlib import Path

import pytest
import yaml

from ssync_pl.cli import main
from tiny_run import TINY_SAVI, tiny_config

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny SAVi after two steps on synthetic videos, as `ssync-pl fit` leaves it."""
    root = tmp_path_factory.mktemp("run")
    config = tiny_config(root / "videos", limit_val_batches=0, default_root_dir=str(root / "runs"))
    config["model"]["init_args"] = TINY_SAVI | {"slot_init": "learned"}
    (root / "tiny.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ssync-pl"])
        assert main(["fit", "--config", str(root / "tiny.yaml")]) == 0
    return next((root / "runs" / "tiny" / "version_0" / "checkpoints").glob("*.ckpt"))


@pytest.fixture
def run(monkeypatch, checkpoint):
    """`ssync-pl predict` with that checkpoint."""
    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    return lambda *words: main(["predict", "--ckpt_path", str(checkpoint), *map(str, words)])
