from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn import ConvEncoder, SoftPositionEmbedding, SpatialBroadcastDecoder, coordinate_grid, init_fan_in_


def test_coordinates_are_row_then_column_with_complements() -> None:
    grid = coordinate_grid(3, 5)
    assert grid[1, 4].tolist() == [0.5, 1.0, 0.5, 0.0]
    assert grid[2, 0].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_position_scale_multiplies_the_embedding() -> None:
    torch.manual_seed(0)
    full, half = SoftPositionEmbedding(6), SoftPositionEmbedding(6, scale=0.5)
    half.load_state_dict(full.state_dict())
    zeros = torch.zeros(1, 6, 3, 4)
    torch.testing.assert_close(half(zeros), 0.5 * full(zeros))
    expected = full.projection(coordinate_grid(3, 4)[2, 1])
    torch.testing.assert_close(full(zeros)[0, :, 2, 1], expected)
    with pytest.raises(ConfigError, match="`scale`"):
        SoftPositionEmbedding(6, scale=-1.0)


def test_encoder_keeps_patches_in_row_order() -> None:
    torch.manual_seed(0)
    encoder = ConvEncoder([4], [2], feature_dim=5, position_scale=0.0)
    frames = torch.zeros(1, 3, 8, 12)
    base = encoder(frames).features
    frames[..., 4, 10] = 1.0
    changed = (encoder(frames).features - base).abs().sum(dim=-1)[0].reshape(4, 6) > 1e-7
    # A 5x5 kernel of stride 2 centred on even pixels: pixel (4, 10) is seen by rows 1-3 and columns 4-5.
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1:4, 4:6] = True
    assert torch.equal(changed, expected)


def test_decoder_mixes_pictures_by_masks() -> None:
    torch.manual_seed(0)
    decoder = SpatialBroadcastDecoder(6, [5], [2], (3, 4))
    slots = torch.randn(2, 3, 4, 6)
    out = decoder(slots)
    assert decoder.size == (6, 8)
    single = [decoder(slots[:, :, s : s + 1]) for s in range(4)]
    logits = torch.cat([one.mask_logits for one in single], dim=2)
    torch.testing.assert_close(out.mask_logits, logits)
    pictures = torch.stack([one.reconstruction for one in single], dim=2)
    expected = (pictures * logits.softmax(dim=2).unsqueeze(3)).sum(dim=2)
    torch.testing.assert_close(out.reconstruction, expected)


@pytest.mark.parametrize("init", ["default", "fan_in"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_decoder_equals_convolving_every_broadcast_copy(init: Any, kernel_size: int, stride: int) -> None:
    torch.manual_seed(0)
    decoder = SpatialBroadcastDecoder(6, [5, 4], [stride, 2], (3, 4), kernel_size, init=init)
    slots = torch.randn(2, 1, 3, 6, requires_grad=True)
    copies = decoder.position(slots.reshape(6, 6, 1, 1).expand(6, 6, 3, 4))
    expected = decoder.layers(copies).reshape(2, 1, 3, 4, *decoder.size)
    out = decoder(slots)
    torch.testing.assert_close(out.mask_logits, expected[:, :, :, 3], rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(out.mask_logits.square().sum(), [slots, decoder.layers[0].weight])
    wanted = torch.autograd.grad(expected[:, :, :, 3].square().sum(), [slots, decoder.layers[0].weight])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("strides", [(2, 2), (1, 3)])
def test_decoder_grows_by_its_strides(kernel_size: int, strides: tuple[int, int]) -> None:
    decoder = SpatialBroadcastDecoder(4, (4, 4), strides, (2, 3), kernel_size)
    growth = math.prod(strides)
    assert decoder(torch.randn(1, 1, 2, 4)).mask_logits.shape[-2:] == (2 * growth, 3 * growth) == decoder.size


def test_fan_in_scales_each_layer() -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(nn.Conv2d(3, 200, 5), nn.ReLU(), nn.ConvTranspose2d(200, 50, 5, 2), nn.Conv2d(50, 400, 1))
    init_fan_in_(stack)
    assert stack[0].weight.std().item() == pytest.approx(math.sqrt(2 / 75), rel=0.03)
    assert stack[2].weight.std().item() == pytest.approx(math.sqrt(2 / (200 * 25 / 4)), rel=0.03)
    assert stack[3].weight.std().item() == pytest.approx(math.sqrt(1 / 50), rel=0.03)
    assert all((layer.bias == 0).all() for layer in stack if hasattr(layer, "bias"))


def test_fan_in_keeps_the_signal_and_the_default_loses_it() -> None:
    torch.manual_seed(0)
    frames = torch.randn(4, 3, 32, 32)
    spread = {init: ConvEncoder(init=init).convolutions(frames).std().item() for init in ("default", "fan_in")}
    assert spread["fan_in"] > 0.5
    assert spread["default"] < 0.2


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"but got \[8\] and \[1, 1\]"):
        ConvEncoder([8], [1, 1])
    with pytest.raises(ConfigError, match="`encoder_kernel` to be odd, but got 4"):
        ConvEncoder([8], [1], kernel_size=4)
    with pytest.raises(ConfigError, match="`init` to be 'default' or 'fan_in'"):
        SpatialBroadcastDecoder(4, init="zeros")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`broadcast_size`"):
        SpatialBroadcastDecoder(4, broadcast_size=(0, 8))
    with pytest.raises(ShapeError, match=r"`slots` to be \(B, T, S, D\)"):
        SpatialBroadcastDecoder(4)(torch.randn(1, 2, 4))


def test_the_position_weights_have_the_asked_spread():
    decoder = SpatialBroadcastDecoder(512, [4], [2], init="fan_in", position_std=0.5)
    assert decoder.position.projection.weight.std().item() == pytest.approx(0.5, rel=0.1)
    with pytest.raises(ConfigError, match="position_std"):
        SpatialBroadcastDecoder(4, position_std=-1.0)
