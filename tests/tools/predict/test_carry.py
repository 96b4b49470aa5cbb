import pytest
import torch

from ssync_pl.hosts import DINOSAUR, SAVi, SlotContrast
from ssync_pl.tools.predict.datamodule import CarrySlots, carries_slots
from tiny_run import TINY_SAVI

FEATURES = {"backbone": None, "feature_dim": 6, "grid": (2, 2), "num_slots": 3, "slot_dim": 8, "encoder_hidden": 8}
HOSTS = [
    (SAVi, TINY_SAVI | {"slot_init": "learned"}, (1, 5, 3, 16, 16)),
    (SlotContrast, FEATURES, (1, 5, 4, 6)),
]


@pytest.mark.parametrize(("kind", "options", "shape"), HOSTS)
def test_a_window_begins_with_the_slots_that_the_one_before_ended_with(kind, options, shape):
    torch.manual_seed(0)
    host, inputs, given = kind(**options).eval(), torch.rand(shape), []
    with torch.no_grad():
        plain = host(inputs[:, 2:]).slots
        carry = CarrySlots(host)
        first = host(inputs[:, :3]).slots
        with host.initializer.register_forward_hook(lambda module, args, output: given.append(output)):
            second = host(inputs[:, 2:]).slots
        assert torch.equal(given[0], first[:, -1])
        assert not torch.allclose(second, plain)
        carry.slots = None  # another video
        assert torch.equal(host(inputs[:, 2:]).slots, plain)
        carry.close()
        host(inputs)
        assert carry.slots is None  # nothing listens any more


def test_hosts_of_single_frames_are_left_alone():
    host = DINOSAUR(**FEATURES)
    carry = CarrySlots(host)
    assert not carries_slots(host)
    host(torch.randn(1, 2, 4, 6))
    assert carry.slots is None
