from typing import Any

import lightning.pytorch as L
import torch

from ssync_pl.hosts import DINOSAUR, SAVi, SlotContrast
from ssync_pl.tools.predict.datamodule import CarrySlots, carries_slots
from ssync_pl.tools.predict.writer import WINDOW_KEY

FEATURES = {"backbone": None, "feature_dim": 6, "grid": (2, 2), "num_slots": 3, "slot_dim": 8, "encoder_hidden": 8}


def batch(start: int) -> dict[str, Any]:
    return {WINDOW_KEY: {"start": start}}


def check(host: L.LightningModule, inputs: torch.Tensor) -> None:
    """Two windows that share a frame: the second begins with the slots that the first ended with."""
    host.eval()
    carry = CarrySlots()
    trainer: Any = None
    with torch.no_grad():
        plain = host(inputs[:, 2:])
        carry.on_predict_start(trainer, host)
        carry.on_predict_batch_start(trainer, host, batch(0), 0)
        first = host(inputs[:, :3])
        given = []
        handle = host.initializer.register_forward_hook(lambda module, args, output: given.append(output))
        carry.on_predict_batch_start(trainer, host, batch(2), 1)
        second = host(inputs[:, 2:])
        handle.remove()
        assert torch.equal(given[0], first.slots[:, -1])
        assert not torch.allclose(second.slots, plain.slots)
        carry.on_predict_batch_start(trainer, host, batch(0), 2)  # another video
        assert torch.equal(host(inputs[:, 2:]).slots, plain.slots)
        carry.on_predict_end(trainer, host)
        assert carry.slots is None
        host(inputs)
        assert carry.slots is None  # nothing listens any more


def test_savi_carries_slots() -> None:
    torch.manual_seed(0)
    host = SAVi(num_slots=3, slot_dim=8, slot_init="learned", encoder_channels=(8,), encoder_strides=(2,))
    check(host, torch.rand(1, 5, 3, 16, 16))


def test_feature_hosts_carry_slots() -> None:
    torch.manual_seed(0)
    check(SlotContrast(**FEATURES), torch.randn(1, 5, 4, 6))


def test_hosts_of_single_frames_are_left_alone() -> None:
    host = DINOSAUR(**FEATURES)
    assert not carries_slots(host)
    carry = CarrySlots()
    carry.on_predict_start(None, host)  # type: ignore[arg-type]
    host(torch.randn(1, 2, 4, 6))
    assert carry.slots is None
