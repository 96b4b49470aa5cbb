"""During the warm-up nothing happens; after it, everything; and what is logged."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny_hosts import (
    MixinHost,
    Recorder,
    TinyHost,
    assert_same_weights,
    fit,
    in_hook,
    make_callback,
    make_clips,
    make_host,
    make_loader,
    maps_of,
)
from torch.utils.data import DataLoader, IterableDataset

from ssync_pl import ssync_loss
from ssync_pl.errors import ConfigError

NAMES = {
    f"ssync/{name}"
    for name in ("boundary_loss", "interior_loss", "boundary_fraction", "interior_fraction", "merged_slots",
                 "used_slots", "agreement")
}  # fmt: skip


class Stochastic(TinyHost):
    """Draws random numbers in its step, so that a shifted generator shows."""

    def training_step(self, batch, batch_idx):
        return self.host_loss(batch)[0] * (1 + torch.rand(()))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(make_clips(8))


@pytest.mark.parametrize("options", [{"warmup_steps": 10**6}, {"warmup_steps": 100, "guard_window": 100}])
def test_a_warm_up_without_end_equals_a_training_without_the_callback(options):
    runs = []
    for callbacks in ([], [make_callback(**options)], [make_callback()]):
        host, recorder = make_host(Stochastic), Recorder()
        torch.manual_seed(3)
        fit(host, *callbacks, recorder)
        runs.append((host, recorder.losses, torch.get_rng_state()))
    plain, off, on = runs
    assert_same_weights(off[0], plain[0], exact=True)
    torch.testing.assert_close(off[1], plain[1], rtol=0, atol=0)
    assert torch.equal(off[2], plain[2])
    assert torch.equal(on[2], plain[2])  # random numbers are not touched while it is on, either


def test_an_unknown_length_is_refused_with_a_hint_that_helps():
    stream = DataLoader(Stream(), batch_size=2)
    for loader, options in ((make_loader(), {"max_epochs": -1, "max_time": {"minutes": 1}}), (stream, {})):
        host = make_host()
        with pytest.raises(ConfigError, match="warmup_steps"):
            fit(host, make_callback(warmup_steps=None), loader=loader, **{"max_epochs": 2, **options}, steps=-1)
        assert "training_step" not in host.__dict__
    trainer = fit(make_host(), make_callback(warmup_steps=1), loader=stream, steps=-1, max_epochs=1)
    assert trainer.global_step == 4
    assert "ssync/weight" in trainer.callback_metrics


def train(mixin, *callbacks, **options):
    """Trains with the callback or the mixin; returns the trainer, and the engine in it."""
    if mixin:
        host, own = make_host(MixinHost, ssync=options), []
    else:
        host, own = make_host(), [make_callback(**{"warmup_steps": None, **options})]
    trainer = fit(host, *own, *callbacks, steps=-1, max_epochs=5)
    return trainer, host._ssync_engine if mixin else own[0].engine


@pytest.mark.parametrize("mixin", [False, True])
def test_the_end_says_when_it_ran_or_that_it_never_did(mixin, caplog, recwarn):
    with caplog.at_level("INFO", logger="lightning.pytorch.ssync_pl"):
        train(mixin, warmup_ratio=0.3)
    told = [record.getMessage() for record in caplog.records if record.name == "lightning.pytorch.ssync_pl"]
    assert len(told) == 2
    assert all(word in told[0] for word in ("step 6", "backend 'torch'", "cpu"))
    assert told[1] == "SSync ran from optimizer step 6 to the end at step 20."
    assert not [w for w in recwarn if "SSync" in str(w.message)]
    stop = in_hook("on_train_epoch_end", lambda trainer, module: setattr(trainer, "should_stop", True))
    with pytest.warns(UserWarning, match="SSync never ran.*6 optimizer steps.*ended at step 4") as caught:
        train(mixin, stop, warmup_ratio=0.3)
    assert len([w for w in caught if "never ran" in str(w.message)]) == 1


@pytest.mark.parametrize("mixin", [False, True])
def test_the_warm_up_is_a_share_of_the_steps_that_are_taken(mixin):
    # 4 steps in the first epoch, then one in each: 8, and not the 20 of the first epoch's pace.
    accumulate = L.callbacks.GradientAccumulationScheduler({0: 1, 1: 4})
    trainer, engine = train(mixin, accumulate, warmup_ratio=0.5)
    assert (engine.first_step, trainer.global_step) == (4, 8)

    def started(epochs, later, ratio):
        """The warm-up's end where the length changes to so many epochs after the first, and after the second epoch."""

        def change(trainer, module):
            trainer.fit_loop.max_epochs = later if trainer.current_epoch else epochs

        return train(mixin, in_hook("on_train_epoch_end", change), warmup_ratio=ratio)[1].schedule.start

    assert started(3, 3, 0.5) == 6
    assert started(5, 9, 0.3) == 6  # once it runs, it stays on


class Logs(TinyHost):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("mine", loss)
        return loss


def test_logged_values_are_those_of_the_step():
    host, recorder = make_host(Logs), Recorder()
    with torch.no_grad():
        loss, logits, masks = host.host_loss(next(iter(make_loader())))
    options = {"merge_threshold": 0.2, "boundary_weight": 0.5}
    fit(host, make_callback(**options), recorder, steps=1)
    logs, out = recorder.logs[0], ssync_loss(maps_of(logits, masks), **options)
    used = [torch.tensor([float(clip.unique().numel()) for clip in m.max(2).indices]).mean() for m in (logits, masks)]
    merged = (out.winners != torch.arange(4)).sum(1).float().mean()
    assert merged > 0
    expected = {
        "boundary_loss": out.boundary_loss,
        "interior_loss": out.interior_loss,
        "boundary_fraction": out.boundary.float().mean(),
        "interior_fraction": out.interior.float().mean(),
        "merged_slots": merged,
        "used_slots": used[1],
        "used_encoder_slots": used[0],
        "agreement": (out.encoder_labels == out.decoder_labels).float().mean(),
        "weight": 1.0,
    }
    for name, value in expected.items():
        assert logs[f"ssync/{name}"] == pytest.approx(float(value), rel=1e-5), name
    assert logs["mine"] == pytest.approx(float(loss))  # what the host logs stays as it is
    added = 0.5 * logs["ssync/boundary_loss"] + logs["ssync/interior_loss"]
    assert float(recorder.losses[0] - loss) == pytest.approx(added, rel=1e-4)


def test_only_steps_that_are_written_down_are_logged_and_only_once_it_is_on(tmp_path):
    """Each number is work for Lightning, whether it is kept or not."""
    counted, shown = [], []

    def start(trainer, module):
        log = module.log

        def count(name, value, **options):
            if name.startswith("ssync/"):
                counted.append(trainer.global_step)
            log(name, value, **options)

        module.log = count

    def show(trainer, *args):
        shown.append({name for name in trainer.progress_bar_metrics if name.startswith("ssync/")})

    looks = in_hook("on_train_start", start), in_hook("on_train_batch_end", show)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = fit(make_host(), make_callback(warmup_steps=1), *looks, steps=9, logger=logger, log_every_n_steps=4)
    # Those that the logger keeps, and the first of each epoch, so that the names are there.
    later_epochs = range(len(make_loader()), 9, len(make_loader()))
    assert sorted(set(counted)) == sorted({1, 3, 7, *later_epochs})
    assert shown[0] == set()
    assert shown[1] == {"ssync/boundary_loss", "ssync/interior_loss"}  # in the progress bar
    assert set(trainer.callback_metrics) >= NAMES
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    assert set(header) >= NAMES
    assert [row.split(",")[header.index("step")] for row in rows[1:]] == ["3", "7"]
