"""The host is put back however the training ends, and other stages never see SSync."""

import lightning.pytorch as L
import pytest
from lightning.pytorch.tuner import Tuner
from tiny_hosts import (
    TinyHost,
    assert_same_weights,
    assert_untouched,
    fit,
    make_callback,
    make_host,
    make_loader,
    make_trainer,
    weights,
)


class Raises(TinyHost):
    def __init__(self, error, at=2):
        super().__init__()
        self.error = error
        self.at = at

    def training_step(self, batch, batch_idx):
        loss = self.host_loss(batch)[0]
        if batch_idx == self.at:
            raise self.error
        return loss


class RaisesIn(L.Callback):
    """An error in a hook of another callback."""

    def __init__(self, hook):
        def fail(*args, **kwargs):
            raise ValueError(f"in {hook}")

        setattr(self, hook, fail)


def test_normal_end():
    host, callback = make_host(), make_callback()
    fit(host, callback)
    assert_untouched(host)
    assert type(host).training_step is TinyHost.training_step


@pytest.mark.parametrize("error", [ValueError("on purpose"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_error_in_the_training_step(error):
    host = make_host(Raises, error=error)
    with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
        fit(host, make_callback())
    assert_untouched(host)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_after_backward", "on_train_end"])
@pytest.mark.parametrize("order", [0, 1])
def test_error_in_another_callback(hook, order):
    host = make_host()
    callbacks = [make_callback(), RaisesIn(hook)]
    with pytest.raises(ValueError, match=f"in {hook}"):
        fit(host, *(callbacks if order else callbacks[::-1]), steps=1)
    assert_untouched(host)


def test_fit_again_after_an_error():
    host, callback = make_host(Raises, error=ValueError("on purpose")), make_callback()
    with pytest.raises(ValueError, match="on purpose"):
        fit(host, callback)
    host.at = -1
    trainer = fit(host, callback, steps=2)
    assert "ssync/boundary_loss" in trainer.callback_metrics
    assert_untouched(host)


def test_two_trainings_with_one_callback_equal_two_with_fresh_ones():
    one, two, callback = make_host(), make_host(), make_callback(relative_weight=0.5, guard_window=2)
    for _ in range(2):
        fit(one, callback)
        fit(two, make_callback(relative_weight=0.5, guard_window=2))
    assert_same_weights(one, two, exact=True)
    assert_untouched(one)


def test_one_trainer_fits_twice():
    host, callback = make_host(), make_callback()
    trainer = make_trainer(callback, steps=2)
    trainer.fit(host, make_loader())
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(host, make_loader())
    assert_untouched(host)
    assert callback.engine.guard.state_dict()["count"] == 2


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_are_not_touched(stage):
    host, callback = make_host(), make_callback()
    seen = []

    class Look(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            seen.append(callback._session)
            assert_untouched(pl_module)

        on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    trainer = make_trainer(callback, Look(), limit_val_batches=1, limit_test_batches=1, limit_predict_batches=1)
    before = weights(host)
    getattr(trainer, stage)(host, make_loader(), **({"verbose": False} if stage != "predict" else {}))
    assert seen == [None]
    assert all((before[k] == v).all() for k, v in weights(host).items())


def test_search_for_a_learning_rate_runs_the_plain_step():
    host, callback = make_host(), make_callback()
    host.lr = 1e-3
    trainer = make_trainer(callback)
    found = Tuner(trainer).lr_find(host, make_loader(), num_training=5, early_stop_threshold=None, update_attr=False)
    plain = make_host()
    plain.lr = 1e-3
    expected = Tuner(make_trainer()).lr_find(
        plain, make_loader(), num_training=5, early_stop_threshold=None, update_attr=False
    )
    assert found.results == expected.results
    assert_untouched(host)
    trainer.fit(host, make_loader())
    assert callback.engine.guard.state_dict()["count"] == 4


def test_search_for_a_learning_rate_as_a_callback():
    host, callback = make_host(), make_callback()
    host.lr = 1e-3
    fit(
        host,
        callback,
        L.callbacks.LearningRateFinder(num_training_steps=5, early_stop_threshold=None, update_attr=False),
    )
    assert callback.engine.guard.state_dict()["count"] == 4
    assert_untouched(host)
