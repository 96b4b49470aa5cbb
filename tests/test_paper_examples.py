"""examples/paper: published settings, parsed by the command line as they are."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml

from ssync_pl.cli import main

PAPER = Path(__file__).resolve().parents[1] / "examples" / "paper"
# What the configurations published with SSync resolve to
TABLE = {
    "movi_c": {
        "slots": (11, 64),
        "backbone": "vit_small_patch14_dinov2.lvd142m",
        "features": 384,
        "hidden": [1024, 1024, 1024],
        "steps": 100_000,
        "batch": (2, 64, 16),
        "clip": (4, 336, "none", 0.5),
        "masks": (True, "ids", 10),
        "threshold": 0.7,
        "contrast": 0.5,
        "shards": (305, 8),
    },
    "movi_e": {
        "slots": (15, 128),
        "backbone": "vit_base_patch14_dinov2.lvd142m",
        "features": 768,
        "hidden": [1024, 1024, 1024],
        "steps": 300_000,
        "batch": (2, 64, 4),
        "clip": (4, 336, "none", 0.5),
        "masks": (True, "ids", 23),
        "threshold": 0.65,
        "contrast": 0.5,
        "shards": (305, 8),
    },
    "ytvis2021": {
        "slots": (7, 64),
        "backbone": "vit_base_patch14_dinov2.lvd142m",
        "features": 768,
        "hidden": [1024, 1024, 1024],
        "steps": 100_000,
        "batch": (2, 64, 1),
        "clip": (4, 518, "random", 0.0),
        "masks": (False, "channels", 25),
        "threshold": 0.6,
        "contrast": 0.5,
        "shards": (84, 30),
    },
    "coco": {
        "slots": (7, 64),
        "backbone": "vit_small_patch14_dinov2.lvd142m",
        "features": 384,
        "hidden": [2048, 2048, 2048],
        "steps": 100_000,
        "batch": (1, 128, 32),
        "clip": (1, 224, "random", 0.5),
        "masks": (False, "channels", 63),
        "threshold": 0.9,
        "contrast": 0.0,
        "shards": (463, 20),
    },
}


@pytest.fixture
def parse(capsys):
    def run(*names):
        words = [word for name in names for word in ("--config", str(PAPER / f"{name}.yaml"))]
        assert main(["fit", *words, "--print_config"]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    return run


def test_every_file_is_in_the_table():
    assert {path.stem for path in PAPER.glob("*.yaml")} == {*TABLE, "without_ssync"}


@pytest.mark.parametrize("name", TABLE)
def test_published_settings(parse, name):
    expected, config = TABLE[name], parse(name)
    model = config["model"]["init_args"] | config["model"].get("dict_kwargs", {})
    data, trainer = config["data"]["init_args"], config["trainer"]
    assert config["model"]["class_path"].endswith("SlotContrast")
    assert (model["num_slots"], model["slot_dim"]) == expected["slots"]
    assert (model["slot_init"], model["backbone"], model["layer"]) == ("learned", expected["backbone"], "vit_block12")
    assert (model["encoder_hidden"], model["corrector_mlp_hidden"]) == (2 * expected["features"], 4 * model["slot_dim"])
    assert (model["iterations_first"], model["iterations_later"]) == (3, 2)
    assert (model["decoder"], model["decoder_hidden"]) == ("mlp", expected["hidden"])
    assert (model["predictor_blocks"], model["predictor_heads"]) == (1, 4)
    assert (model["reconstruction_weight"], model["similarity_weight"]) == (1.0, 0.0)
    assert (model["contrast_weight"], model["contrast_temperature"]) == (expected["contrast"], 0.1)
    assert (model["learning_rate"], model["warmup_steps"], model["decay_rate"]) == (8e-4, 2500, 0.5)
    assert model["decay_steps"] is None
    assert (trainer["max_steps"], trainer["gradient_clip_val"]) == (expected["steps"], 0.05)
    assert trainer["precision"] == "16-mixed"
    assert (trainer["devices"], data["batch_size"], data["val_batch_size"]) == expected["batch"]
    clip = (data["clip_length"], data["image_size"], data["crop"], data["flip_probability"])
    assert clip == expected["clip"]
    assert (data["has_background"], data["mask_format"], data["max_objects"]) == expected["masks"]
    assert model["has_background"] == data["has_background"]
    assert data["sampling"] == "reference"
    patch = int(re.search(r"patch(\d+)", model["backbone"]).group(1))
    assert model["grid"] == [data["image_size"] // patch] * 2
    assert math.prod(model["grid"]) in (256, 576, 1369)
    for pattern, count in zip((data["train"], data["validation"]), expected["shards"], strict=True):
        first, last = re.search(r"\{(\d+)\.\.(\d+)\}", pattern).groups()
        assert int(last) - int(first) + 1 == count
    callback = trainer["callbacks"][0]
    assert callback["class_path"].endswith("SSyncCallback")
    assert callback["init_args"]["merge_threshold"] == expected["threshold"]
    assert callback["init_args"]["warmup_ratio"] == 0.3
    assert {callback["init_args"][key] for key in ("n_bd", "n_nbd", "n_noise", "temperature")} == {1}
    assert callback["init_args"]["relative_weight"] is None


@pytest.mark.parametrize("name", TABLE)
def test_the_overlay_takes_ssync_away_and_nothing_else(parse, name):
    config, without = parse(name), parse(name, "without_ssync")
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][1:]
    for part in ("seed_everything", "trainer", "model", "data"):
        assert config[part] == without[part]
