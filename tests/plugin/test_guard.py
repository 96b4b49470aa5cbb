"""Verdicts of the collapse guard, by hand."""

import pytest
import torch

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


def test_before_is_the_mean_of_all_watched_steps():
    guard = CollapseGuard("warn", 0.5, 1)
    guard.watch(used(4, 6))
    guard.watch(used(8, 2))
    guard.step(used(8))
    assert guard.before == (6.0, 4.0)


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


def test_first_window_stands_for_before_without_a_warm_up():
    guard = CollapseGuard("stop", 0.8, 2)
    verdicts = [guard.step(used(count)) for count in (2, 2, 1, 1)]
    assert guard.before == (2.0, 8.0)
    assert (verdicts[1].collapsed, verdicts[3].stop) == (False, True)


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


@pytest.mark.parametrize("cut", range(9))
def test_state_continues_where_it_was(cut):
    values = [8, 8, 3, 3, 2, 8, 8, 8, 1]

    def feed(guard, index):
        return (guard.watch if index < 2 else guard.step)(used(values[index]), 8.0 if index < 5 else 9.0)

    whole, first, second = (CollapseGuard("backoff", 0.8, 2) for _ in range(3))
    expected = [feed(whole, i) for i in range(9)]
    got = [feed(first, i) for i in range(cut)]
    state = first.state_dict()
    assert {type(value) for value in state.values()} <= {float, int, bool, list, tuple, type(None)}
    second.load_state_dict(state)
    assert got + [feed(second, i) for i in range(cut, 9)] == expected
    assert second.state_dict() == whole.state_dict()


def test_a_loaded_sum_follows_the_device_of_the_next_step():
    other, seen = CollapseGuard("warn", 0.8, 1), []
    other.load_state_dict(watched().state_dict())
    other._take = lambda: (seen.append(other._sum.device.type), (8.0, 8.0))[1]
    other.step(torch.ones(2, device="meta"))
    assert seen[0] == "meta"


def test_counts_carry_no_gradient_and_are_not_changed():
    guard, value = watched(window=5), torch.tensor([3.0, 3.0], requires_grad=True)
    guard.step(value)
    guard.step(value)
    assert not guard._sum.requires_grad
    assert value.tolist() == [3.0, 3.0]
