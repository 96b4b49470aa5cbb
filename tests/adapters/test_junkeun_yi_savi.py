from __future__ import annotations

import copy

import pytest
import torch
from junkeun_yi_savi_hosts import SIZE, JunkeunYiCorrector, JunkeunYiHost, training_loss
from torch import Tensor

from ssync_pl.adapters.savi import JunkeunYiSaviAdapter
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps


def _maps(host: JunkeunYiHost) -> SSyncMaps:
    adapter = JunkeunYiSaviAdapter()
    capture = adapter.attach(host)
    capture.open()
    training_loss(host)
    maps = adapter.collect(capture)
    adapter.verify(capture, maps)
    return maps


def test_two_different_correctors_are_another_host() -> None:
    host = JunkeunYiHost()
    host.processor.corrector = JunkeunYiCorrector(1, 1)
    assert not JunkeunYiSaviAdapter().match(host)


@pytest.mark.parametrize("decoder_size", [SIZE, SIZE // 2, 2 * SIZE])
def test_heads_are_the_mean_of_their_probabilities(decoder_size: int) -> None:
    torch.manual_seed(0)
    host = JunkeunYiHost(heads=2, decoder_size=decoder_size)
    if decoder_size > SIZE:  # the test's loss compares with frames of SIZE
        adapter = JunkeunYiSaviAdapter()
        capture = adapter.attach(host)
        capture.open()
        host(torch.rand(2, 3, SIZE, SIZE, 3), torch.rand(2, 3, 3, 4))
        maps = adapter.collect(capture)
    else:
        maps = _maps(host)
    logits = torch.stack(host.corrector.own_logits, 1)  # (B, T, heads, S, N)
    probs, mean = logits.softmax(3).mean(2), logits.mean(2)
    side = min(SIZE, decoder_size)
    assert maps.grid == (side, side)
    if decoder_size < SIZE:
        blocks = [v.unflatten(-1, (side, 2, side, 2)).mean((-1, -3)).flatten(3) for v in (probs, mean)]
        torch.testing.assert_close(maps.attention_probs, blocks[0])
        torch.testing.assert_close(maps.attention_logits, blocks[1])
    else:
        torch.testing.assert_close(maps.attention_probs, probs)
        torch.testing.assert_close(maps.attention_logits, mean)
    torch.testing.assert_close(maps.attention_probs.sum(2), torch.ones(2, 3, side * side))


def test_masks_of_predicted_slots_are_left_out() -> None:
    torch.manual_seed(0)
    host = JunkeunYiHost(predicted=True)
    maps = _maps(host)
    assert torch.equal(maps.mask_logits, host.decoder.first_alpha.unflatten(0, (2, 3)).flatten(3))
    assert not torch.equal(host.decoder.first_alpha, host.decoder.own_alpha)


def test_a_host_that_decodes_predicted_slots_only_is_refused() -> None:
    host = JunkeunYiHost(predicted=True)
    host.decode_corrected = False
    with pytest.raises(HostError, match="masks of predicted slots show the next frame"):
        JunkeunYiSaviAdapter().attach(host)


def test_other_outputs_are_refused() -> None:
    class Quiet(type(JunkeunYiHost().decoder)):  # type: ignore[misc]
        def forward(self, slots: Tensor) -> dict[str, Tensor]:
            return {"flow": super().forward(slots)["flow"]}

    host = JunkeunYiHost()
    host.decoder.__class__ = Quiet
    with pytest.raises(HostError, match="Expected Quiet to return its map as 'alpha_mask'"):
        _maps(host)

    class Alone(type(JunkeunYiHost().corrector.inverted_attention.attn_fn)):  # type: ignore[misc]
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(query, key, value)[0]

    host = JunkeunYiHost()
    host.corrector.inverted_attention.attn_fn.__class__ = Alone
    with pytest.raises(HostError, match="Expected Alone to return its map as '1'"):
        _maps(host)


def test_positional_arguments_of_the_inner_attention_are_understood() -> None:
    torch.manual_seed(0)
    host = JunkeunYiHost()
    twin = copy.deepcopy(host)
    inner = twin.corrector.inverted_attention
    plain = inner.attn_fn

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        updates, attention = plain(query, key, value)
        return updates.flatten(2), attention

    inner.forward = forward  # type: ignore[method-assign]
    torch.manual_seed(1)
    first = _maps(host).attention_logits
    torch.manual_seed(1)
    assert torch.equal(_maps(twin).attention_logits, first)
