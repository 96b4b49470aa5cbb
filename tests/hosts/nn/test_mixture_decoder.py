from __future__ import annotations

import pytest
import torch

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.mixture_decoder import RelativeMixtureDecoder


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_the_mixture_is_that_of_each_patch_by_hand(memory_efficient: bool) -> None:
    torch.manual_seed(0)
    decoder = RelativeMixtureDecoder(4, 6, 3, hidden=(8, 7), memory_efficient=memory_efficient)
    slots, positions = torch.randn(2, 1, 3, 6), torch.randn(2, 1, 3, 4, 2)
    valid = torch.tensor([[[True, True, True]], [[True, False, True]]])
    out = decoder(slots, positions, valid)
    for video in range(2):
        for patch in range(4):
            given = slots[video, 0] + decoder.place[patch] + decoder.from_position(positions[video, 0, :, patch])
            hidden = decoder.mlp(decoder.first(given))
            alpha, features = decoder.to_alpha(hidden)[:, 0], decoder.to_features(hidden)
            torch.testing.assert_close(out.mask_logits[video, 0, :, patch], alpha)
            kept = valid[video, 0]
            expected = alpha[kept].softmax(0) @ features[kept]
            torch.testing.assert_close(out.reconstruction[video, 0, patch], expected)


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_slots_that_do_not_exist_get_no_gradient(memory_efficient: bool) -> None:
    decoder = RelativeMixtureDecoder(4, 6, 3, hidden=(8, 7), memory_efficient=memory_efficient)
    slots = torch.randn(1, 1, 2, 6, requires_grad=True)
    decoder(slots, torch.zeros(1, 1, 2, 4, 2), torch.tensor([[[True, False]]])).reconstruction.sum().backward()
    assert slots.grad is not None
    assert slots.grad[0, 0, 0].any()
    assert not slots.grad[0, 0, 1].any()


def test_published_layers() -> None:
    decoder = RelativeMixtureDecoder(patches=4)
    layers = [decoder.first, *decoder.mlp, decoder.to_features, decoder.to_alpha]
    widths = [layer.weight.shape for layer in layers if isinstance(layer, torch.nn.Linear)]
    assert widths == [(1024, 128), (1024, 1024), (1024, 1024), (1024, 1024), (768, 1024), (1, 1024)]


def test_fan_in_keeps_the_signal() -> None:
    torch.manual_seed(0)
    sizes = {}
    for init in ("default", "fan_in"):
        decoder = RelativeMixtureDecoder(patches=9, slot_dim=64, feature_dim=64, hidden=(256,) * 4, init=init)
        features = decoder.to_features(decoder.mlp(decoder.first(torch.randn(200, 64))))
        sizes[init] = features.std().item()
    assert 0.7 < sizes["fan_in"] < 1.4
    assert sizes["default"] < 0.1
    with pytest.raises(ConfigError, match="`init`"):
        RelativeMixtureDecoder(patches=4, init="other")  # type: ignore[arg-type]


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="`patches`"):
        RelativeMixtureDecoder(patches=0)
    with pytest.raises(ConfigError, match="`hidden`"):
        RelativeMixtureDecoder(patches=4, hidden=())
    decoder = RelativeMixtureDecoder(patches=4, slot_dim=6, feature_dim=3, hidden=(8, 7))
    with pytest.raises(ShapeError, match=r"\(B, P, S, N, 2\)"):
        decoder(torch.zeros(1, 1, 2, 6), torch.zeros(1, 1, 3, 4, 2), torch.ones(1, 1, 2, dtype=torch.bool))
