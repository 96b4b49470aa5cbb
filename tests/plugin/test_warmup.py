import re

import lightning.pytorch as L
import pytest
import tiny_hosts as tiny
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny_hosts import Recorder, TinyHost, fit, in_hook, make_callback, make_clips, make_host, make_loader
from torch.utils.data import DataLoader, IterableDataset

from ssync_pl import ssync_loss
from ssync_pl.errors import ConfigError


class Stochastic(TinyHost):
    def training_step(self, batch, batch_idx):
        return self.host_loss(batch)[0] * (1 + torch.rand(()))


@pytest.mark.parametrize("options", [{"warmup_steps": 10**6}, {"warmup_steps": 100, "guard_window": 100}])
def test_a_warm_up_without_end_equals_a_training_without_the_callback(options):
    runs = []
    for callbacks in ([], [make_callback(**options)], [make_callback()]):
        host, recorder = make_host(Stochastic), Recorder()
        torch.manual_seed(3)
        fit(host, *callbacks, recorder)
        runs.append((tiny.weights(host), recorder.losses, torch.get_rng_state()))
    plain, off, on = runs
    torch.testing.assert_close(off, plain, rtol=0, atol=0)
    assert torch.equal(on[2], plain[2])  # random numbers are not touched while it is on, either


class Stream(IterableDataset):
    def __iter__(self):
        return iter(make_clips(8))


STREAM = DataLoader(Stream(), batch_size=2)


@pytest.mark.parametrize(
    ("loader", "options"), [(make_loader(), {"max_epochs": -1, "max_time": "00:00:01:00"}), (STREAM, {"max_epochs": 2})]
)
def test_a_share_of_an_unknown_length_is_refused_with_a_hint_that_helps(loader, options):
    host = make_host()
    with pytest.raises(ConfigError, match="warmup_steps"):
        fit(host, make_callback(warmup_steps=None), loader=loader, steps=-1, **options)
    assert "training_step" not in host.__dict__


def train(mixin, *callbacks, loader=None, epochs=5, steps=-1, **settings):
    host, own = tiny.either(mixin, **{"warmup_steps": None, **settings})
    trainer = fit(host, *own, *callbacks, steps=steps, max_epochs=epochs, loader=loader)
    return trainer, host._ssync_engine if mixin else own[0].engine


def stop_early():
    return in_hook("on_train_epoch_end", lambda trainer, module: setattr(trainer, "should_stop", True))


def accumulate_later():
    """4 steps in the first epoch, then one in each: 8, and not the 20 of the first epoch's pace."""
    return L.callbacks.GradientAccumulationScheduler({0: 1, 1: 4})


@pytest.mark.parametrize("mixin", [False, True])
@pytest.mark.parametrize(
    ("also", "settings", "first", "last"),
    [
        (None, {"warmup_ratio": 0.3}, 6, 20),
        (None, {"warmup_ratio": 1.0}, None, 20),
        (stop_early, {"warmup_ratio": 0.3}, None, 4),
        (stop_early, {"warmup_ratio": 0.1}, 2, 4),
        (None, {"warmup_steps": 3, "loader": STREAM, "epochs": 2}, 3, 8),
        (None, {"warmup_steps": 8, "loader": STREAM, "epochs": 2}, None, 8),
        (None, {"warmup_ratio": 0.5, "loader": STREAM, "epochs": -1, "steps": 6}, 3, 6),
        (accumulate_later, {"warmup_ratio": 0.25}, 2, 8),
        (accumulate_later, {"warmup_ratio": 0.5, "steps": 6}, 3, 6),
        (accumulate_later, {"warmup_steps": 9}, None, 8),
    ],
)
def test_the_end_says_when_it_ran_or_why_it_never_did(mixin, also, settings, first, last, caplog, recwarn):
    with caplog.at_level("INFO", logger="lightning.pytorch.ssync_pl"):
        trainer, engine = train(mixin, *([] if also is None else [also()]), **settings)
    assert (engine.first_step, trainer.global_step) == (first, last)
    told = [record.getMessage() for record in caplog.records if record.name == "lightning.pytorch.ssync_pl"]
    warned = [str(w.message) for w in recwarn if "SSync" in str(w.message)]
    if first is None:
        ((setting, value),) = [item for item in settings.items() if item[0].startswith("warmup")]
        reason = rf"never ran: .* {engine.schedule.start} optimizer steps \(`{setting}`={value}\).* step {last}\."
        assert (told, len(warned), bool(re.search(reason, warned[0]))) == ([], 1, True)
    else:
        assert warned == []
        assert all(word in told[0] for word in (f"step {first}", "slots in use", "Backend 'torch'", "cpu"))
        assert told[1:] == [f"SSync ran from optimizer step {first} to the end at step {last}."]


@pytest.mark.parametrize("mixin", [False, True])
@pytest.mark.parametrize(("epochs", "later", "ratio"), [(3, 3, 0.5), (5, 9, 0.3)])  # once it runs, it stays on
def test_the_warm_up_follows_a_length_that_changes(mixin, epochs, later, ratio):
    def change(trainer, module):
        trainer.fit_loop.max_epochs = later if trainer.current_epoch else epochs

    assert train(mixin, in_hook("on_train_epoch_end", change), warmup_ratio=ratio)[1].schedule.start == 6
    search = L.callbacks.LearningRateFinder(num_training_steps=4, early_stop_threshold=None, update_attr=False)
    assert train(mixin, search, warmup_ratio=0.3)[1].schedule.start == 6


@pytest.mark.parametrize("mixin", [False, True])
def test_a_second_fit_of_one_trainer_goes_on(mixin):
    host, own = tiny.either(mixin, warmup_steps=None, warmup_ratio=0.5)
    trainer = fit(host, *own, steps=-1, max_epochs=1)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(host, make_loader())
    assert ((host._ssync_engine if mixin else own[0].engine).schedule.start, trainer.global_step) == (2, 20)


def test_the_length_of_very_many_epochs_and_ctrl_c(caplog):
    def interrupt(trainer, *args):
        raise KeyboardInterrupt

    callback, limit = make_callback(warmup_steps=None, warmup_ratio=1e-9), {"steps": -1, "max_epochs": 10**9}
    with caplog.at_level("INFO", logger="lightning.pytorch.ssync_pl"), pytest.raises(SystemExit):
        fit(make_host(), callback, in_hook("on_train_epoch_end", interrupt), accumulate_later(), **limit)
    assert callback.engine.schedule.start == 2
    assert "SSync ran from optimizer step 2 to the end at step 4." in caplog.text


class Logs(TinyHost):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("mine", loss)
        return loss


def test_logged_values_are_those_of_the_step():
    host, recorder = make_host(Logs), Recorder()
    with torch.no_grad():
        loss, *maps = host.host_loss(next(iter(make_loader())))
    options = {"merge_threshold": 0.2, "boundary_weight": 0.5}
    fit(host, make_callback(**options), recorder, steps=1)
    out, expected = ssync_loss(tiny.maps_of(*maps), **options), {"mine": loss, "ssync/weight": 1.0}
    names = ("boundary_loss", "interior_loss", "boundary_fraction", "interior_fraction", "overlap_fraction")
    names += ("agreement", "merged_slots", "used_encoder_slots", "used_decoder_slots")
    expected |= {f"ssync/{name}": getattr(out, name).float().mean() for name in names}
    expected["ssync/used_slots"] = expected.pop("ssync/used_decoder_slots")
    expected["ssync/total_loss"] = loss + out.loss
    assert expected["ssync/merged_slots"] > 0
    logged = {name: recorder.logs[0][name] for name in expected}
    assert logged == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)
    assert float(recorder.losses[0] - loss) == pytest.approx(float(out.loss), rel=1e-4)


def test_only_steps_that_are_written_down_are_logged_and_only_once_it_is_on(tmp_path):
    """Each number is work for Lightning, whether it is kept or not."""
    counted, shown = [], []

    def start(trainer, module):
        log = module.log

        def count(name, value, **options):
            counted.append(trainer.global_step)
            log(name, value, **options)

        module.log = count

    def show(trainer, *args):
        shown.append({name for name in trainer.progress_bar_metrics if name.startswith("ssync/")})

    looks = in_hook("on_train_start", start), in_hook("on_train_batch_end", show)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(make_host(), make_callback(warmup_steps=1), *looks, steps=9, logger=logger, log_every_n_steps=4)
    # Those that the logger keeps, and the first of each epoch of 4 steps, so that the names are there.
    assert sorted(set(counted)) == [1, 3, 4, 7, 8]
    assert shown[:2] == [set(), {"ssync/boundary_loss", "ssync/interior_loss"}]  # in the progress bar
    rows = [row.split(",") for row in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()]
    assert set(rows[0]) >= {"ssync/boundary_fraction", "ssync/merged_slots", "ssync/used_slots", "ssync/agreement"}
    assert [row[rows[0].index("step")] for row in rows[1:]] == ["3", "7"]
