"""The guard in a training whose slots fall out of use, and what it costs."""

import warnings

import lightning.pytorch as L
import pytest
import torch
from tiny_hosts import Recorder, fit, make_callback, make_host
from torch.utils._python_dispatch import TorchDispatchMode

import ssync_pl.method.loss

# The added loss is small, so that slots fall out of use only where a test makes them.
SETTINGS = {
    "warmup_steps": 3,
    "guard_window": 2,
    "collapse_threshold": 0.5,
    "boundary_weight": 1e-3,
    "interior_weight": 1e-3,
}


def collapsing(at=4):
    host = make_host()
    host.collapse_at = at
    return host


def warned(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(w.message) for w in caught if "Slots fall out of use" in str(w.message)]


def test_warn_tells_once_and_changes_nothing():
    recorder = Recorder()
    callback = make_callback(**SETTINGS)
    _, messages = warned(lambda: fit(collapsing(), callback, recorder, steps=12))
    assert len(messages) == 1
    assert "Nothing was changed" in messages[0]
    assert {logs["ssync/weight"] for logs in recorder.logs[3:]} == {1.0}
    assert recorder.logs[-1]["ssync/used_slots"] == 1


def test_backoff_halves_and_lets_it_grow_back():
    class Recovers(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 9:
                pl_module.collapse_at = 10**6

    recorder = Recorder()
    callback = make_callback(on_collapse="backoff", **SETTINGS)
    _, messages = warned(lambda: fit(collapsing(5), callback, recorder, Recovers(), steps=15))
    assert len(messages) == 1
    assert "halved" in messages[0]
    # On from step 3; windows end after steps 4, 6, 8, 10 and 12, of which 6 and 8 are collapsed.
    factors = [logs["ssync/weight"] for logs in recorder.logs[3:]]
    assert factors == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.5, 0.5, 1, 1]


def test_stop_stops_after_the_window():
    callback = make_callback(on_collapse="stop", **SETTINGS)
    trainer, messages = warned(lambda: fit(collapsing(5), callback, steps=100))
    assert trainer.should_stop
    assert trainer.global_step == 7
    assert "training stops" in messages[0]


def test_a_healthy_host_is_left_alone():
    callback = make_callback(on_collapse="stop", **SETTINGS)
    trainer, messages = warned(lambda: fit(make_host(), callback, steps=9))
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


def reads_of(monkeypatch, callback, steps):
    """How often each training step reads the device."""
    # The search for NaN is free on the CPU and returns at once elsewhere.
    monkeypatch.setattr(ssync_pl.method.loss, "_refuse_nan", lambda *args: None)
    reads, lists, tolist = [], [], torch.Tensor.tolist
    # On the CPU this reads memory without going through the dispatcher.
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (lists.append(1), tolist(tensor))[1])

    class Count(L.Callback):
        def on_train_start(self, trainer, pl_module):
            step = pl_module.training_step
            real = step.run

            def run(*args, **kwargs):
                lists.clear()
                with CountReads() as mode:
                    out = real(*args, **kwargs)
                reads.append(mode.reads + len(lists))
                return out

            step.run = run

    fit(make_host(), callback, Count(), steps=steps)
    return reads


@pytest.mark.parametrize("options", [{}, {"relative_weight": 0.1}, {"on_collapse": "backoff", "loss": "ce"}])
def test_device_is_read_in_the_first_step_and_at_the_end_of_a_window_only(monkeypatch, options):
    reads = reads_of(monkeypatch, make_callback(warmup_steps=2, guard_window=3, **options), steps=11)
    # Steps 0 and 1 are the warm-up (the first is checked), 2 reads what was watched, 4, 7 and 10 end a window.
    busy = {0, 2, 4, 7, 10}
    assert [step for step, count in enumerate(reads) if count] == sorted(busy)
    assert all(reads[step] == 1 for step in busy - {0})
