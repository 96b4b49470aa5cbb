"""Mixed precision, accumulation, clipping, gradient scaling and half-precision maps."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from tiny_hosts import (
    HandWritten,
    Recorder,
    assert_same_weights,
    fit,
    make_callback,
    make_host,
)

import ssync_pl.plugin.engine
from ssync_pl.method.labels import hard_labels


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"precision": "64-true"},
        {"precision": "bf16-true"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_equals_a_host_that_calls_the_loss_itself(options):
    by_hand, host = make_host(HandWritten), make_host()
    fit(by_hand, **options)
    fit(host, make_callback(), **options)
    assert_same_weights(host, by_hand)


def test_gradients_are_scaled_once_under_float16():
    """The loss has to be inside before the scaler multiplies: a huge scale would show in the gradients."""

    def run(kind, *callbacks):
        host, recorder = make_host(kind), Recorder()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        fit(host, *callbacks, recorder, plugins=[plugin])
        return host, recorder

    host, recorder = run(type(make_host()), make_callback())
    by_hand, expected = run(HandWritten)
    torch.testing.assert_close(recorder.gradients, expected.gradients)
    assert_same_weights(host, by_hand)
    exact = Recorder()
    fit(make_host(HandWritten), exact, steps=1)
    for name, gradient in exact.gradients[0].items():
        torch.testing.assert_close(recorder.gradients[0][name], gradient, rtol=0.2, atol=2e-2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_labels_and_losses_are_computed_in_float32(monkeypatch, precision):
    seen = []
    real = ssync_pl.plugin.engine.ssync_loss

    def spy(maps, **options):
        out = real(maps, **options)
        seen.append((maps, out))
        return out

    monkeypatch.setattr(ssync_pl.plugin.engine, "ssync_loss", spy)
    extra = {"precision": precision}
    if precision == "16-mixed":
        extra = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]}
    fit(make_host(), make_callback(merge=False), steps=1, **extra)
    maps, out = seen[0]
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    assert maps.attention_logits.dtype == half
    assert out.boundary_loss.dtype == out.interior_loss.dtype == torch.float32
    labels = hard_labels(maps.attention_logits.float().softmax(2)).view(out.raw_encoder_labels.shape)
    assert torch.equal(out.raw_encoder_labels, labels)


def test_windows_of_the_guard_count_micro_batches():
    callback = make_callback(guard_window=4)
    judged = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            judged.append(callback.engine.guard.latest is not None)

    fit(make_host(), callback, Look(), steps=2, accumulate_grad_batches=2)
    assert judged == [False, False, False, True]
