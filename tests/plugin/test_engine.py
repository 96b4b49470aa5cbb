"""SSync in a training step, without a Trainer."""

import pytest
import torch

from ssync_pl import SSyncConfig, SSyncMaps, ssync_loss
from ssync_pl.plugin.engine import SSyncEngine
from ssync_pl.plugin.guard import used_slots


def random_maps(seed=0, slots=3, **extra):
    generator = torch.Generator().manual_seed(seed)
    d, a = (torch.randn((2, 2, slots, 12), generator=generator).requires_grad_() for _ in range(2))
    return SSyncMaps(attention_logits=d, mask_logits=a, grid=(3, 4), **extra)


def started(total=100, **options):
    engine = SSyncEngine(SSyncConfig(**{"warmup_steps": 0, **options}))
    engine.start(total)
    return engine


def term(engine, host_loss=None, step=0, maps=None, log=None):
    host = None if host_loss is None else torch.tensor(host_loss)
    value = engine.term(host, random_maps() if maps is None else maps, step, log)[0]
    return 0.0 if value is None else float(value)


def test_ramp_and_guard_scale_what_is_added():
    maps, engine = random_maps(), started(warmup_steps=2, ramp_steps=4)
    full = float(ssync_loss(maps).loss)
    added = [term(engine, step=step) for step in range(8)]
    assert added == pytest.approx([0, 0, full / 4, full / 2, full * 3 / 4, full, full, full])
    engine.guard.factor = 0.25
    assert term(engine, step=9) == pytest.approx(full / 4)


class TestRelativeWeight:
    @pytest.mark.parametrize("weight", [1.0, 10.0])
    def test_running_average_by_hand(self, weight):
        engine = started(relative_weight=0.5, boundary_weight=weight, interior_weight=weight)
        host_average = term_average = None
        for step, host in enumerate([2.0, -4.0, 8.0]):
            maps = random_maps(step)
            own = float(ssync_loss(maps).loss)
            host_average = host if host_average is None else 0.98 * host_average + 0.02 * abs(host)
            term_average = own if term_average is None else 0.98 * term_average + 0.02 * own
            expected = 0.5 * host_average / term_average * own
            assert term(engine, host, step, maps) == pytest.approx(expected, rel=1e-5)

    def test_weight_is_bounded_when_the_term_vanishes(self):
        logits = torch.zeros(1, 1, 2, 12)
        logits[:, :, 0] = 30.0
        maps, logs = SSyncMaps(attention_logits=logits, mask_logits=logits, grid=(3, 4)), {}
        added = term(started(relative_weight=0.1), 1.0, 0, maps, lambda name, value, **_: logs.update({name: value}))
        assert added == pytest.approx(0.0)
        assert float(logs["ssync/weight"]) == pytest.approx(10.0)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("when", [0, 1])
    def test_one_bad_step_does_not_poison_the_average(self, bad, when):
        engine, losses = started(relative_weight=0.1), [3.0, 3.0, 3.0]
        losses[when] = bad
        assert [term(engine, value, step) for step, value in enumerate(losses)][2] == pytest.approx(0.3)

    def test_no_gradient_through_the_weight(self):
        host = torch.tensor(2.0, requires_grad=True)
        value, _ = started(relative_weight=0.1).term(host, random_maps(), 0)
        assert torch.autograd.grad(value, host, allow_unused=True) == (None,)


def test_used_slots_by_hand():
    attention = torch.full((2, 1, 3, 4), -1.0)
    attention[0, 0, 0, :2] = attention[0, 0, 1, 2:] = 1.0
    attention[1, 0, 2] = 1.0
    maps = SSyncMaps(attention_logits=attention, mask_probs=torch.zeros(2, 1, 3, 4) + 1 / 3, grid=(2, 2))
    # Attention: 2 and 1 slots; masks tie, and ties go to the first slot.
    assert used_slots(maps).tolist() == [1.5, 1.0]

    logits = torch.zeros(1, 1, 3, 4)
    logits[0, 0, 2, 0] = logits[0, 0, 1, 1] = 9.0
    kwargs = {"attention_logits": logits, "mask_logits": logits, "grid": (2, 2)}
    assert used_slots(SSyncMaps(**kwargs)).tolist() == [3.0, 3.0]
    assert used_slots(SSyncMaps(**kwargs, slot_valid=torch.tensor([[True, True, False]]))).tolist() == [2.0, 2.0]
    patches = torch.tensor([[[True, False, True, True]]])
    assert used_slots(SSyncMaps(**kwargs, patch_valid=patches)).tolist() == [2.0, 2.0]
