"""Slot attention that starts as soft k-means, against k-means by hand."""

from __future__ import annotations

import pytest
import torch

from ssync_pl.errors import ConfigError
from ssync_pl.hosts.nn.corrector import SlotCorrector
from ssync_pl.hosts.nn.soft_kmeans import init_soft_kmeans_


def _normalised(values: torch.Tensor) -> torch.Tensor:
    return (values - values.mean(-1, keepdim=True)) / (values.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def _started(sharpness: float = 1.5, dim: int = 16, **options: int) -> SlotCorrector:
    torch.manual_seed(0)
    corrector = SlotCorrector(dim, dim, iterations=1, **options)
    init_soft_kmeans_(corrector, sharpness)
    return corrector


@pytest.mark.parametrize("sharpness", [1.5, 3.0])
def test_logits_are_similarities_and_values_the_features(sharpness: float) -> None:
    corrector = _started(sharpness)
    slots, features = torch.randn(2, 3, 16), torch.randn(2, 7, 16)
    wanted = sharpness**2 * _normalised(slots) @ _normalised(features).mT / 4
    torch.testing.assert_close(corrector(slots, features)["dots"], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(corrector.to_v.weight, torch.eye(16))
    # A rotation, not the identity: queries and keys are not tied to the axes.
    assert (corrector.to_q.weight.abs().amax(1) < 0.95 * sharpness).all()


def test_the_gru_takes_most_of_the_update() -> None:
    corrector = _started()
    torch.manual_seed(0)
    plain = SlotCorrector(16, 16).gru
    gru = corrector.gru
    assert torch.equal(gru.bias_hh, torch.zeros(48))
    assert gru.bias_ih.tolist() == [0.0] * 16 + [-1.5] * 16 + [0.0] * 16
    torch.testing.assert_close(gru.weight_hh, 0.1 * plain.weight_hh)
    torch.testing.assert_close(gru.weight_ih[:32], 0.1 * plain.weight_ih[:32])
    torch.testing.assert_close(gru.weight_ih[32:], 0.1 * plain.weight_ih[32:] + torch.eye(16))
    with torch.no_grad():
        for weight in (gru.weight_ih, gru.weight_hh):
            weight.zero_()
        gru.weight_ih[32:].copy_(torch.eye(16))
        update, slot = torch.rand(4, 16), torch.rand(4, 16)
        kept = 1 / (1 + torch.tensor(1.5).exp())
        torch.testing.assert_close(gru(update, slot), (1 - kept) * update.tanh() + kept * slot)


def test_it_groups_alike_patches_before_any_training() -> None:
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(3, 16, generator=generator)
    labels = torch.arange(60) % 3
    features = (kinds[labels] + 0.2 * torch.randn(60, 16, generator=generator))[None]
    first = features[:, :3] + torch.randn(1, 3, 16, generator=generator)

    def purity(corrector: SlotCorrector) -> float:
        winners = corrector(first, features, 3)["masks"][0].argmax(0)
        return sum((labels[winners == slot].bincount(minlength=3).max()).item() for slot in range(3)) / 60

    torch.manual_seed(0)
    assert purity(SlotCorrector(16, 16, mlp_hidden=0)) < 0.9
    assert purity(_started(mlp_hidden=0)) == 1.0


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"as many channels as a slot .* but got 6 and 4. Set `encoder_hidden`"):
        init_soft_kmeans_(SlotCorrector(6, 4))
    for sharpness in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="`corrector_sharpness` to be above 0"):
            init_soft_kmeans_(SlotCorrector(4, 4), sharpness)
