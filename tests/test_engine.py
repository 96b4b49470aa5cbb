"""The regulariser in a training step, without a Trainer."""

import types
import warnings

import pytest
import torch

import ssync_pl.plugin.engine
from ssync_pl import SSyncConfig, SSyncMaps, ssync_loss
from ssync_pl.errors import ConfigError, SSyncError
from ssync_pl.plugin.engine import SSyncEngine, heed
from ssync_pl.plugin.guard import GuardVerdict
from ssync_pl.plugin.maturity import watched
from ssync_pl.plugin.schedule import Phase


def random_maps(seed=0, slots=3, **extra):
    generator = torch.Generator().manual_seed(seed)
    d, a = (torch.randn((2, 2, slots, 12), generator=generator).requires_grad_() for _ in range(2))
    return SSyncMaps(attention_logits=d, mask_logits=a, grid=(3, 4), **extra)


def started(total=100, **options):
    engine = SSyncEngine(SSyncConfig(**{"warmup_steps": 0, **options}))
    engine.start(total)
    return engine


def test_adds_the_loss_with_its_options():
    maps = random_maps()
    options = {"merge_threshold": 0.2, "boundary_weight": 0.5, "loss": "ce"}
    total, verdict = started(**options).apply(torch.tensor(2.0), maps, step=0)
    torch.testing.assert_close(total, 2.0 + ssync_loss(maps, **options).loss)
    assert verdict is None


def test_off_returns_the_very_same_loss_and_does_not_call_maps():
    loss = torch.tensor(1.0)
    total, verdict = started(warmup_steps=10, guard_window=2).apply(loss, lambda: pytest.fail("called"), step=7)
    assert total is loss
    assert verdict is None


def test_watch_returns_the_very_same_loss_and_counts(monkeypatch):
    monkeypatch.setattr(ssync_pl.plugin.engine, "ssync_loss", lambda *args, **kwargs: pytest.fail("called"))
    engine, loss, logs = started(warmup_steps=10, guard_window=2), torch.tensor(1.0), []
    total, _ = engine.apply(loss, random_maps, 8, lambda name, value, prog_bar=False: logs.append(name))
    assert total is loss
    assert not logs
    assert engine.guard.state_dict()["count"] == 1


def test_maps_may_be_a_function():
    one, _ = started().apply(torch.tensor(1.0), random_maps, 0)
    two, _ = started().apply(torch.tensor(1.0), random_maps(), 0)
    assert torch.equal(one, two)


def test_needs_a_start():
    with pytest.raises(SSyncError, match=r"Expected `start\(total_steps\)` to be called"):
        SSyncEngine(SSyncConfig()).apply(torch.tensor(1.0), random_maps, 0)


@pytest.mark.parametrize("options", [{"warmup_steps": 4}, {"warmup_ratio": 0.0}])
def test_length_of_the_trainer_is_not_asked_for_without_need(options):
    class Trainer:
        @property
        def estimated_stepping_batches(self):
            raise AssertionError("asked for")

    engine = SSyncEngine(SSyncConfig(**options))
    engine.start_in(Trainer())
    assert engine.schedule.start == options.get("warmup_steps", 0)


def test_length_of_the_trainer():
    engine = SSyncEngine(SSyncConfig())
    engine.start_in(types.SimpleNamespace(estimated_stepping_batches=200))
    assert engine.schedule.start == 60
    with pytest.raises(ConfigError, match="warmup_steps"):
        engine.start_in(types.SimpleNamespace(estimated_stepping_batches=float("inf")))


def test_ramp_scales_what_is_added():
    maps, engine = random_maps(), started(warmup_steps=2, ramp_steps=4)
    full = float(ssync_loss(maps).loss)
    added = [float(engine.apply(torch.tensor(0.0), maps, step)[0]) for step in range(8)]
    assert added == pytest.approx([0, 0, full / 4, full / 2, full * 3 / 4, full, full, full])
    assert engine.phase(1) is Phase.WATCH


def test_factor_of_the_guard_scales_what_is_added():
    engine = started()
    engine.guard.factor = 0.25
    maps = random_maps()
    torch.testing.assert_close(engine.apply(torch.tensor(0.0), maps, 0)[0], ssync_loss(maps).loss / 4)


class TestRelativeWeight:
    def test_first_step_has_exactly_the_share(self):
        total, _ = started(relative_weight=0.1).apply(torch.tensor(50.0), random_maps(), 0)
        assert float(total) == pytest.approx(55.0)

    def test_negative_losses_count_by_their_size(self):
        total, _ = started(relative_weight=0.1).apply(torch.tensor(-50.0), random_maps(), 0)
        assert float(total) == pytest.approx(-45.0)

    def test_running_average_by_hand(self):
        engine, hosts = started(relative_weight=0.5), [2.0, 4.0, 8.0]
        host_average = term_average = None
        for step, value in enumerate(hosts):
            maps = random_maps(step)
            term = float(ssync_loss(maps).loss)
            host_average = value if host_average is None else 0.98 * host_average + 0.02 * value
            term_average = term if term_average is None else 0.98 * term_average + 0.02 * term
            total, _ = engine.apply(torch.tensor(value), maps, step)
            assert float(total) == pytest.approx(value + 0.5 * host_average / term_average * term, rel=1e-5)

    def test_weights_set_the_mix_only(self):
        maps = random_maps()
        one, _ = started(relative_weight=0.1).apply(torch.tensor(1.0), maps, 0)
        two, _ = started(relative_weight=0.1, boundary_weight=10.0, interior_weight=10.0).apply(
            torch.tensor(1.0), maps, 0
        )
        torch.testing.assert_close(one, two)

    def test_weight_is_bounded_when_the_term_vanishes(self):
        logits = torch.zeros(1, 1, 2, 12)
        logits[:, :, 0] = 30.0
        maps = SSyncMaps(attention_logits=logits, mask_logits=logits, grid=(3, 4))
        logs = {}
        total, _ = started(relative_weight=0.1).apply(
            torch.tensor(1.0), maps, 0, lambda name, value, prog_bar=False: logs.update({name: float(value)})
        )
        assert float(total) == pytest.approx(1.0)
        assert logs["ssync/weight"] == pytest.approx(10.0)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("when", [0, 1])
    def test_one_bad_step_does_not_poison_the_average(self, bad, when):
        engine, maps = started(relative_weight=0.1), random_maps()
        losses = [3.0, 3.0, 3.0]
        losses[when] = bad
        totals = [float(engine.apply(torch.tensor(value), maps, step)[0]) for step, value in enumerate(losses)]
        assert totals[2] == pytest.approx(3.3)

    def test_no_gradient_through_the_weight(self):
        host = torch.tensor(2.0, requires_grad=True)
        total, _ = started(relative_weight=0.1).apply(host, random_maps(), 0)
        assert torch.autograd.grad(total, host)[0] == 1.0

    def test_state(self):
        one, two = started(relative_weight=0.1), started(relative_weight=0.1)
        one.apply(torch.tensor(2.0), random_maps(0), 0)
        two.load_state_dict(one.state_dict())
        for step in (1, 2):
            args = (torch.tensor(5.0), random_maps(step), step)
            assert torch.equal(one.apply(*args)[0], two.apply(*args)[0])
        assert one.state_dict() == two.state_dict()


def test_used_slots_by_hand():
    attention = torch.full((2, 1, 3, 4), -1.0)
    attention[0, 0, 0, :2] = attention[0, 0, 1, 2:] = 1.0
    attention[1, 0, 2] = 1.0
    masks = torch.zeros(2, 1, 3, 4)
    maps = SSyncMaps(attention_logits=attention, mask_probs=masks + 1 / 3, grid=(2, 2))
    # Attention: 2 and 1 slots; masks tie, and ties go to the first slot.
    assert watched(maps)[1:].tolist() == [1.5, 1.0]


def test_used_slots_leave_out_what_is_not_valid():
    logits = torch.zeros(1, 1, 3, 4)
    logits[0, 0, 2, 0] = 9.0
    logits[0, 0, 1, 1] = 9.0
    kwargs = {"attention_logits": logits, "mask_logits": logits, "grid": (2, 2)}
    assert watched(SSyncMaps(**kwargs))[1:].tolist() == [3.0, 3.0]
    assert watched(SSyncMaps(**kwargs, slot_valid=torch.tensor([[True, True, False]])))[1:].tolist() == [2.0, 2.0]
    patches = torch.tensor([[[True, False, True, True]]])
    assert watched(SSyncMaps(**kwargs, patch_valid=patches))[1:].tolist() == [2.0, 2.0]


def test_used_slots_agree_with_the_loss():
    for extra in ({}, {"slot_valid": torch.tensor([[True, True, False], [True, True, True]])}):
        maps = random_maps(3, **extra)
        out = ssync_loss(maps)
        expected = torch.stack([out.used_encoder_slots.mean(), out.used_decoder_slots.mean()])
        assert torch.equal(watched(maps)[1:], expected)


def test_verdict_at_the_end_of_a_window():
    engine = started(guard_window=2)
    verdicts = [engine.apply(torch.tensor(1.0), random_maps(), step)[1] for step in range(4)]
    assert [verdict is not None for verdict in verdicts] == [False, True, False, True]


@pytest.mark.parametrize("zero", [True, False])
def test_heed(zero):
    trainer = types.SimpleNamespace(is_global_zero=zero, should_stop=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        heed(GuardVerdict(True, "told", stop=True), trainer)
    assert [str(w.message) for w in caught] == (["told"] if zero else [])
    assert trainer.should_stop
    trainer.should_stop = False
    heed(GuardVerdict(False), trainer)
    heed(None, trainer)
    assert not trainer.should_stop


def test_float64_maps_and_half_losses():
    d = torch.randn(1, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    maps = SSyncMaps(attention_logits=d, mask_logits=d, grid=(2, 2))
    engine = started(relative_weight=0.1, guard_window=5)
    total, _ = engine.apply(torch.tensor(1.0, dtype=torch.float64), maps, 0)
    assert total.dtype == torch.float64
    total, _ = engine.apply(torch.tensor(1.0, dtype=torch.bfloat16), random_maps(), 1)
    assert total.dtype == torch.float32
    assert engine.guard._sum.dtype == torch.float32
