"""Where patches lie, as slots are told."""

from __future__ import annotations

import pytest
import torch

from ssync_pl.errors import ConfigError
from ssync_pl.hosts.nn.position import PatchPosition


def test_values_by_hand() -> None:
    position = PatchPosition((2, 3), 2, scale=0.5)
    assert {name: tuple(value.shape) for name, value in position.state_dict().items()} == {"weight": (2, 2)}
    with torch.no_grad():
        position.weight.copy_(torch.tensor([[2.0, 0.0], [1.0, 4.0]]))
    root = 3**0.5
    rows, columns = [-root, -root, -root, root, root, root], [-root, 0.0, root] * 2
    wanted = [[0.5 * 2 * y, 0.5 * (y + 4 * x)] for y, x in zip(rows, columns, strict=True)]
    torch.testing.assert_close(position(), torch.tensor(wanted))


def test_the_embedding_starts_with_the_variance_of_its_scale() -> None:
    torch.manual_seed(0)
    embedding = PatchPosition((20, 30), 4000, scale=0.5)()
    assert embedding.std().item() == pytest.approx(0.5, rel=0.06)


def test_a_scale_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="`scale` to be above 0, but got 0"):
        PatchPosition((2, 3), 4, scale=0)
