from __future__ import annotations

import torch
from torch import nn

from ssync_pl.hosts.nn.mlp import MLP


def test_layers_lie_where_the_public_checkpoints_have_them() -> None:
    mlp = MLP(4, [6, 8], 3, layer_norm=True)
    assert {name: tuple(value.shape) for name, value in mlp.state_dict().items()} == {
        "layers.0.weight": (4,),
        "layers.0.bias": (4,),
        "layers.1.weight": (6, 4),
        "layers.1.bias": (6,),
        "layers.3.weight": (8, 6),
        "layers.3.bias": (8,),
        "layers.5.weight": (3, 8),
        "layers.5.bias": (3,),
    }
    linear = [layer for layer in mlp.layers if isinstance(layer, nn.Linear)]
    assert all(torch.equal(layer.bias, torch.zeros_like(layer.bias)) for layer in linear)


def test_values_by_hand() -> None:
    mlp = MLP(2, [2], 2, residual=True)
    with torch.no_grad():
        mlp.layers[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        mlp.layers[2].weight.copy_(torch.tensor([[2.0, 5.0], [0.0, 1.0]]))
        mlp.layers[2].bias.copy_(torch.tensor([0.0, -9.0]))
    # Hidden: relu(3, -4) = (3, 0); out: (6, 0) + (0, -9), plus the input.
    assert mlp(torch.tensor([3.0, 4.0])).tolist() == [9.0, -5.0]


def test_activated_output_is_never_negative() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(50, 4)
    assert (MLP(4, [8], 3)(inputs) < 0).any()
    assert (MLP(4, [8], 3, activate_output=True)(inputs) >= 0).all()


def test_a_shift_goes_behind_the_first_linear_layer() -> None:
    mlp = MLP(2, [2], 1, layer_norm=True)
    with torch.no_grad():
        mlp.layers[1].weight.copy_(torch.eye(2))
        mlp.layers[3].weight.copy_(torch.tensor([[1.0, 10.0]]))
    # The normalised input is (-1, 1); hidden: relu(-1 + 3, 1 - 4) = (2, 0).
    inputs = torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(mlp(inputs, torch.tensor([3.0, -4.0])), torch.tensor([[2.0]]), rtol=0, atol=1e-4)
    torch.testing.assert_close(mlp(inputs), torch.tensor([[10.0]]), rtol=0, atol=1e-4)
    assert torch.equal(mlp(inputs, torch.zeros(2)), mlp(inputs))
