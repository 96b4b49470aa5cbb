"""What is logged, and how large the added loss is."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny_hosts import Recorder, fit, make_callback, make_host, make_loader, maps_of

from ssync_pl import ssync_loss

NAMES = {
    "ssync/boundary_loss",
    "ssync/interior_loss",
    "ssync/boundary_fraction",
    "ssync/interior_fraction",
    "ssync/merged_slots",
    "ssync/used_slots",
    "ssync/agreement",
}


def test_values_are_those_of_the_step():
    host = make_host()
    with torch.no_grad():
        loss, logits, masks = host.host_loss(next(iter(make_loader())))
    recorder = Recorder()
    fit(host, make_callback(merge_threshold=0.2, boundary_weight=0.5), recorder, steps=1)
    logs = recorder.logs[0]
    assert set(logs) >= NAMES

    e, d = logits.max(2).indices, masks.max(2).indices
    used = [torch.tensor([float(clip.unique().numel()) for clip in labels]).mean() for labels in (e, d)]
    out = ssync_loss(maps_of(logits, masks), merge_threshold=0.2, boundary_weight=0.5)
    merged = (out.winners != torch.arange(4)).sum(1).float().mean()
    assert merged > 0
    count = out.boundary.numel()
    expected = {
        "ssync/boundary_loss": _brier(masks, out.encoder_labels, out.boundary),
        "ssync/interior_loss": _brier(logits, out.decoder_labels, out.interior),
        "ssync/boundary_fraction": out.boundary.sum() / count,
        "ssync/interior_fraction": out.interior.sum() / count,
        "ssync/merged_slots": merged,
        "ssync/used_slots": used[1],
        "ssync/used_encoder_slots": used[0],
        "ssync/agreement": (out.encoder_labels == out.decoder_labels).sum() / count,
        "ssync/weight": torch.tensor(1.0),
    }
    for name, value in expected.items():
        assert logs[name] == pytest.approx(float(value), rel=1e-5), name
    added = 0.5 * logs["ssync/boundary_loss"] + logs["ssync/interior_loss"]
    assert float(recorder.losses[0] - loss) == pytest.approx(added, rel=1e-4)


def _brier(logits, labels, selected):
    """Squared error against one-hot labels, patch by patch."""
    probs, total, count = logits.softmax(2), 0.0, 0
    for b, t, h, w in selected.nonzero().tolist():
        target = torch.zeros(logits.shape[2])
        target[labels[b, t, h, w]] = 1
        total += (probs[b, t, :, h * selected.shape[3] + w] - target).square().sum()
        count += logits.shape[2]
    return total / max(count, 1)


def test_logged_by_the_logger_and_only_once_it_is_on(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(make_host(), make_callback(warmup_steps=2, guard_window=2), logger=logger)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    assert set(header) >= NAMES
    steps = [row.split(",")[header.index("step")] for row in rows[1:]]
    assert steps == ["2", "3"]


def test_only_steps_that_are_written_down_are_logged(tmp_path):
    """Each number is work for Lightning, whether it is kept or not."""
    counted = []

    class Count(L.Callback):
        def on_train_start(self, trainer, pl_module):
            log = pl_module.log

            def count(name, value, **options):
                if name.startswith("ssync/"):
                    counted.append(trainer.global_step)
                log(name, value, **options)

            pl_module.log = count

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = fit(make_host(), make_callback(warmup_steps=1), Count(), steps=9, logger=logger, log_every_n_steps=4)
    # Those that the logger keeps, and the first of each pass, so that the names are there.
    later_passes = range(len(make_loader()), 9, len(make_loader()))
    assert sorted(set(counted)) == sorted({1, 3, 7, *later_passes})
    assert set(trainer.callback_metrics) >= NAMES
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    assert [row.split(",")[header.index("step")] for row in rows[1:]] == ["3", "7"]


def test_losses_are_shown_in_the_progress_bar():
    shown = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            shown.append({k for k in trainer.progress_bar_metrics if k.startswith("ssync/")})

    fit(make_host(), make_callback(), Look(), steps=1)
    assert shown == [{"ssync/boundary_loss", "ssync/interior_loss"}]


def test_host_logging_stays_as_it_is():
    class Logs(type(make_host())):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("mine", loss)
            return loss

    recorder, host = Recorder(), make_host(Logs)
    plain = float(make_host().host_loss(next(iter(make_loader())))[0])
    fit(host, make_callback(), recorder, steps=1)
    assert recorder.logs[0]["mine"] == pytest.approx(plain)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_relative_weight_adds_that_share_of_the_host_s_loss(scale):
    host, recorder, own = make_host(scale=scale), Recorder(), []
    host.configure_optimizers = lambda: torch.optim.SGD(host.parameters(), lr=1e-3 / scale)
    real = host.host_loss

    def keep(batch):
        out = real(batch)
        own.append(out[0].detach())
        return out

    host.host_loss = keep
    fit(host, make_callback(relative_weight=0.1), recorder, steps=40)
    totals, own = torch.stack(recorder.losses), torch.stack(own)
    assert float((totals - own).mean() / own.mean()) == pytest.approx(0.1, rel=0.1)


def test_relative_weight_does_not_care_for_the_scale_of_the_host_s_loss():
    gradients = []
    for scale in (1.0, 100.0):
        host, recorder = make_host(scale=scale), Recorder()
        host.configure_optimizers = lambda host=host, scale=scale: torch.optim.SGD(host.parameters(), lr=0.1 / scale)
        fit(host, make_callback(relative_weight=0.3), recorder)
        gradients.append([{k: v / scale for k, v in step.items()} for step in recorder.gradients])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
