"""When a host counts as mature, by hand, and what the engine does until then."""

import json
import warnings

import pytest
import torch
from ssync_pl.plugin.maturity import Maturity, watched

import ssync_pl.plugin.engine
from ssync_pl import SSyncConfig, SSyncMaps, attach, ssync_loss
from ssync_pl.hosts import SlotContrast
from ssync_pl.plugin.engine import SSyncEngine
from ssync_pl.plugin.schedule import Phase


def verdicts(rows, threshold=0.9, window=1):
    maturity = Maturity(threshold, window)
    return [maturity.add(torch.tensor([float(x) for x in row]), step) for step, row in enumerate(rows)]


def maps_of(encoder, decoder, slots=3, **extra):
    """Maps whose winners are given."""
    d, a = (10 * torch.nn.functional.one_hot(torch.tensor(x), slots).T[None, None].float() for x in (encoder, decoder))
    return SSyncMaps(attention_logits=d.requires_grad_(), mask_logits=a.requires_grad_(), grid=(2, 2), **extra)


APART, ALIKE = maps_of([0, 0, 1, 2], [1, 2, 2, 0]), maps_of([0, 0, 1, 2], [0, 0, 1, 1])


def test_watched_by_hand():
    assert watched(ALIKE).tolist() == [0.75, 3, 2]
    valid = torch.tensor([[[True, True, False, True]]])
    assert watched(maps_of([0, 0, 1, 2], [0, 1, 1, 1], patch_valid=valid))[0].item() == pytest.approx(1 / 3)
    exists = torch.tensor([[True, False, True]])
    value = torch.tensor([[[[0.0] * 4, [9.0] * 4, [1.0, 1.0, -1.0, -1.0]]]])
    gone = SSyncMaps(attention_logits=value, mask_logits=value, grid=(2, 2), slot_valid=exists)
    assert watched(gone).tolist() == [1.0, 2.0, 2.0]


def test_agreement_is_that_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    d, a = (torch.randn((2, 2, 3, 12), generator=generator) for _ in range(2))
    maps = SSyncMaps(attention_logits=d, mask_logits=a, grid=(3, 4))
    output = ssync_loss(maps, merge=False)
    assert watched(maps)[0] == output.agreement
    assert watched(maps)[2] == output.used_decoder_slots.mean()


def test_windows_are_averaged():
    assert verdicts([(0.4, 7, 7), (0.6, 7, 7), (0.6, 7, 7), (0.8, 7, 7)], 0.6, 2) == [None, False, None, True]


def test_agreement_at_the_threshold():
    assert verdicts([(0.49, 7, 7)], 0.5) == [False]
    assert verdicts([(0.5, 7, 7)], 0.5) == [True]


@pytest.mark.parametrize("used", [(1, 1), (1, 7), (7, 1)])
def test_everything_in_one_slot_is_not_mature(used):
    assert not any(verdicts([(1.0, *used)] * 9, 0.5))


@pytest.mark.parametrize(
    ("rows", "mature"),
    [
        ([(0.4, 7, 7)] * 4, True),
        ([(0.4, 7, 7)] * 3, False),
        ([(0.395, 7, 7), (0.4, 6.9, 7), (0.41, 7, 7.1), (0.4, 7, 7)], True),
        ([(0.34, 7, 7), (0.36, 7, 7), (0.38, 7, 7), (0.40, 7, 7)], False),  # still rising
        ([(0.45, 7, 7), (0.35, 7, 7), (0.45, 7, 7), (0.35, 7, 7)], False),  # fluctuating
        ([(0.4, 5, 7), (0.4, 6, 7), (0.4, 6.5, 7), (0.4, 7, 7)], False),
        ([(0.4, 7, 7), (0.4, 7, 6.5), (0.4, 7, 6), (0.4, 7, 5)], False),
        ([(0.15, 7, 7)] * 9, False),  # chance: nothing is learned
        ([(0.1, 7, 7), (0.3, 7, 7), *[(0.4, 7, 7)] * 4], True),
    ],
)
def test_settled(rows, mature):
    assert verdicts(rows)[-1] is mature


def test_state_goes_through_json_and_continues_alike():
    one, two = Maturity(0.9, 2), Maturity(0.9, 2)
    for step in range(5):
        one.add(torch.tensor([0.1 * step, 3.3, 4.4]), step)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.state_dict() == one.state_dict()
    assert two.latest == one.latest
    for maturity in (one, two):
        maturity.add(torch.tensor([0.95, 3.3, 4.4]), 5)
        maturity.add(torch.tensor([0.95, 3.3, 4.4]), 6)
        maturity.add(torch.tensor([0.95, 3.3, 4.4]), 7)
    assert two.state_dict() == one.state_dict()
    assert one.opened == 8


def engine_with(total=100, **options):
    engine = SSyncEngine(SSyncConfig(**{"warmup_steps": 4, "guard_window": 2, "start": "mature", **options}))
    engine.start(total)
    return engine


def run(engine, maps, steps, logs=None):
    def log(name, value, prog_bar=False):
        logs.setdefault(name, []).append(float(value))

    zero = torch.zeros(())
    return [float(engine.apply(zero, maps, step, None if logs is None else log)[0].detach()) for step in steps]


def test_waits_after_the_warm_up_until_the_host_is_mature():
    engine, logs = engine_with(), {}
    assert [engine.phase(step).value for step in (0, 2, 4, 90)] == ["off", "watch", "wait", "wait"]
    assert run(engine, APART, range(8), logs) == [0.0] * 8
    assert logs["ssync/agreement"] == [0.0] * 4
    assert logs["ssync/weight"] == [0.0] * 4
    added = run(engine, ALIKE, range(8, 14))
    full = float(ssync_loss(ALIKE).loss.detach())
    assert added == pytest.approx([0, 0, full, full, full, full])
    assert engine.phase(10) is Phase.ON
    assert engine.guard.before == (3.0, 2.0)  # of the last window alone


def test_a_mature_host_gets_ssync_right_after_the_warm_up():
    engine, plain = engine_with(), engine_with(start="schedule")
    assert run(engine, ALIKE, range(8)) == run(plain, ALIKE, range(8))
    assert engine.guard.state_dict() == plain.guard.state_dict()


def test_the_ramp_begins_when_it_is_switched_on():
    engine = engine_with(ramp_steps=4)
    run(engine, APART, range(8))
    full = float(ssync_loss(ALIKE).loss.detach())
    added = run(engine, ALIKE, range(8, 16))
    assert added == pytest.approx([0, 0, full / 4, full / 2, full * 3 / 4, full, full, full])


def test_accumulated_batches_share_a_phase():
    engine = engine_with(warmup_steps=0, guard_window=1)
    assert run(engine, ALIKE, [0, 0, 0]) == [0.0] * 3
    assert run(engine, ALIKE, [1])[0] > 0


def test_without_a_warm_up():
    assert engine_with(warmup_steps=0).phase(0) is Phase.WAIT


def test_state_only_with_maturity():
    assert "maturity" not in engine_with(start="schedule").state_dict()
    engine = engine_with()
    engine.load_state_dict(engine_with(start="schedule").state_dict())
    assert engine.maturity.opened is None


def test_the_loss_is_not_computed_while_waiting(monkeypatch):
    monkeypatch.setattr(ssync_pl.plugin.engine, "ssync_loss", lambda *args, **kwargs: pytest.fail("called"))
    loss = torch.tensor(1.0)
    assert engine_with().apply(loss, APART, 50)[0] is loss


def test_message_only_where_it_waited_in_vain():
    engine = engine_with()
    assert engine.never_started(4) == ""
    assert "no window" in engine.never_started(5)
    run(engine, APART, range(8))
    assert "agree on 0% of the patches, 3.0 slots in use" in engine.never_started(8)
    run(engine, ALIKE, range(8, 12))
    assert engine.never_started(12) == ""
    assert engine_with(start="schedule").never_started(90) == ""


@pytest.mark.parametrize("threshold", [1e-6, 1.0])
def test_attached(threshold):
    torch.manual_seed(0)
    sizes = {"backbone": None, "feature_dim": 6, "grid": (3, 4), "decoder_hidden": (8,)}
    host, clips = SlotContrast(num_slots=3, slot_dim=8, **sizes), torch.randn(2, 2, 12, 6)
    options = {"warmup_steps": 1, "start": "mature", "mature_agreement": threshold, "guard_window": 2}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with attach(host, **options) as ssync:
            added = []
            for _ in range(5):
                host(clips)
                added.append(bool(ssync.loss() > 0))
    told = [w for w in caught if "never switched on" in str(w.message)]
    mature = threshold < 1
    assert added == [False, False, mature, mature, mature]
    assert len(told) == (not mature)
    assert ("maturity" in ssync.state_dict()) is True
