from __future__ import annotations

import pytest
import torch

from ssync_pl.adapters import SaviAdapter
from ssync_pl.errors import HostError
from ssync_pl.hosts import SAVi


def _host(strides: tuple[int, ...] = (2, 2, 1, 1), broadcast: tuple[int, int] = (2, 2)) -> SAVi:
    torch.manual_seed(0)
    return SAVi(
        num_slots=3,
        slot_dim=8,
        encoder_channels=(4, 4, 4, 4),
        encoder_strides=strides,
        feature_dim=8,
        encoder_mlp_hidden=8,
        corrector_mlp_hidden=8,
        predictor_mlp_hidden=8,
        predictor_heads=2,
        decoder_broadcast=broadcast,
        decoder_channels=(4, 4, 4, 4),
        iterations_first=3,
        iterations_later=2,
    )


def test_maps_are_those_of_the_forward_pass() -> None:
    host, adapter = _host(), SaviAdapter()
    capture = adapter.attach(host)
    capture.open()
    output = host(torch.randn(2, 3, 3, 16, 16))
    maps = adapter.collect(capture)
    assert torch.equal(maps.attention_logits, output.attention_logits)
    assert maps.grid == tuple(output.attention_grid) == (4, 4)
    # The decoder draws 16 x 16 pixels, the attention reads 4 x 4 patches.
    blocks = output.mask_logits.softmax(2).unflatten(-1, (4, 4)).unflatten(-3, (4, 4)).mean((-1, -3)).flatten(3)
    torch.testing.assert_close(maps.mask_probs, blocks)
    for value, part in ((maps.attention, host.corrector), (maps.masks, host.decoder)):
        grads = torch.autograd.grad(value.square().sum(), list(part.parameters()), retain_graph=True, allow_unused=True)
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_pixel_attention_is_pooled_to_a_coarse_decoder() -> None:
    host, adapter = _host(strides=(1, 1, 1, 1), broadcast=(1, 1)), SaviAdapter()
    capture = adapter.attach(host)
    capture.open()
    # The decoder draws 8 x 8 for frames of 16 x 16; that makes no reconstruction, but it makes maps.
    output = host(torch.randn(1, 2, 3, 16, 16))
    maps = adapter.collect(capture)
    assert maps.grid == (8, 8)
    assert torch.equal(maps.mask_logits, output.mask_logits.flatten(3))
    assert maps.attention_probs is not None
    assert maps.attention_logits is not None


def test_two_forward_passes_in_a_step_are_refused() -> None:
    host, adapter = _host(), SaviAdapter()
    capture = adapter.attach(host)
    capture.open()
    for _ in range(2):
        host(torch.randn(1, 1, 3, 16, 16))
    with pytest.raises(HostError, match=r"'decoder' to run once .* ran 2 times"):
        adapter.collect(capture)
