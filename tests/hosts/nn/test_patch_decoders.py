from __future__ import annotations

import pytest
import torch

from ssync_pl.errors import ConfigError
from ssync_pl.hosts.nn.patch_decoders import MLPDecoder, SlotMixerDecoder


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_mlp_decoder_slot_by_slot_and_patch_by_patch(memory_efficient: bool) -> None:
    torch.manual_seed(0)
    decoder = MLPDecoder(4, 3, [8, 6], patches=5, memory_efficient=memory_efficient).double()
    slots = torch.randn(2, 3, 4, dtype=torch.float64)
    output = decoder(slots)
    for m in range(2):
        for n in range(5):
            rows = torch.stack([decoder.mlp.layers(slots[m, s] + decoder.pos_emb[0, 0, n]) for s in range(3)])
            torch.testing.assert_close(output["dots"][m, :, n], rows[:, 3])
            shares = rows[:, 3].softmax(0)
            torch.testing.assert_close(output["masks"][m, :, n], shares)
            torch.testing.assert_close(output["reconstruction"][m, n], shares @ rows[:, :3])


def test_mixer_equals_its_formula() -> None:
    torch.manual_seed(0)
    decoder = SlotMixerDecoder(4, 3, [8, 6], patches=5, blocks=2, heads=2).double()
    slots = torch.randn(2, 3, 4, dtype=torch.float64)
    places = decoder.pos_emb.expand(2, -1, -1)
    asked = decoder.allocator(places, decoder.norm_memory(slots))
    logits = decoder.to_q(decoder.norm_q(asked)) @ decoder.to_k(decoder.norm_k(slots)).mT / 2  # (2, patches, slots)
    mixed = logits.softmax(-1) @ slots + places
    hidden = decoder.renderer.layers[2](decoder.renderer.layers[0](mixed).relu()).relu()
    output = decoder(slots)
    torch.testing.assert_close(output["dots"], logits.mT)
    torch.testing.assert_close(output["masks"], logits.mT.softmax(1))
    torch.testing.assert_close(output["reconstruction"], decoder.output_transform(hidden))


@pytest.mark.parametrize("build", [MLPDecoder, SlotMixerDecoder])
def test_decoders_know_no_order_of_slots(build: type[MLPDecoder] | type[SlotMixerDecoder]) -> None:
    decoder = build(8, 3, [8], 6)
    slots = torch.randn(1, 4, 8)
    order = torch.tensor([2, 0, 3, 1])
    output, permuted = decoder(slots), decoder(slots[:, order])
    torch.testing.assert_close(permuted["masks"], output["masks"][:, order])
    torch.testing.assert_close(permuted["reconstruction"], output["reconstruction"])
    torch.testing.assert_close(output["masks"].sum(1), torch.ones(1, 6))


@pytest.mark.parametrize("build", [MLPDecoder, SlotMixerDecoder])
def test_refusals(build: type[MLPDecoder] | type[SlotMixerDecoder]) -> None:
    with pytest.raises(ConfigError, match="at least 1 patch and 1 hidden layer"):
        build(8, 3, [], 6)
    with pytest.raises(ConfigError, match="got 0 patches"):
        build(8, 3, [4], 0)
