"""Compiled hosts and compiled parts train as uncompiled ones do."""

import pytest
import torch
from tiny_hosts import (
    HandWritten,
    Recorder,
    TinyHost,
    assert_same_weights,
    fit,
    make_callback,
    make_host,
    make_loader,
    make_trainer,
)

from ssync_pl.errors import HostError


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def expected():
    """Two steps of warm-up, then on."""

    class Late(HandWritten):
        def training_step(self, batch, batch_idx):
            return self.host_loss(batch)[0] if self.global_step < 2 else super().training_step(batch, batch_idx)

    host, recorder = make_host(Late), Recorder()
    fit(host, recorder)
    return host, recorder


def whole(host, backend):
    return torch.compile(host, backend=backend)


def corrector(host, backend):
    host.corrector = torch.compile(host.corrector, backend=backend)
    return host


def both_parts(host, backend):
    host.corrector = torch.compile(host.corrector, backend=backend)
    host.decoder.compile(backend=backend)
    return host


def forward(host, backend):
    host.forward = torch.compile(host.forward, backend=backend)
    return host


@pytest.mark.parametrize(
    ("way", "backend"),
    [
        (whole, "eager"),
        (whole, "aot_eager"),
        (corrector, "eager"),
        (both_parts, "aot_eager"),
        (forward, "aot_eager"),
        pytest.param(whole, "inductor", marks=pytest.mark.slow),
        pytest.param(both_parts, "inductor", marks=pytest.mark.slow),
    ],
)
def test_same_gradients_as_uncompiled(expected, way, backend):
    host, recorder = make_host(), Recorder()
    model = way(host, backend)
    trainer = make_trainer(make_callback(warmup_steps=2, guard_window=1), recorder)
    trainer.fit(model, make_loader())
    named = [{k.replace("_orig_mod.", ""): v for k, v in step.items()} for step in recorder.gradients]
    torch.testing.assert_close(named, expected[1].gradients, rtol=1e-4, atol=1e-6)
    assert "ssync/boundary_loss" in trainer.callback_metrics
    assert not any(module._forward_hooks for module in host.modules())


def test_a_compiled_host_keeps_its_compiled_step():
    host = make_host()
    model = torch.compile(host, backend="eager")
    trainer = make_trainer(make_callback(), steps=1)
    trainer.fit(model, make_loader())
    assert host.training_step is host.__dict__["training_step"]
    assert host.training_step.__wrapped__.__func__ is TinyHost.training_step


def test_a_host_that_ran_compiled_before_the_training(expected):
    """Either the hooks are seen, or the message says what to do; and that helps."""
    host = make_host()
    host.forward = torch.compile(host.forward, backend="eager")
    host(next(iter(make_loader()))["video"])
    try:
        fit(host, make_callback(warmup_steps=2))
    except HostError as error:
        assert "torch._dynamo.reset()" in str(error)  # noqa: PT017
        torch._dynamo.reset()
        fit(host, make_callback(warmup_steps=2))
    assert_same_weights(host, expected[0])
