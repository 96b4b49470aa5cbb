"""Parameters of a callback in the optimizer of a host, by hand."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ssync_pl.rivals.extra_parameters import average_gradients, join_state, split_state, with_parameters


def stepped(groups):
    """An Adam that took a step with another gradient for each parameter."""
    optimizer = torch.optim.Adam(groups, lr=0.1)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.fixture
def modules():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)), nn.Linear(5, 6)


def layouts(host, extra):
    first, second = ([*layer.parameters()] for layer in host)
    own = [*extra.parameters()]
    return {
        "behind": [{"params": [*first, *second, *own]}],
        "in the middle": [{"params": [*first, *own]}, {"params": second, "lr": 0.2}],
        "apart": [{"params": own}, {"params": first}, {"params": second}],
        "scattered": [{"params": [first[0], own[0], first[1]]}, {"params": [own[1], *second]}],
    }


@pytest.mark.parametrize("layout", ["behind", "in the middle", "apart", "scattered"])
def test_split_and_join(modules, layout):
    host, extra = modules
    optimizer = stepped(layouts(host, extra)[layout])
    state = optimizer.state_dict()
    plain, taken = split_state(state, optimizer, extra)
    assert set(taken) == {"weight", "bias"}
    numbers = [number for group in plain["param_groups"] for number in group["params"]]
    assert numbers == list(range(4)) == sorted(plain["state"])
    torch.testing.assert_close(join_state(plain, optimizer, extra, taken)["state"], state["state"], rtol=0, atol=0)
    assert join_state(plain, optimizer, extra, taken)["param_groups"] == state["param_groups"]


def test_the_plain_state_loads_into_the_hosts_own_optimizer(modules):
    host, extra = modules
    optimizer = stepped(layouts(host, extra)["behind"])
    plain, _ = split_state(optimizer.state_dict(), optimizer, extra)
    own = torch.optim.Adam(host.parameters(), lr=0.1)
    own.load_state_dict(plain)
    for parameter in host.parameters():
        assert torch.equal(own.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_parameters_without_a_state_start_afresh(modules):
    host, extra = modules
    plain = stepped([{"params": [*host.parameters()]}]).state_dict()
    both = torch.optim.Adam([*host.parameters(), *extra.parameters()])
    both.load_state_dict(join_state(plain, both, extra, {}))
    assert set(both.state) == set(host.parameters())


def test_a_state_of_another_host_is_left_for_the_optimizer_to_refuse(modules):
    host, extra = modules
    plain = stepped([{"params": [*host[0].parameters()]}]).state_dict()
    both = torch.optim.Adam([*host.parameters(), *extra.parameters()])
    with pytest.raises(ValueError, match="parameter group"):
        both.load_state_dict(join_state(plain, both, extra, {}))


def test_schedulers_know_the_parameters(modules):
    host, extra = modules

    def configure():
        optimizer = torch.optim.SGD(host.parameters(), lr=1.0)
        return optimizer, LambdaLR(optimizer, lambda step: 0.5**step)

    optimizer, scheduler = with_parameters(host, extra, "extra", configure)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]
    assert optimizer.param_groups[0]["params"] == [*host.parameters(), *extra.parameters()]


def test_the_host_is_put_back_when_configuring_fails(modules):
    host, extra = modules
    with pytest.raises(ZeroDivisionError):
        with_parameters(host, extra, "extra", lambda: 1 / 0)
    assert len(list(host.parameters())) == 4


def test_one_process_averages_nothing(modules):
    parameter = next(modules[0].parameters())
    parameter.grad = torch.ones_like(parameter)
    average_gradients([parameter])
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
