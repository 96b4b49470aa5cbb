"""`ssync-pl config convert` and `ssync-pl checkpoint`, and what they write under `ssync-pl fit` and `validate`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from public_configs import TEXTS, write_config

from ssync_pl.cli import main
from ssync_pl.data.shards import ShardWriter
from ssync_pl.errors import ConfigError
from ssync_pl.hosts import SlotContrast, VideoSAUR
from ssync_pl.tools.official.checkpoints import convert_checkpoint
from ssync_pl.tools.official.convert import host_options

RECORDED = Path(__file__).parents[2] / "hosts" / "recorded"
CACHED = {"backbone": None, "layer": None, "feature_dim": 12, "similarity_dim": 12, "similarity_layer": None}


def _official(name: str, folder: Path) -> Path:
    with np.load(RECORDED / f"{name}.npz", allow_pickle=False) as file:
        state = {key[6:]: torch.from_numpy(file[key]) for key in file.files if key.startswith("state/")}
    torch.save(
        {"state_dict": state, "global_step": 9, "callbacks": {"m": {"dirpath": folder}}}, folder / f"{name}.ckpt"
    )
    return folder / f"{name}.ckpt"


def _flags(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in ("--set", f"{name}={json.dumps(value)}")]


@pytest.mark.parametrize("name", TEXTS)
def test_converted_configurations_parse(tmp_path, capsys, name):
    out = tmp_path / "ours.yaml"
    assert main(["config", "convert", str(write_config(tmp_path, name)), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"converted: {out}\n"
    assert main(["fit", "--config", str(out), "--print_config"]) == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    ours = yaml.safe_load(out.read_text("utf-8"))
    for part in ("model", "data"):
        options = parsed[part]["init_args"] | parsed[part].get("dict_kwargs", {})
        assert {key: options[key] for key in ours[part]["init_args"]} == ours[part]["init_args"]
    callbacks = [entry["class_path"].rpartition(".")[2] for entry in parsed["trainer"]["callbacks"]]
    assert callbacks == [entry["class_path"] for entry in ours["trainer"]["callbacks"]]


def test_convert_prints_and_lists(tmp_path, capsys):
    path = write_config(tmp_path, "ssync")
    words = ["config", "convert", str(path), "--without-ssync", "--set", "globals.SLOTS=5", "--data-root", "sets"]
    assert main(words) == 0
    printed = capsys.readouterr()
    config = yaml.safe_load(printed.out)
    assert config["model"]["init_args"]["num_slots"] == 5
    assert config["data"]["init_args"]["train"].startswith("sets/movi/")
    assert "SSyncCallback" not in printed.out
    assert "not converted: SSync's losses: left out as asked\n" in printed.err
    assert main(["config", "convert", str(write_config(tmp_path, "videosaur")), "--with-ssync"]) == 0
    assert "SSyncCallback" in capsys.readouterr().out


def test_convert_replaces_nothing_unasked(tmp_path, capsys):
    path, out = write_config(tmp_path, "srl"), tmp_path / "ours.yaml"
    out.write_text("mine")
    assert main(["config", "convert", str(path), "--out", str(out)]) == 2
    assert "Add --force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(["config", "convert", str(path), "--out", str(out), "--force"]) == 0
    assert out.read_text().startswith("# Converted from srl.yaml.")
    assert main(["config", "convert", str(tmp_path / "absent.yaml")]) == 2
    bad = write_config(tmp_path, "slotcontrast", "model.extra=1")
    assert main(["config", "convert", str(bad), "--out", str(tmp_path / "never.yaml")]) == 2
    assert "--ignore model.extra" in capsys.readouterr().err
    assert not (tmp_path / "never.yaml").exists()
    assert main(["config", "convert", str(bad), "--ignore", "model.extra"]) == 0


def test_checkpoint_show_and_convert(tmp_path, capsys):
    path = _official("srl", tmp_path)
    changes = _flags(dict(list(CACHED.items())[:4]))
    assert main(["checkpoint", "show", str(path), *changes]) == 0
    shown = capsys.readouterr().out
    assert "host:      SlotContrast" in shown
    assert "  num_slots: 4" in shown
    assert "dropped:   projector.projector.weight, projector2.projector.weight" in shown
    assert "assumed:   grid, iterations_first, iterations_later, predictor_heads" in shown
    out = tmp_path / "ours.ckpt"
    assert main(["checkpoint", "convert", str(path), str(out), *changes]) == 0
    assert capsys.readouterr().out.endswith(f"converted: {out}\n")
    before = out.read_bytes()
    assert main(["checkpoint", "convert", str(path), str(out), *changes]) == 2
    assert "Add --force" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main(["checkpoint", "show", str(_official("videosaur_movi", tmp_path))]) == 2
    assert "--set num_slots=" in capsys.readouterr().err
    assert main(["checkpoint"]) == 2


def test_a_configuration_tells_what_shapes_do_not(tmp_path):
    path, out = _official("videosaur_ytvis", tmp_path), tmp_path / "ours.ckpt"
    done = convert_checkpoint(
        path, out, described=host_options(write_config(tmp_path, "videosaur", "globals.SLOTS=4")), options=CACHED
    )
    assert (done.options["num_slots"], done.options["similarity_temperature"]) == (4, 0.2)
    assert not done.assumed
    assert VideoSAUR.load_from_checkpoint(out).similarity_temperature == 0.2
    changes = ["model.decoder.renderer.hidden_dims=[16]", "globals.RENDERED=20", "globals.SLOTS=4"]
    told = host_options(write_config(tmp_path, "videosaur", *changes))
    with pytest.raises(ConfigError, match=r"decoder_hidden is \[16, 20\] instead of \[16, 16, 16\]"):
        convert_checkpoint(path, None, described=told, options=CACHED)
    with pytest.raises(ConfigError, match="describes DINOSAUR"):
        convert_checkpoint(path, None, described=host_options(write_config(tmp_path, "dinosaur")), options=CACHED)


@pytest.fixture
def run(tmp_path):
    """A small run on shards: public configuration and checkpoint with a ViT, converted where asked."""
    pytest.importorskip("timm")
    for split, frames in (("train", 8), ("validation", 3)):
        with ShardWriter(tmp_path / "movi", f"movi-{split}") as writer:
            for number in range(2):
                generator = np.random.default_rng(number)
                ids = np.zeros((frames, 32, 32, 1), np.uint8)
                ids[:, 4:20, 4:20], ids[:, 22:, 10:] = 1, 2
                video = generator.integers(0, 255, (frames, 32, 32, 3), dtype=np.uint8)
                writer.write(str(number), {"video.npy": video, "segmentations.npy": ids})
    changes = [
        *("globals.VIT=test_vit", "globals.FEATURES=64", "globals.PATCHES=4", "globals.SLOTS=3", "globals.BATCH=2"),
        *("model.encoder.backbone.features=vit_block2", "model.encoder.backbone.pretrained=false"),
        *(f"dataset.{part}_pipeline.transforms.input_size=32" for part in ("train", "val")),
        *("dataset.train_shards=movi/movi-train-000000.tar", "dataset.num_workers=0", "dataset.num_val_workers=0"),
        *("trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.log_every_n_steps=1"),
    ]
    official = write_config(tmp_path, "ssync", *changes)
    config = tmp_path / "ours.yaml"
    assert main(["config", "convert", str(official), "--out", str(config), "--data-root", str(tmp_path)]) == 0

    def start(verb, *words):
        quiet = ["--trainer.accelerator=cpu", "--trainer.precision=32", "--trainer.enable_progress_bar=false"]
        root = f"--trainer.default_root_dir={tmp_path / 'runs'}"
        return main([verb, "--config", str(config), *words, *quiet, root])

    return start, config


def test_public_and_converted_checkpoints_validate_alike(run, tmp_path, capsys):
    start, config = run
    options = yaml.safe_load(config.read_text("utf-8"))["model"]["init_args"]
    torch.manual_seed(3)
    model = SlotContrast(**options)
    backbone = model.encoder.module.backbone
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("fingerprint")}
    name = "encoder.module.backbone.model."
    state |= {f"{name}{key}": value + 0.01 for key, value in backbone.model.state_dict().items()}
    public, ours = tmp_path / "public.ckpt", tmp_path / "converted.ckpt"
    callbacks = {"ModelCheckpoint": {"dirpath": tmp_path}}
    content = {
        "state_dict": state,
        "epoch": 1,
        "global_step": 7,
        "callbacks": callbacks,
        "loops": {"validate_loop": {"state_dict": {}}},
    }
    torch.save({**content, "pytorch-lightning_version": "1.8.6"}, public)
    assert main(["checkpoint", "convert", str(public), str(ours), "--set", "backbone=test_vit"]) == 0
    scores = []
    for path in (public, ours):
        capsys.readouterr()
        assert start("validate", "--ckpt_path", str(path)) == 0
        scores.append([line for line in capsys.readouterr().out.splitlines() if "val/" in line])
    assert len(scores[0]) >= 8
    assert scores[0] == scores[1]
    assert start("fit", "--ckpt_path", str(ours)) == 2
    assert "whole checkpoint" in capsys.readouterr().err
    torch.save(state, public)
    assert start("validate", "--ckpt_path", str(public)) == 2
    assert "whole checkpoint" in capsys.readouterr().err
    content["state_dict"]["projector.projector.weight"] = torch.ones(1)
    torch.save({**content, "pytorch-lightning_version": "1.8.6"}, public)
    assert start("validate", "--ckpt_path", str(public)) == 2
    told = capsys.readouterr().err
    assert "projector.projector.weight" in told
    assert "ssync-pl checkpoint convert" in told


def test_a_converted_configuration_trains(run):
    start, config = run
    assert start("fit") == 0
    (metrics,) = config.parent.rglob("metrics.csv")
    assert "val/video_fg_ari" in metrics.read_text("utf-8")
    (last,) = config.parent.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 2
