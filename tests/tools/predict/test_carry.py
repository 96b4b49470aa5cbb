from typing import Any

import pytest
import torch

from ssync_pl.hosts import DINOSAUR, SAVi, SlotContrast
from ssync_pl.tools.predict.datamodule import CarrySlots, carries_slots
from ssync_pl.tools.predict.writer import WINDOW_KEY

FEATURES = {"backbone": None, "feature_dim": 6, "grid": (2, 2), "num_slots": 3, "slot_dim": 8, "encoder_hidden": 8}
SMALL = {"num_slots": 3, "slot_dim": 8, "slot_init": "learned", "encoder_channels": (8,), "encoder_strides": (2,)}


@pytest.mark.parametrize(
    ("kind", "options", "shape"), [(SAVi, SMALL, (1, 5, 3, 16, 16)), (SlotContrast, FEATURES, (1, 5, 4, 6))]
)
def test_a_window_begins_with_the_slots_that_the_one_before_ended_with(kind: Any, options: Any, shape: Any) -> None:
    torch.manual_seed(0)
    host, inputs, carry = kind(**options).eval(), torch.rand(shape), CarrySlots()
    trainer: Any = None

    def window(start: int, frames: slice) -> torch.Tensor:
        carry.on_predict_batch_start(trainer, host, {WINDOW_KEY: {"start": start}}, 0)
        return host(inputs[:, frames]).slots

    with torch.no_grad():
        plain = host(inputs[:, 2:]).slots
        carry.on_predict_start(trainer, host)
        first = window(0, slice(3))
        given: list[torch.Tensor] = []
        handle = host.initializer.register_forward_hook(lambda module, args, output: given.append(output))
        second = window(2, slice(2, None))
        handle.remove()
        assert torch.equal(given[0], first[:, -1])
        assert not torch.allclose(second, plain)
        assert torch.equal(window(0, slice(2, None)), plain)  # another video
        carry.on_predict_end(trainer, host)
        host(inputs)
        assert carry.slots is None  # nothing listens any more


def test_hosts_of_single_frames_are_left_alone() -> None:
    host, carry = DINOSAUR(**FEATURES), CarrySlots()
    assert not carries_slots(host)
    carry.on_predict_start(None, host)  # type: ignore[arg-type]
    host(torch.randn(1, 2, 4, 6))
    assert carry.slots is None
