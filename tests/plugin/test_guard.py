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
    assert guard.step(used(8)) is None
    assert guard.step(used(5)) is None
    verdict = guard.step(used(2))
    assert verdict.collapsed
    assert guard.latest == (5.0, 8.0)
    assert guard.step(used(8)) is None
    assert guard.step(used(8)) is None
    assert guard.step(used(8)) == GuardVerdict(collapsed=False)


def test_before_is_the_mean_of_all_watched_steps():
    guard = CollapseGuard("warn", 0.5, 1)
    guard.watch(used(4, 6))
    guard.watch(used(8, 2))
    guard.step(used(8))
    assert guard.before == (6.0, 4.0)


@pytest.mark.parametrize(
    ("encoder", "decoder", "collapsed"), [(8, 8, False), (6, 8, True), (8, 6, True), (7, 7, False)]
)
def test_either_map_counts(encoder, decoder, collapsed):
    assert watched().step(used(encoder, decoder)).collapsed is collapsed


def test_exactly_the_threshold_is_no_collapse():
    assert not watched(threshold=0.5).step(used(4)).collapsed


def test_first_window_stands_for_before_without_a_warm_up():
    guard = CollapseGuard("stop", 0.8, 2)
    assert guard.step(used(2)) is None
    assert not guard.step(used(2)).collapsed
    assert guard.before == (2.0, 8.0)
    guard.step(used(1))
    assert guard.step(used(1)).stop


def test_less_than_one_slot_before_does_not_divide_by_nothing():
    assert watched(before=(0.0, 0.0)).step(used(1, 1)).collapsed is False


@pytest.mark.parametrize("action", ["warn", "backoff", "stop"])
def test_message_once_until_it_recovers(action):
    guard = watched(action)
    messages = [guard.step(used(n)).message for n in (2, 2, 8, 2)]
    assert [bool(message) for message in messages] == [True, False, False, True]
    assert "encoder 8.0 -> 2.0, decoder 8.0 -> 8.0 (threshold 80%)" in messages[0]
    hint = {"warn": "on_collapse='backoff'", "backoff": "now x 0.5", "stop": "The training stops"}[action]
    assert hint in messages[0]
    assert "`relative_weight`" in messages[0]


def test_only_stop_stops_and_only_backoff_changes_the_weight():
    for action in ("warn", "backoff", "stop"):
        guard = watched(action)
        assert guard.step(used(1)).stop is (action == "stop")
        assert guard.factor == (0.5 if action == "backoff" else 1.0)


def test_backoff_goes_to_zero_and_comes_back():
    guard = watched("backoff")
    down = []
    for _ in range(8):
        guard.step(used(1))
        down.append(guard.factor)
    assert down == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 0, 0]
    up = []
    for _ in range(8):
        guard.step(used(8))
        up.append(guard.factor)
    assert up == [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 1]


def test_a_host_that_adds_slots_is_measured_by_what_it_then_uses():
    guard = CollapseGuard("warn", 0.8, 2)
    guard.watch(used(2, 2), 2.0)
    assert not guard.step(used(2, 2), 2.0)
    # Half of the window has four slots, of which nearly all are used.
    assert not guard.step(used(4, 3), 4.0).collapsed
    assert guard.before == (3.0, 2.5)
    for existing in (4.0, 8.0):
        guard.step(used(existing), existing)
        assert not guard.step(used(existing), existing).collapsed
    assert guard.before == (8.0, 8.0)
    guard.step(used(2), 8.0)
    assert guard.step(used(2), 8.0).collapsed


def test_slots_that_fall_out_of_use_while_others_are_added_are_a_collapse():
    guard = CollapseGuard("warn", 0.8, 1)
    guard.watch(used(4, 4), 4.0)
    assert guard.step(used(2, 2), 8.0).collapsed
    assert guard.before == (4.0, 4.0)


def test_slots_that_the_host_drops_are_not_missed():
    guard = CollapseGuard("warn", 0.8, 1)
    guard.watch(used(8, 8), torch.tensor(11.0))
    assert not guard.step(used(5, 5), torch.tensor(5.0)).collapsed
    verdict = guard.step(used(3, 3), torch.tensor(5.0))
    assert verdict.collapsed
    assert "encoder 5.0 -> 3.0" in verdict.message
    assert guard.before == (8.0, 8.0)


def test_a_number_of_slots_that_wavers_does_not_move_what_is_compared_with():
    guard = CollapseGuard("warn", 0.8, 1)
    guard.watch(used(5, 5), 6.0)
    for existing in (6.4, 5.9, 6.3, 6.4):
        guard.step(used(5.5, 5.5), existing)
    assert guard.before == (5.0, 5.0)


@pytest.mark.parametrize("cut", range(9))
def test_state_continues_where_it_was(cut):
    values = [8, 8, 3, 3, 2, 8, 8, 8, 1]

    def feed(guard, index):
        existing = 8.0 if index < 5 else 9.0
        if index < 2:
            guard.watch(used(values[index]), existing)
            return None
        return guard.step(used(values[index]), existing)

    whole, first, second = (CollapseGuard("backoff", 0.8, 2) for _ in range(3))
    expected = [feed(whole, i) for i in range(9)]
    got = [feed(first, i) for i in range(cut)]
    second.load_state_dict(first.state_dict())
    got += [feed(second, i) for i in range(cut, 9)]
    assert got == expected
    assert second.state_dict() == whole.state_dict()


def test_state_is_plain_numbers():
    guard = watched(window=3)
    guard.step(used(4))
    kinds = {type(value) for value in guard.state_dict().values()}
    assert kinds <= {float, int, bool, list, tuple, type(None)}


def test_a_loaded_sum_follows_the_device_of_the_next_step():
    guard = watched()
    other = CollapseGuard("warn", 0.8, 1)
    other.load_state_dict(guard.state_dict())
    seen = []
    other._take = lambda: (seen.append(other._sum.device.type), (8.0, 8.0))[1]
    other.step(torch.ones(2, device="meta"))
    assert seen[0] == "meta"


def test_counts_carry_no_gradient_and_are_not_changed():
    guard, value = watched(window=5), torch.tensor([3.0, 3.0], requires_grad=True)
    guard.step(value)
    guard.step(value)
    assert not guard._sum.requires_grad
    assert value.tolist() == [3.0, 3.0]
