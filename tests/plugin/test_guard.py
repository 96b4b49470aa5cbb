import warnings

import pytest
import torch
from tiny_hosts import Recorder, fit, in_hook, make_callback, make_host

import ssync_pl.method.loss
from operations import Operations
from ssync_pl import SSyncConfig, SSyncMaps, ssync_loss
from ssync_pl.adapters.checks import kappa
from ssync_pl.errors import ConfigError
from ssync_pl.plugin.engine import SSyncEngine
from ssync_pl.plugin.guard import CollapseGuard, existing_slots, used_slots


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


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_a_relative_weight_follows_running_averages_and_gives_no_gradient(weight):
    engine = started(relative_weight=0.5, boundary_weight=weight, interior_weight=weight)
    averages = None
    for step, host in enumerate([2.0, -4.0, 8.0]):
        maps, leaf = random_maps(step), torch.tensor(host, requires_grad=True)
        own = float(ssync_loss(maps).loss)
        now = torch.tensor([abs(host), own])
        averages = now if averages is None else 0.98 * averages + 0.02 * now
        added, _ = engine.term(leaf, maps, step)
        assert added.item() == pytest.approx(0.5 * float(averages[0] / averages[1]) * own, rel=1e-5)
        assert torch.autograd.grad(added, leaf, allow_unused=True) == (None,)


def test_a_relative_weight_is_bounded_when_the_term_vanishes():
    logits = torch.zeros(1, 1, 2, 12)
    logits[:, :, 0] = 30.0
    maps, logs = SSyncMaps(attention_logits=logits, mask_logits=logits, grid=(3, 4)), {}
    added = term(started(relative_weight=0.1), 1.0, 0, maps, lambda name, value, **_: logs.update({name: value}))
    assert added == pytest.approx(0.0)
    assert float(logs["ssync/weight"]) == pytest.approx(10.0)


@pytest.mark.parametrize("losses", [(torch.nan, 3.0, 3.0), (3.0, torch.inf, 3.0)])
def test_one_bad_step_does_not_poison_the_average(losses):
    engine = started(relative_weight=0.1)
    assert [term(engine, value, step) for step, value in enumerate(losses)][2] == pytest.approx(0.3)


@pytest.mark.parametrize("extra", [{}, {"slot_valid": (2, 3), "patch_valid": (2, 2, 12)}])
def test_slots_that_the_guard_counts_are_those_of_the_loss(extra):
    generator = torch.Generator().manual_seed(7)
    maps = random_maps(slots=3, **{name: torch.rand(shape, generator=generator) < 0.4 for name, shape in extra.items()})
    out = ssync_loss(maps)
    assert used_slots(maps).tolist() == [out.used_encoder_slots.mean(), out.used_decoder_slots.mean()]
    assert existing_slots(maps) == (maps.slot_valid.sum(1).float().mean() if extra else 3)


# Settings; slots in use in the encoder's and the decoder's map, and slots that exist, first watched and then with SSync
# on; which windows are a collapse (None inside of one); what counts as before at the end.
GUARDED = {
    "the encoder's map": ({}, [(8, 8), (6, 8)], [True], (8, 8)),
    "the decoder's map": ({}, [(8, 8), (8, 6)], [True], (8, 8)),
    "less than a fifth": ({}, [(8, 8), (7, 7)], [False], (8, 8)),
    "another threshold": ({"threshold": 0.5}, [(8, 8), (4, 8)], [False], (8, 8)),
    "nothing before": ({}, [(0, 0), (1, 1)], [False], (0, 0)),
    "before is a mean": ({"watched": 2}, [(4, 6), (8, 2), (8, 8)], [False], (6, 4)),
    "a window is a mean": ({"window": 3}, [(8, 8), (8, 8), (5, 8), (2, 8)], [None, None, True], (8, 8)),
    "no warm-up": ({"window": 2, "watched": 0}, [(2, 8), (2, 8), (1, 8), (1, 8)], [None, False, None, True], (2, 8)),
    "adds slots and uses them": ({}, [(2, 2, 2), (4, 4, 4), (8, 8, 8), (2, 2, 8)], [False, False, True], (8, 8)),
    "adds slots while others fall out of use": ({}, [(4, 4, 4), (2, 2, 8)], [True], (4, 4)),
    "drops slots": ({}, [(8, 8, 11), (5, 5, 5), (3, 3, 5)], [False, True], (8, 8)),
    "wavers": ({}, [(5, 5, 6), (6, 6, 6.4), (6, 6, 5.9), (6, 6, 6.3)], [False, False, False], (5, 5)),
}


@pytest.mark.parametrize(("settings", "counts", "collapsed", "before"), GUARDED.values(), ids=GUARDED)
def test_windows_are_compared_with_what_was_before(settings, counts, collapsed, before):
    settings = {"threshold": 0.8, "window": 1, "watched": 1, **settings}
    guard = CollapseGuard("warn", settings["threshold"], settings["window"])
    steps = [(torch.tensor(one[:2]).float(), *map(torch.tensor, one[2:])) for one in counts]
    for one in steps[: settings["watched"]]:
        guard.watch(*one)
    verdicts = [guard.step(*one) for one in steps[settings["watched"] :]]
    assert [verdict and verdict.collapsed for verdict in verdicts] == collapsed
    assert guard.before == before


def watched(action="warn"):
    guard = CollapseGuard(action, 0.8, 1)
    guard.watch(torch.tensor([8.0, 8.0]))
    return guard


@pytest.mark.parametrize(
    ("action", "hint", "factors"),
    [
        ("warn", "on_collapse='backoff'", [1] * 16),
        ("stop", "The training stops", [1] * 16),
        ("backoff", "now x 0.5", [2**-i for i in range(1, 7)] + [0, 0] + [2**-i for i in range(6, -1, -1)] + [1]),
    ],
)
def test_actions_and_one_message_until_it_recovers(action, hint, factors):
    guard, verdicts, seen = watched(action), [], []
    for count in [1] * 8 + [8] * 8:
        verdicts.append(guard.step(torch.tensor([count, 8.0])))
        seen.append(guard.factor)
    assert seen == factors
    assert [verdict.stop for verdict in verdicts] == [action == "stop"] * 8 + [False] * 8
    messages = [verdict.message for verdict in (*verdicts, guard.step(torch.tensor([1.0, 8.0])))]
    assert [bool(message) for message in messages] == [True] + [False] * 15 + [True]
    assert "encoder 8.0 -> 1.0, decoder 8.0 -> 8.0 (threshold 80%)" in messages[0]
    assert hint in messages[0]


def test_a_loaded_sum_follows_the_device_of_the_next_step():
    other, seen = CollapseGuard("warn", 0.8, 1), []
    other.load_state_dict(watched().state_dict())
    other._take = lambda: (seen.append(other._sum.device.type), (8.0, 8.0))[1]
    other.step(torch.ones(2, device="meta"))
    assert seen[0] == "meta"


# The added loss is small, so that slots fall out of use only where a test makes them.
SETTINGS = {"warmup_steps": 3, "guard_window": 2, "collapse_threshold": 0.5, "boundary_weight": 1e-3}


def collapsing(at, *callbacks, steps, **options):
    host = make_host()
    host.collapse_at = at
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(host, make_callback(**SETTINGS, interior_weight=1e-3, **options), *callbacks, steps=steps)
    return trainer, [str(w.message) for w in caught if "Slots fall out of use" in str(w.message)]


def test_in_training_warn_tells_once_and_stop_stops_after_the_window():
    recorder = Recorder()
    _, messages = collapsing(4, recorder, steps=12)
    assert len(messages) == 1
    assert "Nothing was changed" in messages[0]
    assert {logs["ssync/weight"] for logs in recorder.logs[3:]} == {1.0}
    assert recorder.logs[-1]["ssync/used_slots"] == 1
    trainer, messages = collapsing(5, on_collapse="stop", steps=100)
    assert (trainer.should_stop, trainer.global_step) == (True, 7)
    assert "training stops" in messages[0]
    trainer, messages = collapsing(None, on_collapse="stop", steps=9)  # a healthy host is left alone
    assert (trainer.global_step, messages) == (9, [])


@pytest.mark.parametrize(
    "options", [{}, {"relative_weight": 0.1}, {"on_collapse": "backoff", "loss": "ce"}, {"gradient_share": 0.3}]
)
def test_the_device_is_read_in_the_first_step_and_at_the_end_of_a_window_only(monkeypatch, options):
    # The search for NaN is free on the CPU and returns at once elsewhere.
    monkeypatch.setattr(ssync_pl.method.loss, "_refuse_nan", lambda *args: None)
    reads, lists, tolist = [], [], torch.Tensor.tolist
    # On the CPU this reads memory without going through the dispatcher.
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (lists.append(1), tolist(tensor))[1])

    def count(trainer, module):
        step = module.training_step
        real = step.run

        def run(*args, **kwargs):
            lists.clear()
            with Operations() as mode:
                out = real(*args, **kwargs)
            waits = ("_local_scalar_dense", "nonzero", "equal")  # on an accelerator
            reads.append(sum(mode.counts[name] for name in waits) + len(lists))
            return out

        step.run = run

    look = in_hook("on_train_start", count)
    fit(make_host(), make_callback(warmup_steps=2, guard_window=3, **options), look, steps=11)
    # Steps 0 and 1 are the warm-up (the first is checked), 2 reads what was watched and tells of it, 4, 7 and 10 end a
    # window.
    busy = {0, 2, 4, 7, 10}
    assert [step for step, count in enumerate(reads) if count] == sorted(busy)
    assert [reads[step] for step in (2, 4, 7, 10)] == [2, 1 + ("gradient_share" in options), 1, 1]


def shared_maps(host_gradient=1.0, noise=0.5):
    """A host's loss and its maps, put together from tensors that the loss reads too; and these tensors."""
    generator = torch.Generator().manual_seed(1)
    objects = torch.eye(3)[:, torch.tensor([0, 0, 1, 2] * 3)]
    weights = [torch.randn((2, 3, 12), generator=generator).requires_grad_() for _ in range(4)]
    frames = [objects + noise * weight for weight in weights]
    loss = host_gradient * sum(frame.softmax(1).pow(3).sum() for frame in frames)
    d, a = torch.stack(frames[:2], 1), torch.stack(frames[2:], 1)
    return loss, SSyncMaps(attention_logits=d, mask_logits=a, grid=(3, 4)), frames


def norm(gradients):
    return float(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt())


@pytest.mark.parametrize(("scale", "interior"), [(1e-3, 1.0), (1.0, 0.25), (1e4, 1.0)])
def test_a_gradient_share_follows_the_gradients_at_both_maps_whatever_the_scale(scale, interior):
    engine = started(gradient_share=0.3, interior_weight=interior)
    for step in range(3):
        loss, maps, frames = shared_maps(scale)
        added, _ = engine.term(None, maps, step)
        if step < 2:
            (loss + added).backward()
    ours, own = (torch.autograd.grad(x, frames, retain_graph=True) for x in (added, loss))
    # The host's part is taken to be at right angles to SSync's, which it is only nearly.
    shares = [norm(ours[side]) / norm(own[side]) for side in (slice(2), slice(2, 4))]
    assert shares == pytest.approx([0.3 * interior, 0.3], rel=0.1)


def test_a_gradient_share_goes_on_exactly_from_a_saved_state():
    def run(engine, steps):
        for step in steps:
            loss, maps, _ = shared_maps(1 + step)
            added, _ = engine.term(None, maps, step)
            (loss + added).backward()
        return added.item()

    whole, first, second = (started(gradient_share=0.3) for _ in range(3))
    run(first, range(3))
    second.load_state_dict(first.state_dict())
    assert run(second, range(3, 6)) == run(whole, range(6))


@pytest.mark.parametrize("settings", [{"mode": "auto", "least_agreement": 0.0}, {"gradient_share": 0.9}])
def test_a_gradient_share_never_pushes_towards_one_slot_for_everything(settings):
    engine = started(**settings)
    for step in range(4):
        loss, maps, frames = shared_maps()
        if step == 3:  # the first slot wins all patches, but not by much
            maps = SSyncMaps(
                *(x + torch.tensor([4.0, 0, 0])[:, None] for x in (maps.attention, maps.masks)), grid=(3, 4)
            )
        added, _ = engine.term(None, maps, step)
        gradients = torch.autograd.grad(added, frames, retain_graph=True)
        assert (norm(gradients) == 0) == (step == 3)
        (loss + added).backward()


# Slots of slot attention and of the decoder in two frames of three patches a clip, patches that count, kappa by hand.
KAPPAS = [
    ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], None, 1.0),
    ([0, 0, 1, 1, 2, 2], [1, 1, 2, 2, 0, 0], None, -0.5),
    ([0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1], None, 1 / 3),
    ([0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1], [1, 1, 0, 0, 1, 1], 1.0),
    ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], None, 0.0),
    # Six patches where one slot wins, and four where agreement is chance; a clip without a patch.
    ([0] * 6 + [0, 0, 1, 1, 2, 2], [0] * 6 + [0, 1, 0, 1, 2, 2], [1] * 10 + [0] * 2, 0.0),
    ([0, 0, 0, 1, 1, 1] + [2] * 6, [0, 0, 1, 0, 1, 1] + [1] * 6, [1] * 6 + [0] * 6, 1 / 3),
]


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("encoder", "decoder", "valid", "expected"), KAPPAS)
def test_kappa_is_agreement_beyond_chance(encoder, decoder, valid, expected, default):
    labels = [torch.tensor(one).view(-1, 2, 3) for one in (encoder, decoder)]
    valid = None if valid is None else torch.tensor(valid).bool().view(-1, 2, 3)
    torch.set_default_dtype(default)  # as a Trainer in bf16-true does
    try:
        found = kappa(*labels, 3, valid)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype is torch.float32
    assert float(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("settings", [{"mode": "auto"}, {"relative_weight": 0.1, "least_agreement": 0.6}])
def test_maps_that_know_other_slots_add_nothing_until_they_agree(settings):
    def run(engine, steps, agree):
        for step in steps:
            loss, maps, frames = shared_maps(noise=0.1)
            if not agree:  # the same objects, in other slots
                maps = SSyncMaps(maps.attention_logits.roll(1, 2), mask_logits=maps.mask_logits, grid=(3, 4))
            added, _ = engine.term(loss, maps, step, lambda name, value, **_: logs.update({name: float(value)}))
            if added is not None:
                gradients = torch.autograd.grad(added, frames, retain_graph=True)
                (loss.detach() + added).backward()
            yield added is not None and norm(gradients) > 0

    settings = {"guard_window": 20, **settings}
    logs, engine, resumed, broken = {}, started(**settings), started(**settings), started(**settings)
    assert not any(run(engine, range(3), False))
    assert logs["ssync/kappa"] == pytest.approx(-0.5, abs=0.2)
    assert "never ran: kappa" in engine.summary(3)
    resumed.load_state_dict(engine.state_dict())
    pushed = list(run(resumed, range(3, 123), True))
    first = 3 + pushed.index(True)  # a running average of fifty steps, from -0.5 to 0.6, looked at every twenty
    assert first in {60, 80}
    assert all(pushed[first - 3 :])
    assert f"ran from optimizer step {first} to" in resumed.summary(123)
    assert resumed.guard.factor == 1
    with pytest.raises(ConfigError):
        broken.load_state_dict(engine.state_dict() | {"agreement": "much"})
    unasked = started(relative_weight=0.1)
    unasked.load_state_dict(engine.state_dict())
    assert "kappa" not in unasked.summary(3)


@pytest.mark.parametrize("action", ["backoff", "stop"])
def test_slots_that_are_lost_while_nothing_is_added_are_not_the_fault_of_ssync(action):
    engine = started(least_agreement=0.6, on_collapse=action, guard_window=2)
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        d, a = torch.randn((2, 2, 2, 6, 12), generator=generator)
        d[:, :, 2:] -= 100.0 * (step > 3)
        assert engine.term(torch.tensor(1.0), SSyncMaps(d, a, grid=(3, 4)), step) == (None, None)
    assert engine.guard.factor == 1


def test_where_the_host_has_no_gradient_at_its_maps_a_share_of_its_loss_is_added():
    engine = started(gradient_share=0.3, guard_window=2)
    engine.term(torch.tensor(3.0), shared_maps()[1], 0)[0].backward()
    with pytest.warns(UserWarning, match="relative_weight"):
        engine.term(torch.tensor(3.0), shared_maps()[1], 1)
    twin = started(gradient_share=0.3, guard_window=2)
    twin.load_state_dict(engine.state_dict())
    assert [term(one, 3.0, 2) for one in (engine, twin)] == pytest.approx([0.15, 0.15])


def test_a_gradient_share_is_that_of_the_scaled_loss_and_outlives_an_overflow():
    def last(scale, broken=None):
        engine = started(gradient_share=0.3)
        for step in range(4):
            loss, maps, frames = shared_maps(noise=0.01)  # nearly agreed, where the floor holds
            added, _ = engine.term(None, maps, step)
            if step == broken:
                frames[0].register_hook(lambda gradient: gradient * torch.inf)
            if step < 3:
                (scale * (loss + added)).backward()
        return norm(torch.autograd.grad(added, frames, allow_unused=True))

    assert [last(65536.0), last(0.125)] == pytest.approx([last(1.0)] * 2, rel=1e-3)
    assert last(1.0, broken=0) == pytest.approx(last(1.0), rel=0.3)


def test_a_gradient_share_never_adds_more_than_the_loss_of_the_host():
    engine = started(gradient_share=0.9)
    for step in range(4):
        loss, maps, _ = shared_maps(1e4)
        added, _ = engine.term(torch.tensor(0.01), maps, step)
        assert float(added) <= 0.01
        (loss + added).backward()
