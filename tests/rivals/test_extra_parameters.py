"""Parameters of a callback in the optimizer of a host: states saved without them."""

import pytest
import torch
from torch import nn

from ssync_pl.rivals.dense_callback import _extended


@pytest.fixture
def modules():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)), nn.Linear(5, 6)


def groups_of(layout, host, own):
    first, second = ([*layer.parameters()] for layer in host)
    return {
        "behind": [{"params": [*first, *second, *own]}],
        "in the middle": [{"params": [*first, *own]}, {"params": second, "lr": 0.2}],
        "apart": [{"params": first}, {"params": own}, {"params": second}],
        "scattered": [{"params": [first[0], *own[:1], first[1]]}, {"params": [*own[1:], *second]}],
    }[layout]


def stepped(groups):
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=0.1)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("layout", ["behind", "in the middle", "scattered"])
def test_a_state_without_them_is_taken_up(modules, layout):
    host, extra = modules
    alone = stepped(groups_of(layout, host, []))
    both = torch.optim.Adam(groups_of(layout, host, [*extra.parameters()]))
    both.load_state_dict(_extended(extra, both, alone.state_dict()))
    assert set(both.state) == set(host.parameters())
    for parameter in host.parameters():
        assert torch.equal(both.state[parameter]["exp_avg"], alone.state[parameter]["exp_avg"])


@pytest.mark.parametrize("layout", ["behind", "in the middle", "apart", "scattered"])
def test_a_state_with_them_is_left_alone(modules, layout):
    host, extra = modules
    optimizer = stepped(groups_of(layout, host, [*extra.parameters()]))
    state = optimizer.state_dict()
    assert _extended(extra, optimizer, state) is state


def test_a_state_of_another_host_is_left_for_the_optimizer_to_refuse(modules):
    host, extra = modules
    state = stepped([{"params": [*host[0].parameters()]}]).state_dict()
    both = torch.optim.Adam([*host.parameters(), *extra.parameters()])
    with pytest.raises(ValueError, match="parameter group"):
        both.load_state_dict(_extended(extra, both, state))
