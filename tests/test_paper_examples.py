"""examples/paper: published settings, parsed by the command line as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ssync_pl.cli import main

PAPER = Path(__file__).resolve().parents[1] / "examples" / "paper"
SMALL, BASE = ("vit_small_patch14_dinov2.lvd142m", 384), ("vit_base_patch14_dinov2.lvd142m", 768)
# What the configurations published with SSync resolve to: slots and their size; backbone and features; hidden sizes;
# steps; devices and batch sizes; frames, side, crop and flips; masks; merge threshold; contrast; shards
IDS, CHANNELS = (True, "ids"), (False, "channels")
TABLE = {
    "movi_c": ((11, 64), SMALL, 1024, 100_000, (2, 64, 16), (4, 336, "none", 0.5), (*IDS, 10), 0.7, 0.5, (305, 8)),
    "movi_e": ((15, 128), BASE, 1024, 300_000, (2, 64, 4), (4, 336, "none", 0.5), (*IDS, 23), 0.65, 0.5, (305, 8)),
    "ytvis2021": (
        (7, 64), BASE, 1024, 100_000, (2, 64, 1), (4, 518, "random", 0.0), (*CHANNELS, 25), 0.6, 0.5, (84, 30)
    ),
    "coco": (
        (7, 64), SMALL, 2048, 100_000, (1, 128, 32), (1, 224, "random", 0.5), (*CHANNELS, 63), 0.9, 0.0, (463, 20)
    ),
}  # fmt: skip


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
def test_published_settings_and_the_overlay_that_takes_ssync_away(parse, name):
    slots, (backbone, features), hidden, steps, batch, clip, masks, threshold, contrast, shards = TABLE[name]
    config = parse(name)
    model = config["model"]["init_args"] | config["model"].get("dict_kwargs", {})
    data, trainer = config["data"]["init_args"], config["trainer"]
    assert config["model"]["class_path"].endswith("SlotContrast")
    assert (model["num_slots"], model["slot_dim"]) == slots
    assert (model["slot_init"], model["backbone"], model["layer"]) == ("learned", backbone, "vit_block12")
    assert (model["encoder_hidden"], model["corrector_mlp_hidden"]) == (2 * features, 4 * model["slot_dim"])
    assert (model["iterations_first"], model["iterations_later"]) == (3, 2)
    assert (model["decoder"], model["decoder_hidden"]) == ("mlp", [hidden] * 3)
    assert (model["predictor_blocks"], model["predictor_heads"]) == (1, 4)
    assert (model["reconstruction_weight"], model["similarity_weight"]) == (1.0, 0.0)
    assert (model["contrast_weight"], model["contrast_temperature"]) == (contrast, 0.1)
    assert (model["learning_rate"], model["warmup_steps"], model["decay_rate"]) == (8e-4, 2500, 0.5)
    assert model["decay_steps"] is None
    assert (trainer["max_steps"], trainer["gradient_clip_val"], trainer["precision"]) == (steps, 0.05, "16-mixed")
    assert (trainer["devices"], data["batch_size"], data["val_batch_size"]) == batch
    assert (data["clip_length"], data["image_size"], data["crop"], data["flip_probability"]) == clip
    assert (data["has_background"], data["mask_format"], data["max_objects"]) == masks
    assert model["has_background"] == data["has_background"]
    assert data["sampling"] == "reference"
    assert model["grid"] == [data["image_size"] // 14] * 2
    for pattern, count in zip((data["train"], data["validation"]), shards, strict=True):
        first, last = re.search(r"\{(\d+)\.\.(\d+)\}", pattern).groups()
        assert int(last) - int(first) + 1 == count
    callback, *others = trainer["callbacks"]
    assert callback["class_path"].endswith("SSyncCallback")
    settings = callback["init_args"]
    assert [settings[key] for key in ("merge_threshold", "warmup_ratio", "relative_weight")] == [threshold, 0.3, None]
    assert {settings[key] for key in ("n_bd", "n_nbd", "n_noise", "temperature")} == {1}
    without = parse(name, "without_ssync")
    assert {**config, "trainer": {**trainer, "callbacks": others}} == without
