from __future__ import annotations

import pytest
import torch

from ssync_pl.errors import ConfigError
from ssync_pl.hosts.nn import TransformerBlock, TransformerPredictor


def test_block_equals_torch_encoder_layer_with_norm_first() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(8, heads=2, mlp_hidden=16)
    reference = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    reference.self_attn.in_proj_weight.data = block.to_qkv.weight.data
    reference.self_attn.in_proj_bias.data = block.to_qkv.bias.data
    reference.self_attn.out_proj.load_state_dict(block.output.state_dict())
    reference.norm1.load_state_dict(block.norm_attention.state_dict())
    reference.norm2.load_state_dict(block.mlp[0].state_dict())
    reference.linear1.load_state_dict(block.mlp[1].state_dict())
    reference.linear2.load_state_dict(block.mlp[3].state_dict())
    slots = torch.randn(2, 5, 8)
    torch.testing.assert_close(block(slots), reference(slots), rtol=1e-4, atol=1e-5)


def test_predictor_is_equivariant_under_slot_permutation() -> None:
    torch.manual_seed(0)
    predictor = TransformerPredictor(8, blocks=2, heads=2, mlp_hidden=16)
    slots, order = torch.randn(2, 5, 8), torch.randperm(5)
    torch.testing.assert_close(predictor(slots[:, order]), predictor(slots)[:, order], rtol=1e-4, atol=1e-5)


def test_no_blocks_pass_slots_on() -> None:
    slots = torch.randn(2, 5, 8)
    assert torch.equal(TransformerPredictor(8, blocks=0)(slots), slots)


def test_errors() -> None:
    with pytest.raises(ConfigError, match="`heads` to divide the slot size 8, but got 3"):
        TransformerBlock(8, heads=3)
    with pytest.raises(ConfigError, match="`blocks` to be at least 0"):
        TransformerPredictor(8, blocks=-1)
