"""What the wrapped training step returns, and that its gradient is that of a host that calls the loss itself."""

import inspect
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from tiny_hosts import (
    HandWritten,
    Recorder,
    TinyHost,
    TinyParts,
    assert_same_weights,
    assert_untouched,
    fit,
    make_callback,
    make_host,
    make_loader,
    weights,
)

import ssync_pl.plugin.engine
from ssync_pl.adapters import PathAdapter


class OneArgument(TinyHost):
    def training_step(self, batch):
        return self.host_loss(batch)[0]


class FromIterator(TinyHost):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.host_loss(batch)[0]


class BuildsLate(TinyHost):
    """Its modules exist only after `configure_model`, as Lightning recommends for sharded models."""

    def __init__(self):
        super().__init__()
        self.parts = (self.corrector, self.decoder)
        del self.corrector, self.decoder
        self.parts_built = False

    def configure_model(self):
        if not self.parts_built:
            self.corrector, self.decoder = self.parts
            self.parts_built = True


@pytest.fixture(scope="module")
def by_hand():
    host, recorder = make_host(HandWritten), Recorder()
    fit(host, recorder)
    return host, recorder


@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_gradients_are_those_of_a_host_that_calls_the_loss_itself(by_hand, returns):
    host, recorder = make_host(returns=returns), Recorder()
    fit(host, make_callback(), recorder)
    torch.testing.assert_close(recorder.gradients, by_hand[1].gradients)
    torch.testing.assert_close(recorder.losses, by_hand[1].losses)
    assert_same_weights(host, by_hand[0])
    plain = make_host()
    fit(plain)
    assert any(not torch.allclose(a, b) for a, b in zip(weights(host).values(), weights(plain).values(), strict=True))


def test_options_reach_the_loss():
    options = {"merge_threshold": 0.1, "n_bd": 2, "temperature": 0.7, "boundary_weight": 0.3, "interior_weight": 2.0}
    by_hand, host = make_host(HandWritten), make_host()
    by_hand.options = {**options, "loss": "ce"}
    fit(by_hand, steps=2)
    fit(host, make_callback(**options, loss="ce"), steps=2)
    assert_same_weights(host, by_hand)


def test_dict_of_the_host_is_not_changed_and_its_other_entries_are_passed_on():
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((outputs, pl_module.kept))

    fit(make_host(returns="dict"), make_callback(), Look(), steps=1)
    outputs, kept = seen[0]
    assert sorted(kept) == ["aux", "loss"]
    assert torch.equal(kept["loss"], kept["aux"])
    assert torch.equal(outputs["aux"], kept["aux"])
    assert outputs["loss"] > kept["loss"]


def test_a_step_that_returns_none_is_skipped():
    class Skipping(HandWritten):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 == 0 else super().training_step(batch, batch_idx)

    expected, host, recorder = make_host(Skipping), make_host(returns="none"), Recorder()
    fit(expected)
    fit(host, make_callback(), recorder)
    assert len(recorder.losses) == 2
    assert_same_weights(host, expected)


@pytest.mark.parametrize("kind", [OneArgument, FromIterator])
def test_other_signatures_of_the_training_step(by_hand, kind):
    host = make_host(kind)
    fit(host, make_callback())
    assert_same_weights(host, by_hand[0])


def test_modules_may_be_built_in_configure_model():
    host = make_host(BuildsLate)
    fit(host, make_callback())
    expected = make_host(HandWritten)
    fit(expected)
    torch.testing.assert_close(weights(host)["decoder.position"], weights(expected)["decoder.position"])


def test_wrapper_looks_like_the_host_s_own_step():
    seen = []

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            step = pl_module.training_step
            seen.append((step.__name__, step.__doc__, str(inspect.signature(step)), callable(step)))

    fit(make_host(), make_callback(), Look(), steps=1)
    assert seen == [("training_step", "Documented.", "(batch: 'Any', batch_idx: 'int') -> 'Any'", True)]


def test_a_host_with_a_training_step_of_its_instance_gets_it_back():
    host = make_host()
    calls = []

    def own(batch, batch_idx):
        calls.append(batch_idx)
        return host.host_loss(batch)[0]

    host.training_step = own
    fit(host, make_callback(), steps=2)
    assert host.training_step is own
    assert calls == [0, 1]


def test_wrong_return_type_is_named():
    class Odd(TinyHost):
        def training_step(self, batch, batch_idx):
            return [self.host_loss(batch)[0]]

    with pytest.raises(Exception, match="a tensor, a dict with 'loss', or None, but got list"):
        fit(make_host(Odd), make_callback(), steps=1)


@pytest.mark.parametrize("own_trainer", [True, False])
def test_lightning_callback_with_a_pytorch_lightning_host(by_hand, own_trainer):
    pl = pytest.importorskip("pytorch_lightning")

    class OtherHost(TinyParts, pl.LightningModule):
        pass

    host = make_host(OtherHost)
    if own_trainer:
        fit(host, make_callback(), trainer=pl.Trainer)
        assert_same_weights(host, by_hand[0])
        assert_untouched(host)
    else:
        # Lightning itself refuses a host of the other namespace; the callback cannot mend that.
        with pytest.raises(TypeError, match=r"must be a `LightningModule`|You passed a"):
            fit(host, make_callback())


def test_pytorch_lightning_errors_and_stops_reach_the_callback():
    pl = pytest.importorskip("pytorch_lightning")

    class OtherHost(TinyParts, pl.LightningModule):
        def training_step(self, batch, batch_idx):
            raise ValueError("on purpose")

    host = make_host(OtherHost)
    with pytest.raises(ValueError, match="on purpose"):
        fit(host, make_callback(), trainer=pl.Trainer)
    assert_untouched(host)


def test_trainer_takes_the_callback_alone_too():
    host = make_host()
    trainer = L.Trainer(
        callbacks=make_callback(),
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(host, make_loader())
    assert "ssync/boundary_loss" in trainer.callback_metrics


def test_the_walk_of_a_batch_is_short(monkeypatch):
    """From the wrapped training step to the adapter and to the loss, a reader passes 8 functions in 6 files at most."""
    package, walk = str(Path(ssync_pl.__file__).parent), {}

    def look_at(owner, name):
        real = getattr(owner, name)

        def spy(*args, **kwargs):
            walk[real.__code__.co_filename, name] = None
            frame = sys._getframe(1)
            while frame is not None and frame.f_code.co_name != "_call_strategy_hook":
                if frame.f_code.co_filename.startswith(package):
                    walk[frame.f_code.co_filename, frame.f_code.co_name] = None
                frame = frame.f_back
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    look_at(PathAdapter, "collect")
    look_at(ssync_pl.plugin.engine, "ssync_loss")
    fit(make_host(), make_callback(), steps=1)
    assert {"__call__", "_step", "collect", "term", "ssync_loss"} == {function for _, function in walk}
    assert len(walk) <= 8
    assert len({file for file, _ in walk}) <= 6
