"""The collapse guard: its verdicts by hand, in a training whose slots fall out of use, and what it costs."""

import warnings

import pytest
import torch
from tiny_hosts import Recorder, fit, in_hook, make_callback, make_host
from torch.utils._python_dispatch import TorchDispatchMode

import ssync_pl.method.loss
from ssync_pl.plugin.guard import CollapseGuard, GuardVerdict


def used(encoder, decoder=8.0):
    return torch.tensor([float(encoder), float(decoder)])


def watched(action="warn", threshold=0.8, window=1, before=(8.0, 8.0)):
    guard = CollapseGuard(action, threshold, window)
    guard.watch(torch.tensor(before))
    return guard


def test_windows_average_and_are_judged_at_their_end():
    guard = watched(window=3)
    assert [guard.step(used(count)) is None for count in (8, 5)] == [True, True]
    assert guard.step(used(2)).collapsed
    assert guard.latest == (5.0, 8.0)
    assert [guard.step(used(8)) for _ in range(3)] == [None, None, GuardVerdict(collapsed=False)]
    guard = CollapseGuard("warn", 0.5, 1)  # before is the mean of all watched steps
    guard.watch(used(4, 6))
    guard.watch(used(8, 2))
    guard.step(used(8))
    assert guard.before == (6.0, 4.0)
    guard = CollapseGuard("stop", 0.8, 2)  # or the first window, where there is no warm-up
    verdicts = [guard.step(used(count)) for count in (2, 2, 1, 1)]
    assert guard.before == (2.0, 8.0)
    assert (verdicts[1].collapsed, verdicts[3].stop) == (False, True)


@pytest.mark.parametrize(
    ("settings", "now", "collapsed"),
    [
        ({}, (8, 8), False),
        ({}, (6, 8), True),
        ({}, (8, 6), True),
        ({}, (7, 7), False),
        ({"threshold": 0.5}, (4, 8), False),
        ({"before": (0.0, 0.0)}, (1, 1), False),
    ],
)
def test_either_map_counts(settings, now, collapsed):
    assert watched(**settings).step(used(*now)).collapsed is collapsed


@pytest.mark.parametrize(
    ("action", "hint", "factor"),
    [("warn", "on_collapse='backoff'", 1.0), ("backoff", "now x 0.5", 0.25), ("stop", "The training stops", 1.0)],
)
def test_actions_and_one_message_until_it_recovers(action, hint, factor):
    guard = watched(action)
    verdicts = [guard.step(used(count)) for count in (2, 2, 8, 2)]
    messages = [verdict.message for verdict in verdicts]
    assert [bool(message) for message in messages] == [True, False, False, True]
    assert "encoder 8.0 -> 2.0, decoder 8.0 -> 8.0 (threshold 80%)" in messages[0]
    assert hint in messages[0]
    assert [verdict.stop for verdict in verdicts] == [action == "stop"] * 2 + [False, action == "stop"]
    assert guard.factor == factor


def test_backoff_goes_to_zero_and_comes_back():
    guard = watched("backoff")

    def factors(count):
        return [(guard.step(used(count)), guard.factor)[1] for _ in range(8)]

    assert factors(1) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 0, 0]
    assert factors(8) == [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 1]


# Slots in use and slots that exist, first watched, then with SSync on; which windows are a collapse; what counts after.
HOSTS = {
    "adds slots and uses them": ([(2, 2), (4, 4), (8, 8), (2, 8)], [False, False, True], 8.0),
    "adds slots while others fall out of use": ([(4, 4), (2, 8)], [True], 4.0),
    "drops slots": ([(8, 11), (5, 5), (3, 5)], [False, True], 8.0),
    "wavers": ([(5, 6), (5.5, 6.4), (5.5, 5.9), (5.5, 6.3)], [False, False, False], 5.0),
}


@pytest.mark.parametrize(("counts", "collapsed", "before"), HOSTS.values(), ids=HOSTS.keys())
def test_hosts_that_change_how_many_slots_exist(counts, collapsed, before):
    guard = CollapseGuard("warn", 0.8, 1)
    first, *later = [(used(count, count), torch.tensor(float(existing))) for count, existing in counts]
    guard.watch(*first)
    assert [guard.step(*one).collapsed for one in later] == collapsed
    assert guard.before == (before, before)


def test_a_loaded_sum_follows_the_device_of_the_next_step():
    other, seen = CollapseGuard("warn", 0.8, 1), []
    other.load_state_dict(watched().state_dict())
    other._take = lambda: (seen.append(other._sum.device.type), (8.0, 8.0))[1]
    other.step(torch.ones(2, device="meta"))
    assert seen[0] == "meta"


# The added loss is small, so that slots fall out of use only where a test makes them.
SETTINGS = {"warmup_steps": 3, "guard_window": 2, "collapse_threshold": 0.5, "boundary_weight": 1e-3}


def collapsing(at, *callbacks, steps, **options):
    """Trains a host whose slots fall out of use at a step; returns the trainer and what was told."""
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


class CountReads(TorchDispatchMode):
    """Counts what would make an accelerator wait."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        self.reads += func in (torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"relative_weight": 0.1}, {"on_collapse": "backoff", "loss": "ce"}])
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
            with CountReads() as mode:
                out = real(*args, **kwargs)
            reads.append(mode.reads + len(lists))
            return out

        step.run = run

    look = in_hook("on_train_start", count)
    fit(make_host(), make_callback(warmup_steps=2, guard_window=3, **options), look, steps=11)
    # Steps 0 and 1 are the warm-up (the first is checked), 2 reads what was watched, 4, 7 and 10 end a window.
    busy = {0, 2, 4, 7, 10}
    assert [step for step, count in enumerate(reads) if count] == sorted(busy)
    assert all(reads[step] == 1 for step in busy - {0})
