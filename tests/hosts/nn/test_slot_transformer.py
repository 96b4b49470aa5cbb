from __future__ import annotations

import math

import pytest
import torch

from ssync_pl.errors import ConfigError
from ssync_pl.hosts.nn.slot_transformer import SlotTransformer, SlotTransformerBlock


@pytest.mark.parametrize("with_memory", [False, True])
def test_block_equals_its_formula(with_memory: bool) -> None:
    torch.manual_seed(0)
    block = SlotTransformerBlock(8, heads=2, mlp_hidden=12).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = torch.randn(2, 5, 8, dtype=torch.float64)
    memory = torch.randn(2, 3, 8, dtype=torch.float64) if with_memory else None
    normed = block.norm1(inputs)
    source = normed if memory is None else memory
    weight, bias = block.self_attn.qkv.weight, block.self_attn.qkv.bias
    query, key, value = (
        x @ weight[8 * i : 8 * i + 8].T + bias[8 * i : 8 * i + 8] for i, x in enumerate((normed, source, source))
    )
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        # The published scale: times sqrt(4), not divided by it.
        logits = query[..., part] @ key[..., part].mT * math.sqrt(4)
        heads.append(logits.softmax(-1) @ value[..., part])
    mixed = inputs + block.self_attn.out_proj(torch.cat(heads, -1))
    expected = mixed + block.linear2(block.linear1(block.norm2(mixed)).relu())
    torch.testing.assert_close(block(inputs, memory), expected)


def test_blocks_follow_each_other_and_each_sees_the_memory() -> None:
    transformer = SlotTransformer(8, blocks=2, heads=4)
    inputs, memory = torch.randn(1, 5, 8), torch.randn(1, 3, 8)
    expected = transformer.blocks[1](transformer.blocks[0](inputs, memory), memory)
    assert torch.equal(transformer(inputs, memory), expected)
    assert transformer.blocks[0].linear1.weight.shape == (32, 8)


def test_queries_keys_and_values_start_within_xavier_bounds_of_their_own() -> None:
    weight = SlotTransformerBlock(16, heads=4, mlp_hidden=8).self_attn.qkv.weight
    bound = math.sqrt(6 / 32)
    assert weight.abs().max() <= bound
    # The bound of the joint matrix would be smaller: sqrt(6 / 64).
    assert weight.abs().max() > math.sqrt(6 / 64)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="heads to divide the slot size 8, but got 3"):
        SlotTransformer(8, blocks=1, heads=3)
    with pytest.raises(ConfigError, match="at least 1 block, but got 0"):
        SlotTransformer(8, blocks=0, heads=2)
