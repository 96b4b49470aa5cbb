import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SAVi after two steps on synthetic videos, as `ssync-pl fit` leaves it."""
    from input_files import MODEL

    from ssync_pl.cli import main

    root = tmp_path_factory.mktemp("run")
    data = {"root": str(root / "videos"), "preset": "a", "num_train": 2, "num_validation": 1, "resolution": 16}
    data |= {"frames": 3, "num_workers": 0, "batch_size": 1, "clip_length": 2, "generate_workers": 1}
    trainer = {"accelerator": "cpu", "max_steps": 2, "enable_model_summary": False, "limit_val_batches": 0}
    trainer |= {"enable_progress_bar": False, "default_root_dir": str(root / "runs")}
    settings = {
        "trainer": trainer,
        "model": {"class_path": "SAVi", "init_args": MODEL},
        "data": {"class_path": "SyntheticDataModule", "init_args": data},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ssync-pl"])
        assert main(["fit", "--config", str(root / "tiny.yaml")]) == 0
    return next((root / "runs" / "tiny" / "version_0" / "checkpoints").glob("*.ckpt"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Callable[..., int]:
    """`ssync-pl predict` with that checkpoint."""
    from ssync_pl.cli import main

    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    return lambda *words: main(["predict", "--ckpt_path", str(checkpoint), *map(str, words)])
