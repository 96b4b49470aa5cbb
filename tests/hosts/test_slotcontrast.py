from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssync_pl.hosts import SlotContrast, VideoSAUR
from ssync_pl.hosts.slot_contrast import slot_contrast_loss

Build = Callable[..., Any]

# 3 slots of size 8, features of 6 channels on 2 x 3 patches, projection 16, decoder 16 and 12.
PUBLIC_PARTS = {
    "initializer.slots": (1, 3, 8),
    "processor.module.corrector.mlp.layers.0.weight": (8,),
    "processor.module.corrector.mlp.layers.0.bias": (8,),
    "processor.module.corrector.mlp.layers.1.weight": (32, 8),
    "processor.module.corrector.mlp.layers.1.bias": (32,),
    "processor.module.corrector.mlp.layers.3.weight": (8, 32),
    "processor.module.corrector.mlp.layers.3.bias": (8,),
    "decoder.module.pos_emb": (1, 1, 6, 8),
    "decoder.module.mlp.layers.0.weight": (16, 8),
    "decoder.module.mlp.layers.0.bias": (16,),
    "decoder.module.mlp.layers.2.weight": (12, 16),
    "decoder.module.mlp.layers.2.bias": (12,),
    "decoder.module.mlp.layers.4.weight": (7, 12),
    "decoder.module.mlp.layers.4.bias": (7,),
}


def test_keys_are_those_of_public_checkpoints(tiny_host: Build) -> None:
    state = {name: tuple(value.shape) for name, value in tiny_host(SlotContrast).state_dict().items()}
    shared = {
        name: tuple(value.shape)
        for name, value in tiny_host(VideoSAUR).state_dict().items()
        if not name.startswith(("initializer", "decoder"))
    }
    assert state == shared | PUBLIC_PARTS


def test_loss_is_reconstruction_plus_half_the_contrast(tiny_host: Build, feature_batch: dict[str, Tensor]) -> None:
    model = tiny_host(SlotContrast)
    loss = model.training_step(feature_batch, 0)
    out = model(feature_batch["features"])
    expected = F.mse_loss(out.reconstruction, feature_batch["features"]) + 0.5 * slot_contrast_loss(out.slots)
    torch.testing.assert_close(loss, expected)


def test_contrast_tells_slots_apart(tiny_host: Build, feature_batch: dict[str, Tensor]) -> None:
    model = tiny_host(SlotContrast)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    contrasts = []
    for _ in range(40):
        optimizer.zero_grad()
        model.training_step(feature_batch, 0).backward()
        optimizer.step()
        contrasts.append(slot_contrast_loss(model(feature_batch["features"]).slots, across_batch=False).item())
    assert contrasts[-1] < 0.5 * contrasts[0]


def test_all_options_of_the_mother_are_there(tiny_host: Build) -> None:
    model = tiny_host(SlotContrast, similarity_weight=0.2, similarity_temperature=0.5, decoder="mixer", slot_dim=16)
    assert (model.similarity_weight, model.similarity_temperature, model.contrast_weight) == (0.2, 0.5, 0.5)
    assert model.hparams.similarity_temperature == 0.5
    assert model.hparams.slot_dim == 16
    with pytest.raises(TypeError, match="slots_num"):
        tiny_host(SlotContrast, slots_num=4)


def test_command_line_knows_the_options_of_both_classes() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SlotContrast, "model")
    defaults = parser.get_defaults().model
    assert (defaults.slot_dim, defaults.decoder, defaults.contrast_weight, defaults.num_slots) == (64, "mlp", 0.5, 11)
    values = ["backbone=null", "feature_dim=6", "grid=[2, 3]", "decoder_hidden=[16]", "num_slots=3"]
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # jsonargparse before 4.49
    model = instantiate(parser.parse_args([f"--model.{value}" for value in values])).model
    assert isinstance(model, SlotContrast)
    assert model(torch.randn(1, 2, 6, 6)).slots.shape == (1, 2, 3, 64)
    with pytest.raises(jsonargparse.ArgumentError, match="nothing"):
        parser.parse_args(["--model.nothing=1"])
