from __future__ import annotations

import pytest
import torch

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.token_drop import TokenDrop


def test_half_of_the_tokens_are_kept_and_say_where_they_were() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(3, 2, 9, 4)
    kept = TokenDrop(0.5)(tokens)
    assert kept.tokens.shape == (3, 2, 4, 4)
    assert (kept.indices.diff(dim=-1) > 0).all()
    for video in range(3):
        for frame in range(2):
            assert torch.equal(kept.tokens[video, frame], tokens[video, frame, kept.indices[video, frame]])
    assert not torch.equal(kept.indices[0, 0], kept.indices[0, 1])


def test_every_token_is_as_likely_to_stay() -> None:
    torch.manual_seed(0)
    indices = TokenDrop(0.75)(torch.zeros(1000, 1, 8, 1)).indices
    share = torch.bincount(indices.flatten(), minlength=8) / 1000
    assert (share - 0.25).abs().max() < 0.05


def test_nothing_is_dropped_in_evaluation_or_at_zero() -> None:
    tokens = torch.randn(1, 2, 5, 3)
    for drop in (TokenDrop(0.5).eval(), TokenDrop(0.0)):
        kept = drop(tokens)
        assert torch.equal(kept.tokens, tokens)
        assert kept.indices[0, 1].tolist() == [0, 1, 2, 3, 4]


def test_a_ratio_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="`ratio`"):
        TokenDrop(1.0)
    with pytest.raises(ShapeError, match=r"\(B, T, N, C\)"):
        TokenDrop()(torch.zeros(2, 3, 4))
