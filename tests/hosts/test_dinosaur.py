from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssync_pl.errors import ConfigError
from ssync_pl.hosts import DINOSAUR

Build = Callable[..., Any]
Batch = dict[str, Tensor]

# 3 slots of size 8, features of 6 channels on 2 x 3 patches, projection 16, decoder 16 and 12; no `module` anywhere.
PUBLIC = {
    "initializer.mean": (1, 1, 8),
    "initializer.log_std": (1, 1, 8),
    "encoder.output_transform.layers.0.weight": (6,),
    "encoder.output_transform.layers.0.bias": (6,),
    "encoder.output_transform.layers.1.weight": (16, 6),
    "encoder.output_transform.layers.1.bias": (16,),
    "encoder.output_transform.layers.3.weight": (8, 16),
    "encoder.output_transform.layers.3.bias": (8,),
    "processor.corrector.to_k.weight": (8, 8),
    "processor.corrector.to_v.weight": (8, 8),
    "processor.corrector.to_q.weight": (8, 8),
    "processor.corrector.gru.weight_ih": (24, 8),
    "processor.corrector.gru.weight_hh": (24, 8),
    "processor.corrector.gru.bias_ih": (24,),
    "processor.corrector.gru.bias_hh": (24,),
    "processor.corrector.mlp.layers.0.weight": (8,),
    "processor.corrector.mlp.layers.0.bias": (8,),
    "processor.corrector.mlp.layers.1.weight": (32, 8),
    "processor.corrector.mlp.layers.1.bias": (32,),
    "processor.corrector.mlp.layers.3.weight": (8, 32),
    "processor.corrector.mlp.layers.3.bias": (8,),
    "processor.corrector.norm_features.weight": (8,),
    "processor.corrector.norm_features.bias": (8,),
    "processor.corrector.norm_slots.weight": (8,),
    "processor.corrector.norm_slots.bias": (8,),
    "decoder.pos_emb": (1, 1, 6, 8),
    "decoder.mlp.layers.0.weight": (16, 8),
    "decoder.mlp.layers.0.bias": (16,),
    "decoder.mlp.layers.2.weight": (12, 16),
    "decoder.mlp.layers.2.bias": (12,),
    "decoder.mlp.layers.4.weight": (7, 12),
    "decoder.mlp.layers.4.bias": (7,),
}


def test_keys_and_shapes_are_those_of_public_image_models(tiny_host: Build) -> None:
    model = tiny_host(DINOSAUR)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == PUBLIC
    assert [name for name, _ in model.named_parameters()] == list(PUBLIC)


def test_every_frame_is_an_image_of_its_own(tiny_host: Build, feature_batch: Batch) -> None:
    model = tiny_host(DINOSAUR, slot_init="learned")
    features = feature_batch["features"]
    out, backwards = model(features), model(features.flip(1))
    assert out.slots.shape == (2, 3, 3, 8)
    torch.testing.assert_close(backwards.slots.flip(1), out.slots)
    torch.testing.assert_close(backwards.mask_logits.flip(1), out.mask_logits)
    image = model(features[1:, 2:])
    torch.testing.assert_close(image.attention_logits[0, 0], out.attention_logits[1, 2])


def test_iterations(tiny_host: Build, feature_batch: Batch) -> None:
    model = tiny_host(DINOSAUR, iterations=4)
    counts: list[int] = []
    model.processor.corrector.to_q.register_forward_hook(lambda *_: counts.append(1))
    model(feature_batch["features"])
    assert len(counts) == 4


def test_loss_is_the_reconstruction_error_of_frames_that_count(tiny_host: Build, feature_batch: Batch) -> None:
    model = tiny_host(DINOSAUR, slot_init="learned")
    features = feature_batch["features"]
    expected = F.mse_loss(model(features).reconstruction, features)
    torch.testing.assert_close(model.training_step(feature_batch, 0), expected)
    padded = feature_batch | {"frame_mask": torch.tensor([[True, False, False], [False, False, False]])}
    first = F.mse_loss(model(features[:1, :1]).reconstruction, features[:1, :1])
    torch.testing.assert_close(model.evaluate(padded)[1], first)


@pytest.mark.parametrize("decoder", ["mlp", "mixer"])
def test_learns_from_single_frames(tiny_host: Build, feature_batch: Batch, decoder: str) -> None:
    model = tiny_host(DINOSAUR, decoder=decoder)
    batch = {"features": feature_batch["features"][:, :1]}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_decay_goes_on_after_its_steps_as_published() -> None:
    model = DINOSAUR(backbone=None, feature_dim=6, grid=(2, 3))
    assert (model.warmup_steps, model.decay_steps, model.decay_rate) == (10_000, 100_000, 0.5)
    model.trainer = type("Trainer", (), {"estimated_stepping_batches": 500_000})()  # type: ignore[assignment]
    factor: Any = model.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]  # type: ignore[index,call-overload]
    assert [factor(step) for step in (0, 5_000, 10_000, 100_000, 190_000)] == pytest.approx([0, 0.5, 1, 0.5, 0.25])


def test_refusals(tiny_host: Build) -> None:
    with pytest.raises(ConfigError, match="`feature_dim` to be the channels of the cached features"):
        tiny_host(DINOSAUR, feature_dim=None)
    with pytest.raises(ConfigError, match="at least 1 iteration, but got 0"):
        tiny_host(DINOSAUR, iterations=0)
