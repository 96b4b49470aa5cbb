"""Options of the feature hosts that change only how training starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssync_pl.errors import ConfigError
from ssync_pl.hosts import DINOSAUR, SlotContrast, VideoSAUR
from ssync_pl.hosts.nn.corrector import SlotCorrector
from ssync_pl.hosts.nn.feature_encoder import FeatureEncoder
from ssync_pl.hosts.nn.patch_decoders import MLPDecoder

Build = Callable[..., Any]
HOSTS = [VideoSAUR, SlotContrast, DINOSAUR]
QUICK = {"encoder_position": 0.5, "corrector_init": "kmeans", "corrector_sharpness": 2.0, "init": "fan_in"}


def _part(model: nn.Module, kind: type[nn.Module]) -> Any:
    return next(part for part in model.modules() if isinstance(part, kind))


@pytest.mark.parametrize("kind", HOSTS)
def test_only_a_position_adds_a_key(tiny_host: Build, kind: Any) -> None:
    plain, quick = tiny_host(kind), tiny_host(kind, **QUICK)
    prefix = "encoder" if kind is DINOSAUR else "encoder.module"
    shapes = {name: value.shape for name, value in plain.state_dict().items()}
    assert {name: value.shape for name, value in quick.state_dict().items()} == {
        **shapes,
        f"{prefix}.position.weight": (16, 2),
    }
    # A checkpoint of a model without these options loads into one with other initial values only.
    tiny_host(kind, corrector_init="kmeans", init="fan_in").load_state_dict(plain.state_dict())


@pytest.mark.parametrize("kind", HOSTS)
def test_a_seed_gives_the_same_model_as_without_the_options(tiny_host: Build, kind: Any) -> None:
    defaults = {"encoder_position": 0.0, "corrector_init": "default", "corrector_sharpness": 1.5, "init": "default"}
    one = tiny_host(kind)
    drawn = torch.rand(())
    other = tiny_host(kind, **defaults)
    assert torch.equal(torch.rand(()), drawn)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", HOSTS)
def test_slot_attention_starts_as_soft_kmeans(tiny_host: Build, kind: Any) -> None:
    corrector = _part(tiny_host(kind, corrector_init="kmeans", corrector_sharpness=2.0), SlotCorrector)
    assert torch.equal(corrector.to_q.weight, corrector.to_k.weight)
    torch.testing.assert_close(corrector.to_q.weight.mT @ corrector.to_q.weight, 4 * torch.eye(8))
    assert torch.equal(corrector.to_v.weight, torch.eye(8))


@pytest.mark.parametrize("decoder", ["mlp", "mixer"])
def test_layers_start_with_the_spread_of_their_inputs(tiny_host: Build, decoder: str) -> None:
    sizes = {"encoder_hidden": 400, "decoder_hidden": (400, 400), "slot_dim": 200, "decoder": decoder}
    plain, model = tiny_host(SlotContrast, **sizes), tiny_host(SlotContrast, **sizes, init="fan_in")

    def spreads(stack: nn.Module) -> list[float]:
        return [layer.weight.std().item() for layer in stack.modules() if isinstance(layer, nn.Linear)]

    encoder = _part(model, FeatureEncoder).output_transform
    assert spreads(encoder) == pytest.approx([(2 / 6) ** 0.5, (1 / 400) ** 0.5], rel=0.05)
    if decoder == "mlp":
        mlp = _part(model, MLPDecoder).mlp
        assert spreads(mlp) == pytest.approx([(2 / 200) ** 0.5, (2 / 400) ** 0.5, (1 / 400) ** 0.5], rel=0.05)
        assert all(not layer.bias.any() for layer in mlp.modules() if isinstance(layer, nn.Linear))
    else:
        pairs = zip(plain.decoder.parameters(), model.decoder.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", HOSTS)
def test_such_a_model_trains(tiny_host: Build, feature_batch: dict[str, Tensor], kind: Any) -> None:
    batch = {name: value[:, :1] if kind is DINOSAUR else value for name, value in feature_batch.items()}
    model = tiny_host(kind, **QUICK)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(12):
        loss = model.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert _part(model, FeatureEncoder).position.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"encoder_position": 0.5, "encoder_hidden": 0}, "above 0 only with `encoder_hidden` above 0"),
        ({"encoder_position": -1.0}, "`encoder_position` to be at least 0"),
        ({"corrector_init": "kmeans", "encoder_hidden": 0}, r"as many channels as a slot .* got 6 and 8"),
        ({"corrector_init": "kmeans", "corrector_sharpness": 0.0}, "`corrector_sharpness` to be above 0"),
        ({"corrector_sharpness": 2.0}, r"only with corrector_init='kmeans', but got 2.0 with 'default'"),
        ({"corrector_init": "means"}, "'default' or 'kmeans', but got 'means'"),
        ({"init": "fan"}, "'default' or 'fan_in', but got 'fan'"),
        ({"init": "fan_in", "encoder_hidden": 0, "decoder": "mixer"}, "there is neither. Leave `init` out"),
    ],
)
def test_what_cannot_apply_is_refused(tiny_host: Build, kind: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        tiny_host(kind, **options)
